"""The closed loop without models: actions, context, protocols, budget, loop and saved trajectories."""

from clvr_jax.reasoning.conversation.actions import IMAGE_GEN, SYSTEM_PROMPT, TERMINATE, ParseError, Reply, parse
from clvr_jax.reasoning.conversation.context import chat_messages, conditioning_text
from clvr_jax.reasoning.conversation.protocols import (
    Controller,
    Conversation,
    GeneratedImage,
    GenerationRequest,
    ImageGenerator,
)
from clvr_jax.reasoning.loop.budget import Budget
from clvr_jax.reasoning.loop.loop import run
from clvr_jax.reasoning.trajectories.trajectory import Step, Trajectory, Verdict

__all__ = [
    "IMAGE_GEN",
    "SYSTEM_PROMPT",
    "TERMINATE",
    "Budget",
    "Controller",
    "Conversation",
    "GeneratedImage",
    "GenerationRequest",
    "ImageGenerator",
    "ParseError",
    "Reply",
    "Step",
    "Trajectory",
    "Verdict",
    "chat_messages",
    "conditioning_text",
    "parse",
    "run",
]
