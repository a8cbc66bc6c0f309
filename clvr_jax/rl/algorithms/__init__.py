"""RL algorithms."""
