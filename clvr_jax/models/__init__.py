"""Flax NNX modules, one file per architecture; no files, no training."""
