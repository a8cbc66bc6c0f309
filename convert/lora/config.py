"""The configuration of a LoRA: its scale from PEFT's fields and alpha, and the refusal of unsupported fields.

PEFT's own merge is the reference. An adapter that PEFT merges in a way that is not implemented is refused, and the
error names the field that causes it.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from clvr_jax.errors import ClvrError
from clvr_jax.files.file_names import has_entry
from clvr_jax.files.json_input import UncheckedJSON, parse_object, read_object, shown

PEFT_NAME = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""Key in the header of a file that diffusers writes, for PEFT's configuration as JSON."""

_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
_KOHYA_ALPHA = "ss_network_alpha"  # alpha of the training run; the tensors may have their own
# Values of init_lora_weights that initialize the adapter with a part of the base's weights and subtract it there.
_PARTS_OF_THE_BASE = ("pissa", "olora", "corda", "lora_ga")
# Values of init_lora_weights that do not change the base's weights.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Kinds of PEFT's adapters, and the field of each that has its alpha.
_ALPHA_OF = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# Fields of PEFT's LoraConfig, LoHaConfig and LoKrConfig that do not change the delta of a weight, or that have checks
# of their own.
_HARMLESS = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "peft_type", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type"),
    *("base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "peft_version", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
    *("ensure_weight_tying", "base_model_class", "parent_library", "model_type", "network_alpha", "alpha"),
    *("use_dora", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "init_weights"),
    *("decompose_both", "decompose_factor"),
}
_LARGEST = 1e9  # of rank and alpha
# A repeated group may take exponential time to match, many other repetitions a high power of a name's length.
_REPEATED_GROUP, _MAX_REPETITIONS, _MAX_PATTERN = re.compile(r"\)[*+{]"), 4, 500
_ADVICE = "merge it into the weights with PEFT (merge_and_unload) and use the result"


@dataclass(frozen=True)
class AdapterConfig:
    """The configuration of an adapter beside its tensors.

    file: the safetensors file. fields: those of PEFT's `LoraConfig`; empty if there are none. fallback_alpha: alpha of
    the training run, for modules without an alpha tensor or field.
    """

    file: Path
    fields: UncheckedJSON
    fallback_alpha: float | None = None

    @classmethod
    def read(cls, file: Path, component: str) -> "AdapterConfig":
        """Reads the configuration from the header (diffusers, or only an alpha), else from PEFT's file beside it.

        Args:
          file: the safetensors file.
          component: "transformer" or "unet", the prefix of its fields in the header of a pipeline's adapters.
        Raises: ClvrError if it cannot be read, or if it has a field that is not supported.
        """
        with safe_open(file, framework="numpy") as opened:
            header = opened.metadata() or {}
        text = header.get(METADATA) or header.get("adapter_config")
        beside = file.with_name(PEFT_CONFIG)
        prefix = f"{component}."
        where = f"{file}: its metadata cannot be read"
        if text is not None:
            fields: UncheckedJSON = parse_object(text, where).content
        elif file.name == PEFT_NAME and has_entry(beside):
            where = str(beside)
            fields = read_object(beside).content
        else:
            fields = {}
        own = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
        fields = own or {key: value for key, value in fields.items() if not re.match(r"text_encoder(_\d)?\.", key)}
        alphas = _alphas(header, prefix, file)
        if "lora_alpha" not in fields and alphas:
            fields = {**fields, "lora_alpha": alphas.popitem()[1]}
        _check(fields, where)
        kohya = header.get(_KOHYA_ALPHA, "None")
        return cls(file, fields, None if kohya == "None" else _header_number(file, _KOHYA_ALPHA, kohya))

    def scale(self, name: str, rank: int | None, stored_alpha: float | None) -> float:
        """Returns alpha / rank of one module; alpha is the rank if the file does not contain one.

        Args:
          name: name of the module in the file.
          rank: rank of its tensors; None for the full matrices of LoKr, whose scale is 1 unless PEFT saved them.
          stored_alpha: value of its alpha tensor.
        Raises: ClvrError if rank or alpha of the tensors differ from those of the metadata.
        """
        kind = self.fields.get("peft_type")
        if rank is None:
            rank = self._of("rank_pattern", name, "r") if kind == "LOKR" else None
            if rank is None:
                return 1.0  # LyCORIS' rule, whatever alpha is stored
            if rank < 1:
                raise ClvrError(f"{self.file}: {name} has rank {rank} by its metadata; it must be at least 1")
        alpha = self._of("alpha_pattern", name, _ALPHA_OF.get(kind or "LORA", "lora_alpha"))
        pairs = {"rank": (rank, self._of("rank_pattern", name, "r")), "alpha": (stored_alpha, alpha)}
        for what, (of_tensors, of_metadata) in pairs.items():
            if None not in (of_tensors, of_metadata) and of_tensors != of_metadata:
                raise ClvrError(
                    f"{self.file}: {name} has {what} {of_tensors} by its tensors, {of_metadata} by its metadata"
                )
        alpha = next(float(value) for value in (stored_alpha, alpha, self.fallback_alpha, rank) if value is not None)
        if not math.isfinite(alpha):
            raise ClvrError(f"{self.file}: {name} has alpha {alpha}; the file is damaged")
        return alpha / (rank**0.5 if self.fields.get("use_rslora") else rank)

    def initial_adapter(self) -> Path | None:
        """Returns the file of the adapter before its training, which has to be subtracted; None if none has to be.

        Raises: ClvrError if it is needed and not found: in a directory such as pissa_init, in the adapter's own
          directory or beside it, as in PEFT's examples.
        """
        start = str(self.fields.get("init_lora_weights")).lower()
        kind = next((kind for kind in _PARTS_OF_THE_BASE if start.startswith(kind)), None)
        if kind is None:
            return None
        places = _initial_places(self.file, kind)
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise ClvrError(
                f"{self.file}: init_lora_weights {shown(self.fields['init_lora_weights'])}: this adapter was "
                "initialized with a part of the base's weights, so it does not fit the published ones; save it with "
                "PEFT's path_initial_model_for_weight_conversion, or put the adapter as it was before training into "
                f"{places[0].parent}"
            )
        return found

    def _of(self, patterns: str, name: str, default: str) -> Any:
        # PEFT matches the end of a name, after a dot.
        own = self.fields.get(patterns) or {}
        matching = (value for pattern, value in own.items() if _ending(pattern).match(name))
        return next(matching, self.fields.get(default))


def initial_adapters(file: Path) -> list[Path]:
    """Returns the files beside an adapter that may be the adapter before its training."""
    places = [place for kind in _PARTS_OF_THE_BASE for place in _initial_places(file, kind)]
    return [place for place in places if place.is_file()]


def _initial_places(file: Path, kind: str) -> list[Path]:
    return [directory / f"{kind}_init" / PEFT_NAME for directory in (file.parent, file.parent.parent)]


@functools.cache
def _ending(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _alphas(header: Mapping[str, str], prefix: str, file: Path) -> dict[str, float]:
    """Returns key in the header -> alpha of the complete adapter. Raises: ClvrError if two differ."""
    keys = [f"{before}{name}" for before in ("", prefix) for name in _ALPHAS if f"{before}{name}" in header]
    alphas = {key: _header_number(file, key, header[key]) for key in keys}
    if len(set(alphas.values())) > 1:
        listed = ", ".join(f"{key} {value:g}" for key, value in alphas.items())
        raise ClvrError(f"{file}: its header contains several alphas ({listed}); keep the one of its training")
    return alphas


def _header_number(file: Path, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ClvrError(f"{file}: its metadata cannot be read, {key} is {text[:40]!r} and no number")
    return value


def _check(fields: UncheckedJSON, where: str) -> None:
    """Raises ClvrError, which names the field, if PEFT would merge the adapter in a way that is not implemented."""
    if (kind := fields.get("peft_type")) is not None and (not isinstance(kind, str) or kind not in _ALPHA_OF):
        raise ClvrError(f"{where}: peft_type {shown(kind)} is none of {', '.join(_ALPHA_OF)}; {_ADVICE}")
    start = fields.get("init_lora_weights")
    is_part = isinstance(start, str) and start.lower().startswith(_PARTS_OF_THE_BASE)
    if not is_part and (not (start is None or isinstance(start, bool | str)) or start not in _PLAIN_STARTS):
        raise ClvrError(
            f"{where}: init_lora_weights {shown(start)} is not supported, because it may change the base's weights; "
            f"{_ADVICE}"
        )
    if is_part and fields.get("use_dora"):
        raise ClvrError(f"{where}: init_lora_weights {shown(start)} with use_dora is not supported; {_ADVICE}")
    if fields.get("bias") not in (None, "none"):
        raise ClvrError(f"{where}: bias {shown(fields['bias'])} is not supported, only 'none'; {_ADVICE}")
    for name, value in fields.items():
        if name not in _HARMLESS and value not in (None, False, "", [], {}):
            raise ClvrError(f"{where}: {name} {shown(value)} is not supported; {_ADVICE}")
    _check_numbers(fields, where)


def _check_numbers(fields: UncheckedJSON, where: str) -> None:
    if not isinstance(fields.get("use_rslora", False), bool | None):
        raise ClvrError(f"{where}: use_rslora must be true or false, got {shown(fields['use_rslora'])}")
    for name, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"), ("alpha", "alpha_pattern")):
        own = fields.get(patterns) or {}
        if not isinstance(own, Mapping):
            raise ClvrError(f"{where}: {patterns} must be an object, got {shown(own)}")
        for key, value in {name: fields.get(name), **own}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ClvrError(f"{where}: {key} must be a number, got {shown(value)}")
            if value is not None and not abs(value) <= _LARGEST:
                raise ClvrError(f"{where}: {key} must be at most {_LARGEST:g} in size, got {shown(value)}")
        for pattern in own:
            _check_pattern(pattern, f"{where}: {patterns} has {pattern[:60]!r}")


def _check_pattern(pattern: str, what: str) -> None:
    """Raises ClvrError unless a regular expression is well formed and matches a name in little time."""
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)  # without escapes and sets of characters
    repetitions = len(re.findall(r"[*+{]", plain))
    if len(pattern) > _MAX_PATTERN or repetitions > _MAX_REPETITIONS or _REPEATED_GROUP.search(plain):
        raise ClvrError(
            f"{what}, a pattern that may take very long to match; write it with at most {_MAX_REPETITIONS} repetitions "
            f"and no repeated group, in {_MAX_PATTERN} characters"
        )
    try:
        _ending(pattern)
    except (re.error, OverflowError, RecursionError) as error:  # OverflowError: a{99999999999}
        raise ClvrError(f"{what}, which is no pattern ({error})") from error
