"""The decoding settings of a checkpoint: transformers' `generation_config.json`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from clvr_jax.errors import ClvrError
from clvr_jax.files.atomic_io import write_json
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.json_input import JSON, JsonObject, read_object
from clvr_jax.models.common.sampling import UNCHANGED, Sampling

FILE = "generation_config.json"

# Fields that are not supported and would change replies, with the values that change nothing; others are refused.
_NEUTRAL: Mapping[str, tuple[JSON, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "diversity_penalty": (None, 0.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "min_p": (None, 0.0),
    "no_repeat_ngram_size": (None, 0),
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0.0),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, []),
    "suppress_tokens": (None, []),
    "typical_p": (None, 1.0),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Decoding settings of a checkpoint.

    stop_tokens: ids of the tokens that end a reply; () if the checkpoint has none. sampling: how tokens are chosen.
    content: of the file, to write it again; None without a file. Its `do_sample`, `temperature` and lengths are not
    used, because the caller always gives the temperature and the maximum length of a reply.
    """

    stop_tokens: tuple[int, ...] = ()
    sampling: Sampling = UNCHANGED
    content: Mapping[str, JSON] | None = dataclasses.field(default=None, hash=False)

    @classmethod
    def read(cls, directory: Path, vocab_size: int) -> Self:
        """Reads the file of a model directory; without a file all settings are neutral.

        Raises: ClvrError for fields of a wrong type or range, and for a field that is not supported and not neutral.
        """
        file = directory / FILE
        if not has_entry(file):
            return cls()
        entry = read_object(file)
        for name, neutral in _NEUTRAL.items():
            if (value := entry.content.get(name)) not in neutral:
                raise ClvrError(
                    f"{file}: {name} is {value!r:.40}, which is not supported; remove it to decode without it"
                )
        given: dict[str, Any] = {
            name: entry.integer(name) if name == "top_k" else entry.number(name)
            for name in ("top_k", "top_p", "repetition_penalty")
            if entry.content.get(name) is not None  # null is transformers' "not set"
        }
        try:
            return cls(_stop_tokens(entry, vocab_size), Sampling(**given), entry.content)
        except ClvrError as error:
            raise error if str(error).startswith(str(file)) else ClvrError(f"{file}: {error}") from error

    def write(self, directory: Path) -> None:
        """Writes the file as it was read, if there was a file."""
        if self.content is not None:
            write_json(directory / FILE, dict(self.content))


def _stop_tokens(entry: JsonObject, vocab_size: int) -> tuple[int, ...]:
    """Returns the ids in `eos_token_id`, which is an id, a list of ids, or absent."""
    if entry.content.get("eos_token_id") is None:
        return ()
    if isinstance(entry.content["eos_token_id"], list):
        return entry.integers("eos_token_id", high=vocab_size - 1)
    return (entry.integer("eos_token_id", low=0, high=vocab_size - 1),)
