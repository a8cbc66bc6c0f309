"""Prompts as CLIP's text encoders read them, and CLIP tokenizers for small worlds."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

_WORD_END = "</w>"
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")


def encode_clip(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray:
    """Prompts between start and end of text, cut or padded on the right with the tokenizer's own padding.

    Padding is seen by the UNet, so it belongs to the model: SDXL's second tokenizer has "!", the others end of text.

    Args:
      tokenizer: transformers `CLIPTokenizer`.
      prompts: texts; "" is the unconditional one.
      length: tokens of a row, 77 for the published models.
    Returns: ids (batch, length) int32; a text that was cut still ends with its end of text.
    """
    ids = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
    # Cut here: a fast tokenizer that is asked to truncate remembers it, and would write it into what it saves.
    for row, tokens in zip(ids, tokenizer(list(prompts))["input_ids"], strict=True):
        row[: len(tokens)] = tokens[:length]
        if len(tokens) > length:
            row[-1] = tokens[-1]
    return ids


def make_clip_tokenizer(words: Iterable[str], length: int) -> Any:
    """A `CLIPTokenizer` that has each of the words as one token; every other text still becomes bytes.

    Args:
      words: lower case, since CLIP reads no other.
      length: `model_max_length`, to which diffusers pads.
    Returns: the tokenizer; start and end of text have the largest ids, as in the published vocabulary.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # More entries than there can be pairs: learning ends when every word is whole.
    trainer = trainers.BpeTrainer(vocab_size=2**16, end_of_word_suffix=_WORD_END, show_progress=False)
    learner.train_from_iterator(sorted(set(words)), trainer)
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges), *_SPECIAL])

    from transformers import CLIPTokenizer  # slow to import

    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=length
    )
