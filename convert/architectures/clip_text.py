"""CLIPText <-> transformers `CLIPTextModel`, `CLIPTextModelWithProjection` (`text_encoder/`, `text_encoder_2/`)."""

import dataclasses
import re
from collections.abc import Mapping
from typing import TypeVar

from clvr_jax.convert.configs import from_known_fields
from clvr_jax.convert.rules import KeyMapping
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.models.stable_diffusion import CLIPTextConfig

Tensor = TypeVar("Tensor")

KEY_MAPPING = KeyMapping(stacked=("text_model.encoder.layers",))

# Tensors that are not weights of a text encoder: the positions 0..76, which transformers saved before 4.31, and the
# other parts of a complete CLIP.
_NOT_OURS = re.compile(
    r"(text_model\.)?embeddings\.position_ids|vision_model\..+|visual_projection\.weight|logit_scale"
)

# Neither changes the output: dropout in training, and tokens that the tokenizer inserts.
_FIXED = {"attention_dropout": 0.0}
# The default of transformers for a config.json without this field.
_SILENT_PROJECTION = 512
_IGNORED = (
    *("architectures", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("bos_token_id", "pad_token_id", "dropout", "initializer_factor", "initializer_range"),
    *("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict"),
    *("id2label", "label2id", "problem_type", "is_encoder_decoder"),
)
# transformers 4 wrote the options of text generation into every nested configuration.
_GENERATION = (
    *("add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size"),
    *("decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping"),
    *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task"),
    *("forced_bos_token_id", "forced_eos_token_id", "is_decoder", "length_penalty", "max_length", "min_length"),
    *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix"),
    *("pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id"),
    *("suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder"),
    *("tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16"),
)


def config_from_dict(config: UncheckedJSON) -> CLIPTextConfig:
    """Parses `config.json` of a text encoder, or of a complete CLIP, whose `text_config` is one.

    A text encoder's configuration has a `projection_dim` whether or not there is a projection: `architectures` decides.
    Raises: ClvrError for an unknown field, another architecture, or a feature that the module does not have.
    """
    architectures = set(config.get("architectures") or ())
    projected = architectures & {"CLIPTextModelWithProjection", "CLIPModel"}
    if not projected and "CLIPTextModel" not in architectures:
        raise ClvrError(
            f"CLIPTextConfig: architectures {sorted(architectures)} must name CLIPTextModel, "
            "CLIPTextModelWithProjection or CLIPModel"
        )
    fields = dict(config)
    if "text_config" in config:
        # Some complete models have the right width of the projection only outside, and a stale one inside.
        fields = {**config["text_config"]}
        fields.update({name: config[name] for name in ("projection_dim",) if name in config})
    width = fields.pop("projection_dim", None) or _SILENT_PROJECTION
    fields["projection_dim"] = width if projected else None
    return from_known_fields(CLIPTextConfig, fields, fixed=_FIXED, ignored=(*_IGNORED, *_GENERATION))


def config_to_dict(config: CLIPTextConfig) -> dict[str, JSON]:
    """Returns the content of `config.json`, which transformers 4 and 5 read."""
    fields = dataclasses.asdict(config)
    architecture = "CLIPTextModelWithProjection"
    if config.projection_dim is None:
        architecture = "CLIPTextModel"
        del fields["projection_dim"]
    return {"architectures": [architecture], "model_type": "clip_text_model", **fields, **_FIXED}


def canonicalize_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames the tensors of a text encoder's file to the keys of `KEY_MAPPING`, those of the published checkpoints.

    transformers 5 saves a `CLIPTextModel` without the leading `text_model.`, and reads both forms. The buffer
    `position_ids` of old files and the vision tower of a complete CLIP are left out.
    """
    ours = {key: tensor for key, tensor in tensors.items() if not _NOT_OURS.fullmatch(key)}
    bare = not any(key.startswith("text_model.") for key in ours)
    return {f"text_model.{key}" if bare else key: tensor for key, tensor in ours.items()}
