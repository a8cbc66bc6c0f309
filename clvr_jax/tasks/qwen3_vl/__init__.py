"""Qwen3-VL: supervised fine-tuning as the controller, and judging as a program for the planner."""

from clvr_jax.tasks.qwen3_vl.judge import JudgingConfig, judging_program
from clvr_jax.tasks.qwen3_vl.models import PRESETS, load_controller
from clvr_jax.tasks.qwen3_vl.sft import ConversationConfig, abstract_conversations, conversation_batches, sft_task

__all__ = [
    "PRESETS",
    "ConversationConfig",
    "JudgingConfig",
    "abstract_conversations",
    "conversation_batches",
    "judging_program",
    "load_controller",
    "sft_task",
]
