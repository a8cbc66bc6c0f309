"""Tokens of prompts for CLIP's text encoders, and CLIP tokenizers for small worlds."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import numpy as np
from tokenizers import pre_tokenizers

from clvr_jax.interfaces.tokenizer import Tokenizer

_WORD_END = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def encode_clip(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> np.ndarray:
    """Tokenizes prompts with start and end of text, truncated or padded on the right with the tokenizer's padding.

    The UNet reads the padding, so it is part of the model: SDXL's second tokenizer pads with "!", all others with the
    end of text.

    Args:
      tokenizer: transformers `CLIPTokenizer`.
      prompts: texts; "" is the unconditional one.
      length: tokens of a row, 77 for the published models.
    Returns: ids (batch, length) int32; a truncated text still ends with end of text.
    """
    ids = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
    # Truncated here: a fast tokenizer would keep the truncation as a setting and save it with its files.
    for row, tokens in zip(ids, tokenizer(list(prompts))["input_ids"], strict=True):
        row[: len(tokens)] = tokens[:length]
        if len(tokens) > length:
            row[-1] = tokens[-1]
    return ids


def make_clip_tokenizer(words: Iterable[str], length: int) -> Tokenizer:
    """Makes a `CLIPTokenizer` in which each of the words is one token; all other text is encoded as bytes.

    Args:
      words: the words, in lower case, since CLIP lower-cases its input.
      length: `model_max_length`, to which diffusers pads.
    Returns: the tokenizer, the same in every process; start and end of text have the largest ids, as in the published
      vocabulary.
    """
    merges = _merges(words)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), *_SPECIAL])

    from transformers import CLIPTokenizer  # slow to import

    # The annotations of transformers do not say what its tokenizers take and do.
    make = cast("Callable[..., Tokenizer]", CLIPTokenizer)
    return make(vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=length)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the merges of byte-pair encoding that make each word one token, most frequent pairs first.

    The trainer of `tokenizers` breaks ties in an order that differs between processes, so a run that is resumed would
    have other tokens.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    pieces = {piece for word in words for piece, _ in split(word)}
    spelled = [(*piece[:-1], piece[-1] + _WORD_END) for piece in sorted(pieces)]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for parts in spelled for pair in itertools.pairwise(parts)):
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        spelled = [_merged(parts, merges[-1]) for parts in spelled]
    return merges


def _merged(parts: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    """Returns the parts of a word with each occurrence of a pair joined, from left to right."""
    joined: list[str] = []
    for part in parts:
        # What was joined at this pair cannot begin it again, since it is longer than its first part.
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined)
