"""Trajectory-accumulative conditioning: the history as the text and messages that the models read.

The diffusion model reads the prompt and every reasoning text so far, with a mark in place of each earlier image; the
images themselves enter as references in the same order. The controller reads the same history as a chat.
Source: arXiv 2605.14876, closed-loop inference.
"""

from __future__ import annotations

from collections.abc import Sequence

from clvr_jax.errors import ClvrError
from clvr_jax.interfaces import Message
from clvr_jax.reasoning.conversation.actions import strip_action


def image_mark(number: int) -> str:
    """Returns the mark in the conditioning text for the image of step `number`, counted from 1."""
    return f"<IMG_GEN_{number}>"


def conditioning_text(prompt: str, replies: Sequence[str], left_out: int = 0) -> str:
    """Returns the text that conditions the generation of image t.

    Args:
      prompt: the user's request.
      replies: the t replies r_1 .. r_t of the context, with or without action token; images 1 .. t - 1 exist.
      left_out: how many replies, the oldest, are left out, at most t - 1; see `preprocessing.histories.fit_history`.
        The marks of their images stay, because the images still enter as references.
    Returns: "{prompt}\\n{r_1}<IMG_GEN_1>\\n ... \\n{r_t}", replies without action tokens.
    """
    if not replies:
        raise ClvrError("conditioning text: no reply yet; the controller replies before the first image is generated")
    if not 0 <= left_out < len(replies):
        raise ClvrError(
            f"conditioning text: {left_out} of {len(replies)} replies left out; the last one is the instruction"
        )
    *earlier, last = (strip_action(reply) for reply in replies)
    kept = ["" if number < left_out else reply for number, reply in enumerate(earlier)]
    marked = [reply + image_mark(number) for number, reply in enumerate(kept, start=1)]
    return "\n".join([prompt, *marked, last])


def prompt_with_requirements(prompt: str, requirements: Sequence[str]) -> str:
    """Returns the prompt with its checklist in the line below, or the prompt alone if the checklist is empty."""
    return f"{prompt}\n{requirements_line(requirements)}" if requirements else prompt


def requirements_line(requirements: Sequence[str]) -> str:
    """Returns requirements as models read and write them: "Required: a; b." or "Required: nothing."."""
    return f"Required: {'; '.join(requirements) or 'nothing'}."


def chat_messages(
    prompt: str,
    replies: Sequence[str],
    num_images: int,
    system: str | None = None,
    report: str = "",
    requirements: Sequence[str] = (),
    num_given: int = 0,
) -> list[Message]:
    """Returns the history as the controller's chat: user prompt, then (assistant reply, user image) for every step.

    Args:
      prompt: the user's request.
      replies: the replies so far, with their action tokens.
      num_images: how many of them have an image: all (the next reply is due), or all but the last (the chat ends with
        the assistant's reply, as a training target does).
      system: optional system prompt, e.g. `actions.SYSTEM_PROMPT` for a model that was not trained on the contract.
      report: the verifier's report on the latest image, which follows it; "" if there is none.
      requirements: what the verifier will check, listed below the prompt; () if nobody derived them.
      num_given: number of the user's own images, which come before all others, in front of the prompt.
    Returns: messages; image k is the k-th {"type": "image"} part.
    """
    if num_images not in (len(replies), len(replies) - 1) or num_images < 0:
        raise ClvrError(f"chat: {len(replies)} replies go with as many images or one less, got {num_images}")
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    request = prompt_with_requirements(prompt, requirements)
    given: list[Message] = [{"type": "image"}] * num_given
    messages.append({"role": "user", "content": [*given, {"type": "text", "text": request}] if given else request})
    for number, reply in enumerate(replies):
        messages.append({"role": "assistant", "content": reply})
        if number < num_images:
            messages.append({"role": "user", "content": [{"type": "image"}]})
    if report and num_images == len(replies) > 0:
        messages[-1]["content"].append({"type": "text", "text": report})
    return messages
