"""The trace viewer: reads a run's folder, and nothing in it is ever run."""
