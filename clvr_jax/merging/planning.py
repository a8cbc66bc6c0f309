"""The plan of a merge: the three models, the files to copy and notes for the user. Reads headers only."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clvr_jax.convert.streaming.planning import TensorSlice, files_beside
from clvr_jax.files.atomic_io import read_json
from clvr_jax.files.json_input import JSON
from clvr_jax.merging.methods import DSWM, Settings
from clvr_jax.merging.sources import LoRADelta, Origin, Weights, is_weight, open_align, open_tuned, open_weights

MERGE, REPORT = "merge.json", "report.json"
OLD_MERGE = "recipe.json"
"""Former name of merge.json, which is still read."""
PLOTS = ("report_norms.png", "report_cosines.png")
_SAMPLING = {"model_index.json": ("is_distilled",), "clvr.json": ("num_inference_steps", "guidance_scale")}
"""Files of a pipeline -> their fields that determine how to sample from its model."""
_MODE = "reference_cache"
"""Field of clvr.json: how a model was trained to attend to references."""
_ATTENTION = ("_class_name", _MODE)
"""Fields of these files that say how references are attended to; they are set by `_references`."""
_OWN_FILES = {"README.md", MERGE, OLD_MERGE, REPORT, *PLOTS}


@dataclass(frozen=True)
class Merge:
    """A planned merge: created by `plan_merge`, executed by `merge`.

    settings: the method and its options. base, distill, align: the inputs. weights: key -> weights of distill and
    align. copied: path in the new directory -> the file to copy. changed: path -> JSON to write in place of the copy.
    scheduler: the input whose scheduler the new pipeline has, None if there is none. notes: for the user, one line
    each. force: merge although the bases seem to differ.
    """

    settings: Settings
    base: Weights
    distill: Weights
    align: Weights | LoRADelta
    weights: Mapping[str, tuple[float, float]]
    copied: Mapping[str, Path]
    changed: Mapping[str, Mapping[str, JSON]]
    scheduler: str | None
    notes: tuple[str, ...]
    force: bool

    @property
    def inputs(self) -> tuple[Weights | LoRADelta, ...]:
        """Base, distill, align."""
        return self.base, self.distill, self.align

    @property
    def nbytes(self) -> int:
        """Size of all tensors and files to write, in bytes."""
        return self.base.component.nbytes + sum(path.stat().st_size for path in self.copied.values())

    @property
    def slices(self) -> list[TensorSlice]:
        """The tensors to write, in the order in which they are stored in the base."""
        places = {key: (str(tensor.file), tensor.offset) for key, tensor in self.base.stored.items()}
        return sorted(self.base.component.slices, key=lambda tensor_slice: places.get(tensor_slice.spec.key, ("", 0)))


def plan_merge(
    base: Path | Origin,
    distill: Path | Origin,
    align: Path | Origin,
    settings: Settings = DSWM,
    *,
    force: bool = False,
    ignore_text_encoder: bool = False,
    references_of: Literal["align", "distill"] = "align",
) -> Merge:
    """Finds the models and checks that they have one base architecture and configuration. Reads headers only.

    Args:
      base, distill: directory of a model, or of a pipeline, whose transformer (UNet) is merged; all in one format.
      align: the same, or a LoRA file or its directory.
      settings: the method and its options.
      force: merge although configurations differ or the inputs seem to have different bases.
      ignore_text_encoder: leave out tensors of a LoRA that adapt a text encoder, which are an error otherwise.
      references_of: the model that was trained to attend to references as the merged one shall; without a pipeline,
        as a LoRA is, it attends as the base does.
    Raises: ClvrError or UsageError, one line that lists both sides, for models that cannot be merged.
    """
    of_base = open_weights("base", base)
    of_distill = open_tuned("distill", distill, of_base, force)
    of_align = open_align(align, of_base, force, ignore_text_encoder)
    weights = settings.weights(
        tensor_slice.spec.key for tensor_slice in of_base.component.slices if is_weight(tensor_slice)
    )
    root = of_base.origin.path
    copied = {
        path.as_posix(): root / path for path in files_beside(root, [of_base.directory]) if str(path) not in _OWN_FILES
    }
    notes = [*_notes_on_dtypes(of_base, of_distill, of_align)]
    scheduler = "base" if any(name.startswith("scheduler/") for name in copied) else None
    if scheduler and (other := _other_scheduler(of_base, of_distill)):
        kind, scheduler_files = other
        if kind is None:
            scheduler = "distill"
            copied = {
                name: path for name, path in copied.items() if not name.startswith("scheduler/")
            } | scheduler_files
            notes.append("the scheduler is that of distill, which differs from the base's")
        else:
            notes.append(f"distill has another kind of scheduler, {kind}; that of the base is kept")
    for name, path, note in _sampling(of_base, of_distill):
        if name in copied:
            copied[name] = path
            notes.append(note)
    attended: Weights | LoRADelta = of_align if references_of == "align" else of_distill
    if not _has_index(attended):  # a LoRA, or a transformer alone, attends as the base that it was tuned from
        attended = of_base
    changed = _references(copied, attended)
    if changed:
        notes.append(f"references are attended to as in {attended.role}: {_described(_reference_cache(attended))}")
    if attended is not of_distill and _has_index(attended) and _has_index(of_distill):
        mode, otherwise = _reference_cache(attended), _reference_cache(of_distill)
        if mode != otherwise:
            notes.append(
                f"distill was trained to attend to references otherwise ({_described(otherwise)}), which costs "
                f"accuracy; clvr train flux2_distill --reference-cache trains it as {attended.role}, or choose "
                "--references-of distill"
            )
    return Merge(settings, of_base, of_distill, of_align, weights, copied, changed, scheduler, tuple(notes), force)


def _notes_on_dtypes(*inputs: Weights | LoRADelta) -> Iterator[str]:
    base, *others = inputs
    for side in others:
        if side.dtypes != base.dtypes:
            yield f"{side.role} is in {', '.join(side.dtypes)}, the base in {', '.join(base.dtypes)}, and so the result"


def _other_scheduler(base: Weights, distill: Weights) -> tuple[str | None, dict[str, Path]] | None:
    """Returns None if the schedulers are equal, else distill's class if the classes differ, or None and its files."""
    ours, theirs = (side.origin.path / "scheduler" / "scheduler_config.json" for side in (base, distill))
    if not ours.exists() or not theirs.exists():
        return None
    configs = [read_json(path) for path in (ours, theirs)]
    kinds = [config.get("_class_name") for config in configs]
    if kinds[0] != kinds[1]:
        return str(kinds[1]), {}
    settings = [{name: value for name, value in config.items() if not name.startswith("_")} for config in configs]
    if settings[0] == settings[1]:
        return None
    return None, {f"scheduler/{path.name}": path for path in sorted(theirs.parent.iterdir()) if path.is_file()}


def _sampling(base: Weights, distill: Weights) -> Iterator[tuple[str, Path, str]]:
    """Yields name, file to copy and a note for each file whose sampling fields differ between distill and base.

    The file is distill's, unless the two differ in other fields too: then it is the base's.
    """
    for name, fields in _SAMPLING.items():
        ours, theirs = (side.origin.path / name for side in (base, distill))
        if not ours.exists() or not theirs.exists():
            continue
        (rest, own), (other_rest, other) = (_parted(read_json(path), fields) for path in (ours, theirs))
        if own == other:
            continue
        fields_of_distill = ", ".join(f"{field} {json.dumps(value)}" for field, value in other.items())
        if _parted(rest, _ATTENTION)[0] == _parted(other_rest, _ATTENTION)[0]:
            yield name, theirs, f"the sampling options are those of distill: {fields_of_distill}"
        else:
            note = f"{name} is the base's, because other fields differ too; sample as distill: {fields_of_distill}"
            yield name, ours, note


def _references(copied: Mapping[str, Path], model: Weights | LoRADelta) -> dict[str, dict[str, JSON]]:
    """Returns the files of the new pipeline that must say how a model was trained to attend to references."""
    index = copied.get("model_index.json")
    if index is None or not _has_index(model):
        return {}
    kind, mode = _reference_cache(model)
    own = copied.get("clvr.json")
    settings = {} if own is None else read_json(own)
    flux2 = settings.get("flux2", {})
    if not isinstance(flux2, Mapping) or (read_json(index).get("_class_name"), flux2.get(_MODE)) == (kind, mode):
        return {}
    changed = {"model_index.json": {**read_json(index), "_class_name": kind}}
    if mode is not None or _MODE in flux2:
        kept = {name: value for name, value in flux2.items() if name != _MODE}
        changed["clvr.json"] = {**settings, "flux2": kept if mode is None else {**kept, _MODE: mode}}
    return changed


def _has_index(model: Weights | LoRADelta) -> bool:
    """Whether a model is in a pipeline, which says how it attends to references."""
    return (model.origin.path / "model_index.json").exists()


def _reference_cache(model: Weights | LoRADelta) -> tuple[JSON, JSON]:
    """Returns the class of a model's pipeline and the field `reference_cache` of its clvr.json, None without one."""
    directory = model.origin.path
    settings = read_json(path) if (path := directory / "clvr.json").exists() else {}
    flux2 = settings.get("flux2", {})
    return read_json(directory / "model_index.json").get("_class_name"), (
        flux2.get(_MODE) if isinstance(flux2, Mapping) else None
    )


def _described(found: tuple[JSON, JSON]) -> str:
    kind, mode = found
    return f"{_MODE} {mode}" if mode is not None else str(kind)


def _parted(content: Mapping[str, JSON], fields: Sequence[str]) -> tuple[dict[str, JSON], dict[str, JSON]]:
    """Splits some fields, at any depth, from a JSON object. Returns: the rest, and these fields."""
    rest: dict[str, JSON] = {}
    own: dict[str, JSON] = {}
    for name, value in content.items():
        if name in fields:
            own[name] = value
        elif isinstance(value, Mapping):
            rest[name], inner = _parted(value, fields)
            own |= inner
        elif name != "_diffusers_version":
            rest[name] = value
    return rest, own
