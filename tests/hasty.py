"""`python -m aipo_graph.train` that notices sooner that Ray's head is gone: until then Ray itself keeps two cores busy."""

import runpy

from aipo_graph import cluster

cluster.AWAY = 0.5
runpy.run_module("aipo_graph.train", run_name="__main__", alter_sys=True)
