"""Official prompts of judges, from a benchmark's own script at a pinned commit. A script is parsed and never run."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.harness.sources import Source
from clvr_jax.files.json_input import read_text

_IMAGE = "image_base64"
"""The name of the image in the scripts' messages."""


@dataclass(frozen=True)
class Wording:
    """What a judge reads: the system prompt, "" for none, the text, and whether the image comes before it."""

    system: str
    text: str
    image_first: bool


@dataclass(frozen=True)
class OfficialPrompt:
    """The location of a prompt.

    source: the script. function: of the script; it returns a list of messages, or contains a call of `format`, whose
    text follows the image. max_tokens: of a reply, in the script.
    """

    source: Source
    function: str
    max_tokens: int

    @property
    def identity(self) -> str:
        """The name of the script in results: address, and git's id of its content."""
        (script,) = self.source.files
        return f"{script.url} ({script.blob})"

    def fetch(self, benchmark: str) -> ScriptPrompt:
        """Returns the prompt; the script is fetched once and stored in the user's cache.

        Raises: ClvrError, one line, if it cannot be fetched, or has no such prompt.
        """
        path = self.source.fetch(benchmark, is_script=True)
        try:
            tree = ast.parse(read_text(path))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ClvrError(f"{path}: cannot be parsed ({error})") from error
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == self.function:
                return ScriptPrompt(path, node)
        raise ClvrError(f"{path}: has no function {self.function}, which contains the prompt of the judge")


@dataclass(frozen=True)
class ScriptPrompt:
    """A prompt in a parsed script. path: of the script. function: that contains it."""

    path: Path
    function: ast.FunctionDef

    def wording(self, names: Mapping[str, object]) -> Wording:
        """Returns the prompt for one image. names: variables of the function that the prompt contains, with values.

        Raises: ClvrError for a prompt that needs more than these, or is not about one image.
        """
        try:
            return self._wording({_IMAGE: "", **names})
        except (_NotTextError, KeyError, TypeError) as error:
            raise ClvrError(f"{self.path}: {self.function.name}: the prompt cannot be read ({error})") from error

    def _wording(self, names: Mapping[str, object]) -> Wording:
        for node in ast.walk(self.function):
            if isinstance(node, ast.Return) and isinstance(node.value, ast.List):
                return _of_messages(_value(node.value, names))
        for node in ast.walk(self.function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
                return Wording("", _text(node, names), image_first=True)
        raise _NotTextError("it neither returns messages nor formats a text")


class _NotTextError(Exception):
    """A prompt is computed in a way that is not read here."""


def _of_messages(messages: object) -> Wording:
    """Returns the wording of a conversation in OpenAI's form: a system prompt or none, and a question with an image."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _NotTextError("messages must be a list of objects")
    *system, user = messages
    if len(system) > 1 or any(message["role"] != "system" for message in system) or user["role"] != "user":
        raise _NotTextError("the messages must be a system prompt, if any, and a question")
    kinds = [part["type"] for part in user["content"]]
    if sorted(kinds) != ["image_url", "text"]:
        raise _NotTextError("the question must have one text and one image")
    return Wording(
        "".join(part["text"] for message in system for part in message["content"]),
        next(part["text"] for part in user["content"] if part["type"] == "text"),
        image_first=kinds[0] == "image_url",
    )


def _value(node: ast.expr, names: Mapping[str, object]) -> object:
    """Returns the value of a literal in which only `names`, their fields and formatted texts occur."""
    if isinstance(node, ast.List):
        return [_value(element, names) for element in node.elts]
    if isinstance(node, ast.Dict):
        return {
            _text(key, names): _value(value, names)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    return _text(node, names)


def _text(node: ast.expr, names: Mapping[str, object]) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
        return _text(node.value, names)
    if isinstance(node, ast.Name):
        return str(names[node.id])
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        record = names[node.value.id]
        if isinstance(record, Mapping):
            return str(record[_text(node.slice, {})])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 1:
        return _text(node.func.value, names).replace("{}", _text(node.args[0], names))
    raise _NotTextError(f"line {node.lineno} is not a text")
