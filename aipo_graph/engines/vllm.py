"""The policy in vLLM inside this process: it shares the GPU with the learner and sleeps while that learns.

The only file that imports vllm. What runs on CUDA alone (sleeping, weights over CUDA IPC or NCCL) was written from vLLM 0.32's source
and is untested.
"""

import asyncio
import contextlib
import importlib
import itertools
import os
import socket
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, Self
from urllib.parse import urlsplit

from aipo_graph.config import Config
from aipo_graph.engines import vllm_api
from aipo_graph.engines.facts import Facts
from aipo_graph.errors import ConfigError, EngineError, first_line, install


class VllmEngine(vllm_api.VllmSampler):
    """Implements ``types.Engine`` over vLLM's AsyncLLM. Open it with ``open``."""

    def __init__(self, config: Config, facts: Facts, llm: Any, *, cuda: bool) -> None:
        super().__init__(config, facts, "policy")
        self.in_flight = bool(config.cluster.address) and self.takes == "weights"
        self._sleeps = cuda and not config.cluster.address
        self._llm = llm
        self._adapters = itertools.count(1)
        self._requests = itertools.count()
        self._under_way = 0
        self._asleep = False
        self._transfer: Any = None

    @classmethod
    async def open(cls, config: Config, model_path: str) -> Self:
        """Raises ConfigError where vLLM is not installed, EngineError where it does not start."""
        facts, cuda = Facts.read(config, model_path), vllm_api.on_cuda(config)
        if cuda and config.run.device not in ("auto", "cuda", "cuda:0"):
            raise ConfigError(f"run.device = {config.run.device}: vLLM takes the first GPU; use cuda, and choose with CUDA_VISIBLE_DEVICES")
        # Refused now, not in every trace.
        vllm_api.sampling(facts, [0], seed=0, max_tokens=1, stop=(), temperature=config.rollout.temperature)
        for name, value in _environment(cuda, shared=bool(config.cluster.address)).items():
            os.environ.setdefault(name, value)  # vLLM reads them when it is imported
        vllm = _vllm()
        rank = config.policy.lora_rank
        device: dict[str, Any] = {"enable_chunked_prefill": False, "max_num_batched_tokens": vllm_api.prefill_budget(facts.context)}
        if cuda:
            device = {"gpu_memory_utilization": config.engine.memory, "enable_sleep_mode": not config.cluster.address}
            if not rank and not config.cluster.address:
                device["weight_transfer_config"] = vllm.config.WeightTransferConfig(backend="ipc")
        arguments = vllm.AsyncEngineArgs(
            model=model_path,
            dtype=config.policy.dtype,
            max_model_len=facts.context,
            max_num_seqs=config.engine.max_batch,
            tensor_parallel_size=config.engine.gpus,
            logprobs_mode="processed_logprobs",
            enforce_eager=not cuda,
            disable_log_stats=True,
            enable_lora=rank > 0,
            max_lora_rank=vllm_api.max_rank(rank),
            **device,
        )
        try:
            llm = vllm.AsyncLLMEngine.from_engine_args(arguments)
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"vLLM does not start with the policy {model_path!r}: {first_line(error)}") from error
        engine = cls(config, facts, llm, cuda=cuda)
        await llm.update_weight_version(engine._labels.of(0))
        return engine

    async def _sampled(self, prompt_ids: Sequence[int], parameters: dict[str, Any]) -> dict[str, Any]:
        output = (await self._ask(prompt_ids, parameters)).outputs[0]
        pairs = zip(output.token_ids, output.logprobs or (), strict=True)
        return {
            "token_ids": output.token_ids,
            "logprobs": {"content": [{"logprob": entry[token].logprob} for token, entry in pairs]},
            "finish_reason": output.finish_reason,
            "weight_versions": [{"start": span.start, "version": span.version} for span in output.weight_versions or ()],
        }

    async def logprobs(self, token_ids: Sequence[int]) -> tuple[float, ...]:
        output = await self._ask(token_ids, vllm_api.scoring(self._facts, token_ids))
        return tuple(entry.logprob for entry in vllm_api.prompt_scores(token_ids, output.prompt_logprobs))

    async def _ask(self, prompt_ids: Sequence[int], parameters: dict[str, Any]) -> Any:
        vllm = _vllm()
        if self._asleep:
            raise EngineError("vLLM sleeps while the learner learns; load weights before sampling")
        final = vllm.sampling_params.RequestOutputKind.FINAL_ONLY
        parameters = vllm.SamplingParams(**parameters, output_kind=final)
        prompt = {"prompt_token_ids": list(prompt_ids)}
        self._under_way += 1
        try:
            outputs = self._llm.generate(prompt, parameters, f"policy-{next(self._requests)}", lora_request=self._adapter)
            return [output async for output in outputs][-1]
        except (ValueError, RuntimeError, vllm.exceptions.VLLMServerError) as error:
            raise EngineError(f"vLLM failed while sampling: {first_line(error)}") from error
        finally:
            self._under_way -= 1

    @contextlib.contextmanager
    def run(self, key: str) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        yield

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        """An adapter or a directory on disk; on CUDA full weights, unless files name them otherwise, go from the
        learner's memory to vLLM's. Wakes it first.

        In a cluster requests wait, and go on under the new weights. Raises EngineError while one is served elsewhere, or where vLLM does
        not take them.
        """
        if self._under_way and not self.in_flight:
            raise EngineError(f"weights {version} cannot be loaded while {self._under_way} requests are sampled; wait for them")
        label = self._labels.of(version)
        try:
            async with contextlib.AsyncExitStack() as paused:
                if self.in_flight:
                    await self._llm.pause_generation(mode="keep", clear_cache=False)
                    paused.push_async_callback(self._llm.resume_generation)
                if self._asleep:
                    await self._llm.wake_up(["weights"])
                if self.takes == "adapter":
                    await self._switch(label, weights)
                elif self._sleeps and not self._files.renames:
                    await asyncio.to_thread(self._send_ipc, list(weights), asyncio.get_running_loop())
                else:
                    path = await asyncio.to_thread(self._files.write, label, weights)
                    await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
                    self._files.keep(label)
                if self._asleep:
                    await self._llm.wake_up(["kv_cache"])
                    self._asleep = False
                await self._llm.reset_prefix_cache(reset_running_requests=self.in_flight)
                await self._llm.update_weight_version(label)
        except (ValueError, RuntimeError, _vllm().exceptions.VLLMServerError) as error:
            raise EngineError(f"weights {version} were not taken by vLLM: {first_line(error)}; send the same model") from error
        self.version = version

    async def _switch(self, name: str, weights: Iterable[tuple[str, Any]]) -> None:
        path = await asyncio.to_thread(self._files.write, name, weights)
        request = _vllm().lora.request.LoRARequest(name, next(self._adapters), str(path))
        await self._llm.add_lora(request)
        if self._adapter is not None:
            await self._llm.remove_lora(self._adapter.lora_int_id)
        self._adapter = request
        self._files.keep(name)

    def _send_ipc(self, tensors: list[tuple[str, Any]], loop: asyncio.AbstractEventLoop) -> None:
        """In a thread of its own, since vLLM's trainer side is synchronous. Untested: it needs a GPU."""
        transfer = _vllm().distributed.weight_transfer
        if self._transfer is None:
            client = _InProcess(self._llm, loop)
            start = transfer.ipc_engine.IPCTrainerInitInfo(rank=0)
            self._transfer = transfer.factory.WeightTransferTrainerFactory.trainer_init(start, client=client, source=_source(tensors))
        self._transfer.source = _source(tensors)
        self._transfer.send_weights()

    async def sleep(self) -> None:
        """On CUDA: frees the cache and, unless adapters need the base weights, drops the weights, which `load_weights` brings anew."""
        if self._sleeps and not self._asleep:
            await self._llm.sleep(level=1 if self.takes == "adapter" else 2)
            self._asleep = True

    async def close(self) -> None:
        await asyncio.to_thread(self._llm.shutdown)
        self._files.close()


class _InProcess:
    """vLLM's four calls of a weight transfer, on an engine of another thread's event loop."""

    def __init__(self, llm: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._llm, self._loop = llm, loop

    def _wait(self, call: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._wait(self._llm.init_weight_transfer_engine(_request("WeightTransferInitRequest")(init_info=init_info)))

    def start_weight_update(self) -> None:
        self._wait(self._llm.start_weight_update())

    def update_weights(self, update_info: Any) -> None:
        self._wait(self._llm.update_weights(_request("WeightTransferUpdateRequest")(update_info=update_info)))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait(self._llm.finish_weight_update(weight_version))


def _request(name: str) -> Callable[..., Any]:
    return getattr(_vllm().distributed.weight_transfer.base, name)


def _source(tensors: Sequence[tuple[str, Any]]) -> Any:
    """The learner's tensors as vLLM's transfers read them."""
    return _vllm().distributed.weight_transfer.base.ModuleSource(SimpleNamespace(named_parameters=lambda: tensors))


_nccl: dict[str, Any] = {}
"""Open transfers by server."""


def send_nccl(urls: Sequence[str], tensors: Sequence[tuple[str, Any]]) -> None:
    """Broadcasts tensors on the learner's GPU to each server's own group of GPUs. Untested: it needs two GPUs.

    Raises EngineError where a server does not take part.
    """
    import torch

    transfer = _vllm().distributed.weight_transfer
    try:
        torch.cuda.set_device(tensors[0][1].device)  # of this thread: vLLM joins the group with it
        for url in urls:
            if url not in _nccl:
                import requests  # vLLM's own client needs it

                client = transfer.clients.HTTPVLLMWeightSyncClient(url)
                world = requests.get(f"{url}/get_world_size", timeout=60).json()["world_size"]
                address, port = _rendezvous(url)
                start = transfer.nccl_engine.NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world + 1, rank=0)
                _nccl[url] = transfer.factory.WeightTransferTrainerFactory.trainer_init(start, client=client, source=_source(tensors))
            _nccl[url].source = _source(tensors)
            _nccl[url].send_weights()
    except (RuntimeError, ValueError, OSError) as error:  # a failed HTTP request is an OSError
        raise EngineError(
            f"weights did not reach {url} over NCCL: {first_line(error)}; start it without --weight-transfer-config"
        ) from error


def _rendezvous(url: str) -> tuple[str, int]:
    """This machine's address as the server sees it, and a free port."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect((parts.hostname or "127.0.0.1", parts.port or 80))
        address = str(towards.getsockname()[0])
    with socket.socket() as probe:
        probe.bind(("", 0))
        return address, int(probe.getsockname()[1])


def _environment(cuda: bool, *, shared: bool) -> dict[str, str]:
    """``shared``: with other processes of a cluster, which have the same cores and the same console."""
    found = {"VLLM_NO_USAGE_STATS": "1"}
    if shared:
        found |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # CUDA IPC handles travel to vLLM's own worker process pickled.
    return found | ({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if cuda else {"VLLM_CPU_KVCACHE_SPACE": "1"})


def _vllm() -> ModuleType:
    """Raises ConfigError where vLLM is not installed."""
    try:
        import vllm

        transfer = [f"distributed.weight_transfer.{part}" for part in ("ipc_engine", "nccl_engine", "clients", "factory", "base")]
        for module in ("config", "exceptions", "lora.request", "sampling_params", *transfer):
            importlib.import_module(f"vllm.{module}")
    except ImportError as error:
        raise ConfigError(f"engine.kind = vllm: vLLM cannot be imported ({error}); {install('vllm')}, or use a server") from error
    return vllm
