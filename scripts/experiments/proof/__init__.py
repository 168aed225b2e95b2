"""What pre-training brings: `python -m scripts.experiments.proof`."""
