"""Trainers that nnU-Net finds by the environment variable ``nnUNet_extTrainer``."""
