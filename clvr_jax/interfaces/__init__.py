"""The interfaces of models: chat with images, and image generation. They know no model and no JAX.

Pipelines, models on a mesh and HTTP endpoints implement them. Controllers, verifiers, judges, planners and rewards are
prompts and parsers on top of a `ChatModel`.
"""

from clvr_jax.interfaces.chat import ChatModel, ChatRequest, ChatResponse, Message, Token
from clvr_jax.interfaces.images import ImageModel, ImageRequest, ImageResponse
from clvr_jax.interfaces.usage import Fault, ProviderError, Usage

__all__ = [
    "ChatModel",
    "ChatRequest",
    "ChatResponse",
    "Fault",
    "ImageModel",
    "ImageRequest",
    "ImageResponse",
    "Message",
    "ProviderError",
    "Token",
    "Usage",
]
