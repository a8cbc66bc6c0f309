"""Qwen3-VL, a vision-language model: the controller and the verifier of the closed loop."""

from clvr_jax.models.qwen3_vl.config import Qwen3VLConfig, Qwen3VLTextConfig
from clvr_jax.models.qwen3_vl.model import Qwen3VL
from clvr_jax.models.qwen3_vl.vision import Qwen3VLVisionConfig

__all__ = ["Qwen3VL", "Qwen3VLConfig", "Qwen3VLTextConfig", "Qwen3VLVisionConfig"]
