"""The data engine: synthesizes verified trajectories with a vision-language model and an image generator."""
