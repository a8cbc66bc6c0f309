"""Qwen3VL <-> transformers `Qwen3VLForConditionalGeneration`: a checkpoint's keys and config.json.

With tied embeddings our model has no `lm_head`, nor have most checkpoints. UnifiedReward uses the same format.
"""

from clvr_jax.checkpoint_io.tensors import Tensors, without_tied_head
from clvr_jax.convert.configs import MOST, from_known_fields, section
from clvr_jax.convert.rules import KeyMapping
from clvr_jax.errors import ClvrError
from clvr_jax.files.json_input import JSON, UncheckedJSON
from clvr_jax.models.qwen3_vl import Qwen3VLConfig, Qwen3VLTextConfig, Qwen3VLVisionConfig

KEY_MAPPING = KeyMapping(
    stacked=("model.visual.blocks", "model.visual.deepstack_merger_list", "model.language_model.layers"),
)

_TEXT_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
_VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh"}
# Bookkeeping of transformers' configurations that does not change the computation.
_IGNORED = (
    "model_type",
    "initializer_range",
    "dtype",
    "torch_dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "architectures",
    "transformers_version",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "is_encoder_decoder",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
# Defaults of transformers for absent fields, where our defaults, those of the 8B model, differ.
_TEXT_SILENT = {
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 128_000,
    "rope_theta": 500_000.0,
}
_VISION_SILENT = {"out_hidden_size": 3584}


def config_from_dict(config: UncheckedJSON) -> Qwen3VLConfig:
    """Parses `config.json`.

    Rotary parameters are read in both forms: rope_parameters, or rope_theta and rope_scaling as in the released
    checkpoints.
    Raises: ClvrError for an unknown field or a value that our model does not support.
    """
    if config.get("model_type") != "qwen3_vl":
        raise ClvrError(f"config.json: model_type {config.get('model_type')!r} is not qwen3_vl")
    missing = [name for name in ("text_config", "vision_config") if name not in config]
    if missing:
        raise ClvrError(f"config.json of Qwen3-VL lacks {missing}")
    text, vision = section(config, "text_config"), section(config, "vision_config")
    # transformers uses the outer value, false if it is absent, and ignores the inner one.
    tied = config.get("tie_word_embeddings", False)
    tokens = {name: config[name] for name in _TOKENS if name in config}
    if not isinstance(tied, bool) or not all(type(token) is int and 0 <= token <= MOST for token in tokens.values()):
        raise ClvrError("config.json of Qwen3-VL: tie_word_embeddings must be true or false, token ids integers")
    known = {"text_config", "vision_config", *_TOKENS, *_IGNORED}
    unknown = sorted(name for name in config if name not in known and not name.startswith("_"))
    if unknown:
        raise ClvrError(f"config.json of Qwen3-VL has unknown fields {unknown}")
    return Qwen3VLConfig(
        text=_text_from_dict(text), vision=_vision_from_dict(vision), tie_word_embeddings=tied, **tokens
    )


def config_to_dict(config: Qwen3VLConfig) -> dict[str, JSON]:
    """Returns the content of `config.json` in the form of the released checkpoints."""
    text, vision = dict(vars(config.text)), dict(vars(config.vision))
    section = list(text.pop("mrope_section"))
    rotary = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": section}
    theta = {"rope_theta": vision.pop("rope_theta"), "rope_type": "axial"}
    vision["deepstack_visual_indexes"] = list(vision["deepstack_visual_indexes"])
    shared = {"tie_word_embeddings": config.tie_word_embeddings}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **{name: getattr(config, name) for name in _TOKENS},
        **shared,
        "text_config": {"model_type": "qwen3_vl_text", **text, "rope_scaling": rotary, **_TEXT_FIXED, **shared},
        "vision_config": {"model_type": "qwen3_vl_vision", **vision, "rope_parameters": theta, **_VISION_FIXED},
    }


def canonicalize_keys(tensors: Tensors, config: Qwen3VLConfig) -> Tensors:
    """Leaves out the head of a model with tied embeddings, which `KEY_MAPPING` does not have."""
    embeddings = "model.language_model.embed_tokens.weight"
    return without_tied_head(tensors, embeddings) if config.tie_word_embeddings else tensors


def _text_from_dict(given: UncheckedJSON) -> Qwen3VLTextConfig:
    rotary = {**section(given, "rope_scaling"), **section(given, "rope_parameters")}
    given = {name: value for name, value in given.items() if name not in ("rope_scaling", "rope_parameters")}
    if rotary.get("rope_type", rotary.get("type", "default")) != "default" or not rotary.get("mrope_interleaved", True):
        raise ClvrError(f"Qwen3-VL text: rotary parameters {rotary} are not supported, only interleaved default ones")
    found: UncheckedJSON = {name: rotary[name] for name in ("rope_theta", "mrope_section") if name in rotary}
    return from_known_fields(Qwen3VLTextConfig, {**_TEXT_SILENT, **given, **found}, fixed=_TEXT_FIXED, ignored=_IGNORED)


def _vision_from_dict(given: UncheckedJSON) -> Qwen3VLVisionConfig:
    rotary = section(given, "rope_parameters")
    given = {name: value for name, value in given.items() if name != "rope_parameters"}
    if rotary.get("rope_type", "axial") != "axial":
        raise ClvrError(f"Qwen3-VL vision: rotary parameters {rotary} are not supported, only axial ones")
    found = {"rope_theta": rotary["rope_theta"]} if "rope_theta" in rotary else {}
    return from_known_fields(
        Qwen3VLVisionConfig, {**_VISION_SILENT, **given, **found}, fixed=_VISION_FIXED, ignored=_IGNORED
    )
