"""Chat templates: conversations as text, with limits on the time and the memory that a template takes.

The chat template of a model is a program in Jinja, and it comes with the files of the model. The sandbox in which
transformers runs it keeps it away from files and from Python, but not from loops in loops or `'a' * 10**10`, which hold
a process or fill the memory. So a template other than our own is rendered by a process whose limits the kernel holds.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clvr_jax.errors import ClvrError
from clvr_jax.interfaces.tokenizer import Tokenizer

# The parts of Qwen3's template that are used here: turns, images in a turn, and the empty thought that disables
# thinking.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- else -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""

_CONTROL_TOKENS = re.compile(
    r"<(?=\|(?:endoftext|im_start|im_end|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>)"
)
"""The first character of the tokens with which a template writes turns and images."""

RENDER_SECONDS = 10.0
"""Limit on the processor time of a conversation; a long one takes a millisecond."""

Conversation = Sequence[Mapping[str, object]]
"""Messages with a role and content."""


def render_chats(tokenizer: Tokenizer, conversations: Sequence[Conversation], **options: bool) -> list[str]:
    """Returns conversations as text.

    Args:
      tokenizer: with a chat template.
      conversations: at least one message each.
      options: of the template, such as `add_generation_prompt`.
    Raises: ClvrError if the template is not valid, cannot render a conversation, or exceeds the limits.
    """
    if tokenizer.chat_template == CHAT_TEMPLATE:
        return [tokenizer.apply_chat_template(list(each), tokenize=False, **options) for each in conversations]
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:  # no template, or several, none of which has the name "default"
        raise ClvrError(f"chat template: {_first_line(str(error))}") from error
    if not isinstance(template, str):
        raise ClvrError("chat template: must be a text; copy chat_template.jinja or tokenizer_config.json again")
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return _PROCESS.render(template, conversations, {**special_tokens, **options})


def without_control_tokens(messages: Conversation) -> list[dict[str, object]]:
    """Returns messages whose text holds no control token, so that turns and images come from the template alone.

    A control token in a prompt or in an earlier reply would end its turn, or stand for an image that is not there. It
    is broken by a space: "< |im_end|>". The tokens of the loop, such as "<|image_gen|>", stay.
    """
    return [_without_control_tokens(message) for message in messages]


def _without_control_tokens(message: Mapping[str, object]) -> dict[str, object]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": _CONTROL_TOKENS.sub("< ", content)}
    assert isinstance(content, Sequence)
    parts = [
        {**part, "text": _CONTROL_TOKENS.sub("< ", part["text"])} if part["type"] == "text" else part
        for part in content
    ]
    return {**message, "content": parts}


def check_chat_template(tokenizer: Tokenizer) -> None:
    """Renders a short conversation. Raises: ClvrError as `render_chats`."""
    render_chats(tokenizer, [[{"role": "user", "content": "a"}]], add_generation_prompt=True)


class TemplateProcess:
    """A process that renders conversations, started when it is needed and again after a template has ended it.

    Args:
      seconds: limit on the processor time of a conversation.
    """

    def __init__(self, seconds: float = RENDER_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        os.register_at_fork(after_in_child=self._forget)

    def render(self, template: str, conversations: Sequence[Conversation], options: Mapping[str, object]) -> list[str]:
        """Returns the conversations as text. Raises: ClvrError as `render_chats`."""
        request = {"template": template, "conversations": [list(each) for each in conversations], "options": options}
        with self._lock:
            reply = self._ask(json.dumps(request).encode() + b"\n")
        if error := reply.get("error"):
            raise ClvrError(f"chat template: {_first_line(error)}")
        texts: list[str] = reply["texts"]
        return texts

    def _ask(self, line: bytes) -> dict[str, Any]:
        try:
            process = self._process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(line)
            process.stdin.flush()
            reply = process.stdout.readline()
        except OSError as error:  # it cannot be started, or was ended before this request
            self._end()
            raise ClvrError(f"chat template: the process that renders it has ended ({error.strerror})") from error
        except BaseException:  # Ctrl-C: its reply must not be taken for that of the next request
            self._end()
            raise
        if reply.endswith(b"\n"):
            found: dict[str, Any] = json.loads(reply)
            return found
        if self._end() == -signal.SIGPROF:
            reason = f"rendering a conversation takes more than {self._seconds:g} s of processor time"
        else:
            reason = "rendering a conversation ended the process that does it"
        raise ClvrError(f"chat template: {reason}; use another template")

    def _start(self) -> subprocess.Popen[bytes]:
        program = Path(__file__).with_name("template_process.py")
        # -P: the directory of the program has modules with names of others. PyTorch is of no use there.
        command, environment = (
            [sys.executable, "-P", str(program), str(self._seconds)],
            {**os.environ, "USE_TORCH": "0"},
        )
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=environment)

    def _end(self) -> int | None:
        """Ends the process; returns its exit code, or the negative number of the signal that had ended it already."""
        process, self._process = self._process, None
        if process is None:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        process.kill()
        process.communicate()
        return process.returncode

    def _forget(self) -> None:
        """In a forked process: leaves the process to the one that started it."""
        self._lock, self._process = threading.Lock(), None


def _first_line(text: str) -> str:
    return (text.splitlines() or ["cannot be rendered"])[0][:300]


_PROCESS = TemplateProcess()
