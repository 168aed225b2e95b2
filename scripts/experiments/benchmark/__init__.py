"""Time and memory beside others: `python -m scripts.experiments.benchmark`."""
