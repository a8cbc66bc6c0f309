"""Reinforcement learning of diffusion policies."""
