"""Flax NNX modules, one file for each architecture, without input, output or training."""
