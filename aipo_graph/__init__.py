"""Reinforcement learning for LangGraph policies that consult helper agents while they train (AIPO, arXiv 2605.08401)."""

import gc
import importlib
import os
import signal
import sys
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aipo_graph.api import Run as Run
    from aipo_graph.config import Config as Config
    from aipo_graph.evaluate import evaluate as evaluate
    from aipo_graph.rollout import Agent as Agent
    from aipo_graph.rollout import PolicyChatModel as PolicyChatModel
    from aipo_graph.train import train as train
    from aipo_graph.view import view as view

# The Hub's and vLLM's usage reports, read when they are imported: nothing leaves this machine unasked. A value of the user's own stays.
os.environ.setdefault("DO_NOT_TRACK", "1")
# By default a thread that waits for torch's others keeps its core busy for milliseconds, although one of them, or another program, may need
# it. Read when torch is imported; a value of the user's own stays.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
if sys.argv[:1] == ["-m"] and any(option == "-m" and name.startswith(f"{__name__}.") for option, name in pairwise(sys.orig_argv)):
    # A command starts; cli.main undoes both. A quarter of the start would go into looking for garbage among what is imported, and Ctrl-C
    # would show a traceback of it.
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
__version__ = "0.1.0"
__all__ = ["Agent", "Config", "PolicyChatModel", "Run", "evaluate", "train", "view"]
COMMANDS = {"train", "evaluate", "view"}
PLACES = {"Run": "api", "Config": "config", "Agent": "rollout", "PolicyChatModel": "rollout"}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a submodule makes it an attribute here: these names are those of its functions.
        super().__setattr__(name, getattr(value, name) if name in COMMANDS and isinstance(value, ModuleType) else value)


def __getattr__(name: str) -> Any:
    """Each name from its own module, when it is asked for: `import aipo_graph` waits for nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{PLACES.get(name, name)}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


sys.modules[__name__].__class__ = _Package
