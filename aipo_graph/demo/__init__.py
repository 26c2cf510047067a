"""Watch a policy work: `python -m aipo_graph.demo MODEL ["question"]` in the terminal, with `--web` on a page."""

from aipo_graph.demo.options import Demo, settings

__all__ = ["Demo", "settings"]
