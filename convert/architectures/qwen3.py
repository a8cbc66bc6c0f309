"""Qwen3 <-> transformers `Qwen3ForCausalLM` (the `text_encoder/` of a FLUX.2 klein pipeline)."""

import dataclasses

from clvr_jax.checkpoint_io.tensors import Tensors, without_tied_head
from clvr_jax.convert.configs import from_known_fields, section
from clvr_jax.convert.rules import KeyMapping
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.models.qwen3 import Qwen3Config

KEY_MAPPING = KeyMapping(stacked=("model.layers",))

# The only values that our module supports: full attention in every layer, plain rotary positions, SiLU, no dropout.
_FIXED = {"hidden_act": "silu", "use_sliding_window": False, "attention_dropout": 0.0, "rope_scaling": None}
# Bookkeeping, options of generation and training, and fields without effect if `use_sliding_window` is false.
_IGNORED = (
    *("architectures", "dtype", "model_type", "torch_dtype", "transformers_version"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict"),
    *("id2label", "label2id", "problem_type", "initializer_range", "is_encoder_decoder"),
    *("max_window_layers", "sliding_window"),
)


def config_from_dict(config: UncheckedJSON) -> Qwen3Config:
    """Parses `text_encoder/config.json` in the form of transformers 4 or 5.

    Raises: ClvrError for an unknown field or a feature of Qwen3 that the module does not have.
    """
    fields = dict(config)
    # transformers 5 keeps theta and the kind of scaling in one object; 4 in `rope_theta` and `rope_scaling`.
    rope = section(fields, "rope_parameters")
    fields.pop("rope_parameters", None)
    if rope.pop("rope_type", "default") != "default":
        raise ClvrError(f"Qwen3Config: rope_parameters {config['rope_parameters']} is not supported, only 'default'")
    if set(fields.pop("layer_types", None) or ()) - {"full_attention"}:
        raise ClvrError("Qwen3Config: layer_types other than 'full_attention' are not supported")
    return from_known_fields(Qwen3Config, {**fields, **rope}, fixed=_FIXED, ignored=_IGNORED)


def config_to_dict(config: Qwen3Config) -> dict[str, JSON]:
    """Returns the content of `text_encoder/config.json` in the form of the published models (transformers 4 and 5)."""
    return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **dataclasses.asdict(config), **_FIXED}


def canonicalize_keys(tensors: Tensors, config: Qwen3Config) -> Tensors:
    """Leaves out the head of a model with tied embeddings, which `KEY_MAPPING` does not have."""
    return without_tied_head(tensors, "model.embed_tokens.weight") if config.tie_word_embeddings else tensors


def first_layers(tensors: Tensors, config: Qwen3Config, depth: int) -> Tensors:
    """The tensors that hidden states up to `depth` need: no layers above, no head, and the norm of the last layer only.

    Tensors that no Qwen3 of this configuration has stay, to be found out.
    """
    above = tuple(f"model.layers.{layer}." for layer in range(depth, config.num_hidden_layers))
    unread = {"lm_head.weight", *(("model.norm.weight",) if above else ())}
    return {key: tensor for key, tensor in tensors.items() if key not in unread and not key.startswith(above)}
