"""Trajectories as data: records, datasets in TFDS format, and the steps that Proxy Prompt RL samples from."""
