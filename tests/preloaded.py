"""What started.py's processes have imported before they fork: all but the commands themselves, which then run as ``__main__``."""

import sys

import aipo_graph.demo.__main__
import aipo_graph.evaluate
import aipo_graph.train
import aipo_graph.view.__main__  # noqa: F401

for name in ("demo.__main__", "evaluate", "train", "view.__main__"):
    del sys.modules[f"aipo_graph.{name}"]
