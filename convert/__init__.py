"""PyTorch checkpoints <-> NNX states."""
