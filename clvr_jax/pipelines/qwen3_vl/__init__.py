"""Qwen3-VL: replies to conversations with images, and verifies images."""

from clvr_jax.pipelines.qwen3_vl.pipeline import ChatAnswer, Qwen3VLPipeline
from clvr_jax.pipelines.qwen3_vl.verifier import Verifier

__all__ = ["ChatAnswer", "Qwen3VLPipeline", "Verifier"]
