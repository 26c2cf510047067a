"""Reinforcement learning for LangGraph policies that consult helper agents while they train (AIPO, arXiv 2605.08401)."""

__version__ = "0.1.0"
