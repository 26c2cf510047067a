"""The engine that a config names."""

from aipo_graph.config import Config
from aipo_graph.engines.local import LocalEngine
from aipo_graph.engines.server import ServerEngine
from aipo_graph.engines.vllm import VllmEngine
from aipo_graph.types import Engine


async def open_engine(config: Config, model_path: str) -> Engine:
    """Samples from the policy at ``model_path`` (directory or hub name) until it is closed. Raises ConfigError, EngineError.

    A server that `engine.launch` asks for is there already: ``launch.launched`` is around all that uses it.
    """
    if config.engine.kind == "local":
        return LocalEngine.load(config, model_path)
    if config.engine.kind == "vllm":
        return await VllmEngine.open(config, model_path)
    return await ServerEngine.open(config, model_path, config.engine.urls)
