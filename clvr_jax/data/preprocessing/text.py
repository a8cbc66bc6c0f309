"""Text preprocessing: prompts as tokens, length buckets, and the small tokenizer of the shipped models."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from clvr_jax.data.preprocessing.chat_templates import check_chat_template, render_chats
from clvr_jax.data.preprocessing.own_tokenizer import read_own_tokenizer, write_own_tokenizer
from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import located
from clvr_jax.files.json_input import read_object
from clvr_jax.interfaces.tokenizer import Tokenizer

MAX_PROMPT_CHARACTERS = 20_000

# Qwen's control tokens in Qwen's order, then the tokens of the loop.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<think>", "</think>", "<|image_gen|>", "<|terminate|>",
    *(f"<IMG_GEN_{number}>" for number in range(1, 9)),
)  # fmt: skip

# Files with the vocabulary: of fast tokenizers, or of transformers 4.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))

_QWEN_TOKENIZERS = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN_MODELS = ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_moe")
"""Models, as config.json names them, whose tokenizer transformers reads with its class for Qwen."""

TURN_TOKENS = ("<|im_start|>", "<|im_end|>")
"""Start and end of a turn in Qwen's chat template."""

# The pre-tokenization of Qwen: contractions, words with a leading space, single digits, runs of punctuation, line ends.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Trains a byte-level BPE with Qwen's special tokens and writes it as a transformers tokenizer.

    Args:
      texts: the training texts; all other text can be encoded as bytes.
      vocab_size: size of the vocabulary, with the 256 bytes and the special tokens.
      directory: output directory, which is created; files in it are replaced.
    """
    tokenizer = _empty_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    write_own_tokenizer(tokenizer, directory)


def _empty_tokenizer() -> tokenizers.Tokenizer:
    """Returns a tokenizer of ours before it is trained."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def load_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer in `directory`, which holds tokenizer.json, or vocab.json and merges.txt.

    Raises: ClvrError, one line, if these are missing or cannot be read, if the tokenizer knows no text, or if its chat
      template cannot render a short conversation.
    """
    # transformers makes up an empty tokenizer where the vocabulary is missing: every prompt would become no tokens.
    if not any(all((directory / name).is_file() for name in names) for names in _VOCABULARIES):
        raise ClvrError(
            f"{directory}: no tokenizer, it holds neither tokenizer.json nor vocab.json and merges.txt; "
            "copy them from the model that it belongs to"
        )
    for path in directory.iterdir():
        if not path.is_file() and not path.is_dir():  # transformers would take it for an absent file
            raise ClvrError(f"{path}: a broken link, or no file; fetch it again, or remove it")
    try:
        tokenizer: Any = _read_tokenizer(directory)
        knows_text = bool(tokenizer.tokenize("a"))
    # A damaged file ends in whatever exception the place raises at which transformers or tokenizers notice it. The
    # latter is written in Rust, whose panics are no `Exception`.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ClvrError(f"{directory}: no tokenizer that transformers can read ({reason})") from error
    if not knows_text:
        raise ClvrError(
            f"{directory}: the tokenizer has no token for any text; its vocabulary is damaged, copy it again"
        )
    found: Tokenizer = tokenizer
    if found.chat_template is not None:
        with located(directory):
            check_chat_template(found)
    return found


def start_loading_tokenizer(directory: Path) -> Callable[[], Tokenizer]:
    """Loads a tokenizer in a thread, while weights are read; returns the function that waits for it and returns it.

    Where transformers and a process for the chat template are needed, this takes some seconds. The function raises
    what `load_tokenizer` raises.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
    loading = pool.submit(load_tokenizer, directory)
    pool.shutdown(wait=False)
    return loading.result


def _read_tokenizer(directory: Path) -> object:
    """Returns what `AutoTokenizer` reads, without it if the tokenizer is Qwen's, or one of ours.

    The module of `AutoTokenizer` imports the configurations of all models, and PyTorch if it is installed: 2 seconds.
    """
    if _is_qwen(directory):
        if (own := read_own_tokenizer(directory, _empty_tokenizer())) is not None:
            return own
        from transformers import Qwen2Tokenizer  # slow to import, and only pipelines need it

        return Qwen2Tokenizer.from_pretrained(str(directory), local_files_only=True)
    from transformers import AutoTokenizer

    # Without `trust_remote_code` transformers asks on the terminal whether to run code of the directory.
    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)


def _is_qwen(directory: Path) -> bool:
    """Whether the class of a tokenizer is certainly Qwen's; False for damaged files, which `AutoTokenizer` reports."""
    try:
        config = read_object(directory / "tokenizer_config.json").content
        if config.get("tokenizer_class") not in _QWEN_TOKENIZERS or "auto_map" in config:
            return False
        model = directory / "config.json"
        return not model.exists() or read_object(model).content.get("model_type") in _QWEN_MODELS
    except (ClvrError, OSError):
        return False


def check_tokenizer(tokenizer: Tokenizer, embeddings: int, tokens: Iterable[str] = ()) -> None:
    """Checks that a tokenizer belongs to a text model.

    Args:
      tokenizer: a transformers tokenizer.
      embeddings: number of tokens that the model has an embedding for.
      tokens: special tokens that it must have.
    Raises: ClvrError if a token has no embedding, or a special token is missing.
    """
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values())
    if largest >= embeddings:
        raise ClvrError(
            f"the tokenizer's largest token id is {largest}, the text model has embeddings for ids below {embeddings}; "
            "tokenizer and model belong to different checkpoints"
        )
    if tokenizer.pad_token_id is None:
        raise ClvrError("the tokenizer has no pad_token; add it to tokenizer_config.json")
    if missing := [token for token in tokens if token not in vocabulary]:
        raise ClvrError(f"the tokenizer has no token {', '.join(missing)}; it belongs to another model")


def check_prompt(prompt: str) -> None:
    """Raises ClvrError for a prompt that is empty or longer than MAX_PROMPT_CHARACTERS."""
    if not prompt.strip():
        raise ClvrError("the prompt is empty; describe the image to generate")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ClvrError(
            f"the prompt has {len(prompt):,} characters, more than the {MAX_PROMPT_CHARACTERS:,} allowed; shorten it"
        )


def bucket_for(length: int, buckets: Sequence[int]) -> int:
    """Returns the smallest bucket that holds `length` tokens. Raises: ClvrError if none does."""
    if length > max(buckets):
        raise ClvrError(f"the text takes {length:,} tokens, more than the {max(buckets):,} that are read; shorten it")
    return min(bucket for bucket in buckets if bucket >= length)


def prompt_tokens(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each prompt for the FLUX.2 text encoder: one user turn, thinking disabled."""
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = render_chats(tokenizer, conversations, add_generation_prompt=True, enable_thinking=False)
    return tokenizer(texts)["input_ids"]


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[str], buckets: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenizes prompts as `prompt_tokens` does, padded on the right to one length.

    Prompts are never truncated; `histories.fit_history` shortens histories.

    Args:
      tokenizer: transformers tokenizer with a chat template.
      prompts: user texts; the empty text is the unconditional one.
      buckets: lengths to pad to; all prompts are padded to the smallest one that holds the longest prompt.
    Returns: ids and mask, each (batch, bucket) int32.
    Raises: ClvrError for a prompt that is longer than all buckets.
    """
    # Padded here: a fast tokenizer would keep the padding as a setting and save it with its files.
    rows = prompt_tokens(tokenizer, prompts)
    length = bucket_for(max(map(len, rows)), buckets)
    ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(rows), length), np.int32)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask
