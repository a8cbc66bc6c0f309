"""Qwen3-VL, a vision-language model: the controller and the verifier of the closed loop."""

from clvr_jax.models.qwen3_vl.model import Qwen3VL, Qwen3VLConfig

__all__ = ["Qwen3VL", "Qwen3VLConfig"]
