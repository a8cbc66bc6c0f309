"""Qwen3: the text encoder of FLUX.2 klein, and a causal language model."""

from clvr_jax.models.qwen3.model import Qwen3, Qwen3Config

__all__ = ["Qwen3", "Qwen3Config"]
