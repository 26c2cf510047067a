"""Reinforcement learning for LangGraph policies that consult helper agents while they train (AIPO, arXiv 2605.08401)."""

import os

# The Hub's and vLLM's usage reports, read when they are imported: nothing leaves this machine unasked. A value of the user's own stays.
os.environ.setdefault("DO_NOT_TRACK", "1")
__version__ = "0.1.0"
