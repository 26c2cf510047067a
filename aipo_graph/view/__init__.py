"""The trace viewer: reads a run's folder, and nothing in it is ever run."""

from pathlib import Path
from typing import Any


def view(run: Any, other: Any = None, *, out: str | Path | None = None, traces: int = 2000, open: bool = True) -> Path:
    """Writes a run's traces and curves as one HTML file that works offline, opens it where there is a display, and says where it is.

    Args:
        run: what `train` returned, a run's folder, or its name below runs/.
        other: another one, to compare it with.
        out: the file; default: view.html in the first run's folder.
        traces: of a run with more, evenly spaced steps are shown.

    Raises ConfigError in one line.
    """
    from aipo_graph.view.__main__ import make  # only readers of a page wait for it

    return make([str(getattr(found, "dir", found)) for found in (run, other) if found is not None], out, traces, open)
