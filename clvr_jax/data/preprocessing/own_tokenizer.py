"""The tokenizer that `text.train_tokenizer` writes, read without transformers, whose import takes a second.

Only directories with exactly these files and settings are read here, so that there is nothing that transformers would
read otherwise. Tests compare the two.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tokenizers

from clvr_jax.data.preprocessing.chat_templates import CHAT_TEMPLATE
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import read_object

CONFIG: Final[dict[str, Any]] = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "padding_side": "right",
    "model_max_length": 131072,
    "clean_up_tokenization_spaces": False,
    "chat_template": CHAT_TEMPLATE,
}
"""tokenizer_config.json of a tokenizer that we train."""

TOKENIZER_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"

_OTHER_FILES = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja")
"""Files that transformers would read as well."""


class OwnTokenizer:
    """A byte-level BPE with Qwen's special tokens; it has the interface `interfaces.tokenizer.Tokenizer`."""

    chat_template: str | None = CHAT_TEMPLATE
    model_max_length: int = CONFIG["model_max_length"]

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend_tokenizer = backend

    @property
    def pad_token_id(self) -> int:
        """The id of the padding."""
        return self._special("pad_token")

    @property
    def eos_token_id(self) -> int:
        """The id of the token that ends a text."""
        return self._special("eos_token")

    def _special(self, role: str) -> int:
        token: int = self.convert_tokens_to_ids(CONFIG[role])
        return token

    @property
    def special_tokens_map(self) -> Mapping[str, object]:
        """Role of a special token -> the token."""
        return {name: CONFIG[name] for name in ("eos_token", "pad_token")}

    def __call__(self, text: Any, *, return_offsets_mapping: bool = False) -> Any:
        """Returns the token ids of a text or of several, and the begin and end of each token of one text."""
        if isinstance(text, list):
            return {"input_ids": [row.ids for row in self.backend_tokenizer.encode_batch(text)]}
        found = self.backend_tokenizer.encode(text)
        offsets = {"offset_mapping": list(found.offsets)} if return_offsets_mapping else {}
        return {"input_ids": found.ids, **offsets}

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text; no token is added to any text."""
        ids: list[int] = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def tokenize(self, text: str) -> list[str]:
        """Returns the tokens of a text."""
        tokens: list[str] = self.backend_tokenizer.encode(text).tokens
        return tokens

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Returns the text of token ids."""
        ids = [int(each) for each in token_ids]
        text: str = self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Returns the id of a token, or of each of several; None for a token that there is not."""
        if isinstance(tokens, str):
            return self.backend_tokenizer.token_to_id(tokens)
        return [self.backend_tokenizer.token_to_id(each) for each in tokens]

    def get_vocab(self) -> Mapping[str, int]:
        """Returns token -> id."""
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def get_chat_template(self) -> str:
        """Returns the chat template. Raises: ValueError if it was removed."""
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        return self.chat_template

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: bool) -> str:
        """Returns a conversation as text: what `CHAT_TEMPLATE` renders. Raises: ValueError for another template."""
        if self.chat_template != CHAT_TEMPLATE:
            raise ValueError("another chat template than that of the tokenizer; render it with `render_chats`")
        text = ""
        for message in conversation:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            body = "".join(
                "<|vision_start|><|image_pad|><|vision_end|>" if part["type"] == "image" else part["text"]
                for part in parts
            )
            text += f"<|im_start|>{message['role']}\n{body}<|im_end|>\n"
        if options.get("add_generation_prompt"):
            text += "<|im_start|>assistant\n"
            text += "<think>\n\n</think>\n\n" if options.get("enable_thinking") is False else ""
        return text

    def save_pretrained(self, save_directory: str) -> None:
        """Writes the files of the tokenizer to a directory."""
        write_own_tokenizer(self.backend_tokenizer, Path(save_directory), self.chat_template)


def write_own_tokenizer(
    backend: tokenizers.Tokenizer, directory: Path, chat_template: str | None = CHAT_TEMPLATE
) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and creates the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / TOKENIZER_FILE))
    (directory / CONFIG_FILE).write_text(json.dumps({**CONFIG, "chat_template": chat_template}, indent=2) + "\n")


def read_own_tokenizer(directory: Path, pipeline: tokenizers.Tokenizer) -> OwnTokenizer | None:
    """Returns the tokenizer in a directory; None if it is not one that we have trained, or is damaged.

    pipeline: a tokenizer of ours without a vocabulary; what comes before and after the vocabulary must be the same.
    """
    try:
        if any((directory / name).exists() for name in _OTHER_FILES):
            return None
        if read_object(directory / CONFIG_FILE).content != CONFIG:
            return None
        own = dict(read_object(directory / TOKENIZER_FILE).content)
        expected = json.loads(pipeline.to_str())
        if any(own.get(name) != expected[name] for name in expected.keys() - {"model", "added_tokens"}):
            return None
        model = own.get("model")
        settings = {name: value for name, value in expected["model"].items() if name not in ("vocab", "merges")}
        if not isinstance(model, dict) or any(model.get(name) != value for name, value in settings.items()):
            return None
        backend = tokenizers.Tokenizer.from_file(str(directory / TOKENIZER_FILE))
    except (ClvrError, OSError, ValueError):
        return None
    except BaseException as error:
        # Of tokenizers, which is written in Rust; its panics are no `Exception`. transformers reports what is wrong.
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None
    return OwnTokenizer(backend)
