"""The data engine: prompts become verified trajectories through turns of a vision-language model and an image tool."""
