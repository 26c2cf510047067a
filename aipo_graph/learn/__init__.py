"""The learner: plain synchronous PyTorch. Knows tokens, each with a source, and nothing of graphs."""
