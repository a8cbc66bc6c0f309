"""Closed-loop verified reasoning for image generation, in JAX."""
