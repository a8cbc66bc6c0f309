"""Checkpoints of a whole pipeline in one file, viewed as the models of a diffusers directory."""
