"""The trainer, its losses and checkpoints."""
