"""Tokens of prompts for CLIP's text encoders, and CLIP tokenizers for small worlds."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer as WordPieces
from tokenizers import models, pre_tokenizers, trainers

from clvr_jax.interfaces.tokenizer import Tokenizer

_WORD_END = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def encode_clip(tokenizer: Tokenizer, prompts: Sequence[str], length: int) -> np.ndarray:
    """Tokenizes prompts with start and end of text, truncated or padded on the right with the tokenizer's padding.

    The UNet reads the padding, so it is part of the model: SDXL's second tokenizer pads with "!", all others with end
      of
    text.

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
    Returns: the tokenizer; start and end of text have the largest ids, as in the published vocabulary.
    """
    bpe = WordPieces(models.BPE(end_of_word_suffix=_WORD_END))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # The limit is larger than the number of possible merges, so that training ends when each word is one token.
    trainer = trainers.BpeTrainer(vocab_size=2**16, end_of_word_suffix=_WORD_END, show_progress=False)
    bpe.train_from_iterator(sorted(set(words)), trainer)
    merges: Any = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), *_SPECIAL])

    from transformers import CLIPTokenizer  # slow to import

    # The annotations of transformers are wider than what its tokenizers do.
    tokenizer: Any = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=length
    )
    made: Tokenizer = tokenizer
    return made
