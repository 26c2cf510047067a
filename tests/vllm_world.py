"""What the vLLM tests share: settings, perturbed weights, adapters, their exact logprobs, and a proxy before the real server."""

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from aiohttp import ClientSession, web
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from aipo_graph import load
from aipo_graph.config import Config
from aipo_graph.learn.model import load_model

ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
OPERATORS = load.model("operators")
PROMPT = (26, 9, 7, 10, 8, 21, 17, 14, 32)
RANK, CONTEXT = 8, 384
"""Of the server that all tests share."""

Weights = list[tuple[str, torch.Tensor]]


def settings(url: str = "", **sections: dict[str, Any]) -> Config:
    engine = {"kind": "server", "urls": [url]} if url else {"kind": "server", "launch": True}
    given = {"run": {"device": "cpu"}, "engine": engine | sections.pop("engine", {})}
    return Config.model_validate(given | sections)


def base() -> Any:
    return load_model(OPERATORS)


def perturbed(seed: int) -> Any:
    """The policy with noise on every matrix, so that its logprobs are far from the base's."""
    model, draw = base(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=draw)
    return model


def adapted(seed: int, scale: float = 0.3) -> tuple[Any, Weights]:
    """The policy with a random adapter on every linear layer, and the adapter's tensors under peft's names."""
    torch.manual_seed(seed)
    model = get_peft_model(base(), LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += scale * 0.1 * torch.randn(parameter.shape)
    return model, list(get_peft_model_state_dict(model).items())


@torch.no_grad()
def exact(model: Any, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
    """log p of all tokens but the first."""
    row = torch.tensor(token_ids)
    return (model(row[None, :-1]).logits[0] / temperature).log_softmax(-1).gather(1, row[1:, None])[:, 0].tolist()


def gap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@contextlib.asynccontextmanager
async def served(handler: Callable[[web.Request], Any]) -> AsyncIterator[str]:
    """A real HTTP server on a free loopback port."""
    app = web.Application(client_max_size=2**24)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def proxy(
    target: str, *, hide: Sequence[str] = (), edit: Callable[[str, Any], None] | None = None, faults: Sequence[str] = ()
) -> AsyncIterator[tuple[str, list[Any]]]:
    """Forwards to ``target`` and lists the bodies of sampling requests. Hides routes, edits answers, fails the first samplings."""
    seen: list[Any] = []
    left = list(faults)

    async def forward(request: web.Request) -> web.StreamResponse:
        if request.path in hide:
            return web.json_response({"detail": "Not Found"}, status=404)
        sampling = request.path in ("/inference/v1/generate", "/v1/completions")
        body = await request.json() if request.can_read_body else None
        if sampling and body.get("sampling_params", body).get("seed") is not None:
            seen.append(body)
            if left:
                fault = left.pop(0)
                if fault == "reset":
                    assert request.transport is not None
                    request.transport.abort()
                    return web.Response()
                return web.json_response({"error": {"message": "overloaded"}}, status=int(fault))
        async with session.request(request.method, target + request.path_qs, json=body) as response:
            if response.content_type != "application/json":
                return web.Response(status=response.status, text=await response.text())
            answer = await response.json()
            if edit is not None:
                edit(request.path, answer)
            return web.json_response(answer, status=response.status)

    async with ClientSession() as session, served(forward) as url:
        yield url, seen


def per_server(runs: Sequence[Sequence[str]]) -> Counter[str]:
    return Counter(url for urls in runs for url in set(urls))
