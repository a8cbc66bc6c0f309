"""The interface of tokenizers: what we use of those of transformers, which are slow to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, overload

if TYPE_CHECKING:
    import tokenizers


class TextTokens(TypedDict):
    """The tokens of one text: their ids and, if requested, the begin and end of each in the text."""

    input_ids: list[int]
    offset_mapping: NotRequired[list[tuple[int, int]]]


class BatchTokens(TypedDict):
    """The token ids of several texts, not padded."""

    input_ids: list[list[int]]


class Tokenizer(Protocol):
    """A fast tokenizer of transformers, a `PreTrainedTokenizerFast`, or one that has what is used of it.

    Attributes:
      chat_template: the Jinja template of conversations, None if there is none.
      pad_token_id: id of the padding; `preprocessing.text.check_tokenizer` refuses a tokenizer without one.
      eos_token_id: id of the token that ends a text.
      model_max_length: maximum number of tokens of a text.
    """

    chat_template: str | None
    model_max_length: int

    @property
    def pad_token_id(self) -> int: ...  # noqa: D102 - an attribute

    @property
    def eos_token_id(self) -> int: ...  # noqa: D102 - an attribute

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer: ...  # noqa: D102 - an attribute

    @overload
    def __call__(self, text: str, *, return_offsets_mapping: bool = False) -> TextTokens: ...

    @overload
    def __call__(self, text: list[str]) -> BatchTokens: ...

    def __len__(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text, with those that the tokenizer adds to every text if it adds any."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Returns the text of token ids."""
        ...

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int: ...

    @overload
    def convert_tokens_to_ids(self, tokens: list[str] | tuple[str, ...]) -> list[int]: ...

    def get_vocab(self) -> Mapping[str, int]:
        """Returns token -> id."""
        ...

    def get_chat_template(self) -> str:
        """Returns the chat template, the one with the name "default" of several. Raises: ValueError without any."""
        ...

    @property
    def special_tokens_map(self) -> Mapping[str, object]: ...  # noqa: D102 - an attribute: role -> token

    def apply_chat_template(self, conversation: Sequence[Mapping[str, object]], **options: bool) -> str:
        """Returns a conversation as text, if the option `tokenize` is False."""
        ...

    def save_pretrained(self, save_directory: str) -> object:
        """Writes the files of the tokenizer to a directory."""
        ...
