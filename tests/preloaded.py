"""What started.py's processes have imported before they fork: all but the commands themselves, which then run as ``__main__``."""

import gc
import sys
from importlib import import_module

gc.set_threshold(50_000)  # as commands have it
COMMANDS = ("aipo_graph.demo.__main__", "aipo_graph.evaluate", "aipo_graph.train", "aipo_graph.view.__main__")

for name in (*COMMANDS, "peft", "transformers.models.llama.modeling_llama"):
    import_module(name)
for name in COMMANDS:
    del sys.modules[name]
