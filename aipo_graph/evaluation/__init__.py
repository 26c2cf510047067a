"""What `evaluate.py` is made of: sampling in worker processes, estimators, figures and tables."""
