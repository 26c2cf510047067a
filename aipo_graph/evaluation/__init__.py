"""What `evaluate.py` is made of, beside `workers.py`, which samples: estimators, figures and tables."""
