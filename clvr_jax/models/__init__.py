"""Flax NNX modules, one package for each architecture, without input, output or training."""
