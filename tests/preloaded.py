"""What started.py's processes have imported before they fork: all but the commands themselves, which then run as ``__main__``."""

import sys
from importlib import import_module

COMMANDS = ("aipo_graph.demo.__main__", "aipo_graph.evaluate", "aipo_graph.train", "aipo_graph.view.__main__")

for name in (*COMMANDS, "peft", "transformers.models.llama.modeling_llama"):
    import_module(name)
for name in COMMANDS:
    del sys.modules[name]
