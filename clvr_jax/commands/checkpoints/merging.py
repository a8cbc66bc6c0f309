"""`clvr merge`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from clvr_jax.arguments import StoragePath, check_seed
from clvr_jax.commands.common import Common, Flags, Result, prepare_jax
from clvr_jax.display.console import console, progress
from clvr_jax.errors import UsageError
from clvr_jax.files.bucket_results import check_new, result_directory
from clvr_jax.files.buckets.paths import is_bucket
from clvr_jax.files.output_paths import check_directory

if TYPE_CHECKING:
    from clvr_jax.merging.norms import DeltaStatistics
    from clvr_jax.merging.planning import Merge as Planned
    from clvr_jax.merging.sources import Origin

_Model = Annotated[str, tyro.conf.arg(metavar="DIR")]
_Weight = Annotated[tuple[str, ...], tyro.conf.arg(metavar="W|PATTERN=W")]


@dataclass(frozen=True)
class Merge:
    """Merges models by adding the weight deltas of distillation and alignment to a base (DSWM), tensor by tensor."""

    EXAMPLE: ClassVar = "clvr merge --base klein-base --distill klein --align runs/pprl/lora --out klein-clvr"

    base: _Model
    """Base model: a pipeline or model directory with safetensors or converted to JAX, or a Hugging Face id
    (org/name@revision). In a pipeline the transformer is merged, and everything else is copied from here."""
    distill: _Model
    """Model that was distilled from the base, in the same forms. If it has a scheduler of its own, the merged model
    gets it."""
    align: _Model
    """Model that was aligned from the base, in the same forms, or its LoRA, DoRA, LoHa or LoKr: a file or directory in
    the format of diffusers, PEFT, kohya, ai-toolkit or LyCORIS."""
    out: StoragePath
    """Write to this new directory, which appears only when it is complete. It may be in a bucket (gs://NAME/PREFIX);
    then it is made on this machine first."""
    distill_weight: _Weight = ("1",)
    """Weight of the distillation delta: a number for all tensors, or PATTERN=NUMBER for the tensors whose key contains
    a match of the regular expression. Several may be given; the first match counts, and a plain number is for the rest.
    """
    align_weight: _Weight = ("1",)
    """Weight of the alignment delta, in the same forms."""
    method: Literal["dswm", "linear", "ties", "dare"] = "dswm"
    """How the deltas are combined. dswm adds both. For comparison: linear averages the two models, ties is arXiv
    2306.01708, and dare is arXiv 2311.03099."""
    density: Annotated[float | None, tyro.conf.arg(metavar="D")] = None
    """Fraction of each delta that ties (0.2 if not given) or dare (0.1 if not given) keeps."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of the random choice of dare."""
    report: bool = False
    """Write report.json as well, with the norms of both deltas and their cosine for each tensor and layer, and plots if
    matplotlib is installed."""
    force: bool = False
    """Merge even if the inputs seem to be tuned from different bases, or have different settings."""
    ignore_text_encoder: bool = False
    """Leave out the tensors of a LoRA that adapt a text encoder; the merged model keeps the base's text encoder."""
    references_of: Literal["align", "distill"] = "align"
    """Attend to references as this model was trained to, if the two differ in their reference_cache. One without a
    pipeline, such as a LoRA, attends as the base does."""
    dry_run: bool = False
    """Print what would be written, and write nothing."""
    resume: bool = False
    """Resume an interrupted merge."""
    common: Flags = field(default_factory=Common)

    def run(self) -> Result:
        """Plans the merge, and merges unless it is a dry run."""
        weights = (
            parse_weight("--distill-weight", self.distill_weight),
            parse_weight("--align-weight", self.align_weight),
        )
        check_seed(self.seed)
        if not self.dry_run:  # before anything is downloaded
            check_new(self.out)
            check_directory(self.out)
        from clvr_jax.convert.lora.config import PEFT_NAME
        from clvr_jax.convert.lora.files import FILE_NAME
        from clvr_jax.merging.methods import Settings
        from clvr_jax.merging.planning import plan_merge
        from clvr_jax.merging.report import plan_list, plan_table
        from clvr_jax.merging.streaming import merge

        prepare_jax()
        settings = Settings(self.method, *weights, self.density, self.seed)
        origins = _origin(self.base), _origin(self.distill, ()), _origin(self.align, (FILE_NAME, PEFT_NAME))
        plan = plan_merge(
            *origins,
            settings,
            force=self.force,
            ignore_text_encoder=self.ignore_text_encoder,
            references_of=self.references_of,
        )
        for note in plan.notes:
            console.print(f"[yellow]note:[/] {note}")
        tensors = len(plan.base.component.slices)
        data: dict[str, object] = {
            "method": self.method,
            "inputs": {"base": self.base, "distill": self.distill, "align": self.align},
            "tensors": tensors,
            "bytes": plan.nbytes,
            "notes": list(plan.notes),
        }
        if self.dry_run:
            return Result({**data, "plan": plan_list(plan), "copied": list(plan.copied)}, plan_table(plan))
        if self.report:
            _note_missing_plots()
        with result_directory(self.out) as out, progress(f"merging into {self.out}", tensors) as advance:
            count = 0

            def on_tensor(name: str) -> None:
                nonlocal count
                count += 1
                advance(count, name)

            sums = merge(
                plan,
                out,
                resume=self.resume,
                on_tensor=on_tensor,
                finish=lambda directory, sums: self._finish(plan, directory, sums),
            )
        return self._result(data, sums)

    def _finish(self, plan: "Planned", directory: Path, sums: Mapping[str, "DeltaStatistics"]) -> None:
        """Writes merge.json, model card and report; prints a warning for a non-commercial license."""
        from clvr_jax.convert.model_card import license_of_all, models_in
        from clvr_jax.merging.provenance import write_provenance
        from clvr_jax.merging.report import write_report

        terms = license_of_all(models_in(directory))
        if terms.commercial is False:
            console.print(f"[yellow]license:[/] {terms.notice}", highlight=False)
        write_provenance(plan, directory, self.out.name, self._command(), sums)
        if self.report:
            write_report(directory, sums)

    def _command(self) -> str:
        defaults = {
            "distill_weight": ("1",),
            "align_weight": ("1",),
            "method": "dswm",
            "density": None,
            "seed": 0,
            "references_of": "align",
        }
        words = [f"clvr merge --base {self.base} --distill {self.distill} --align {self.align}"]
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                listed = " ".join(value) if isinstance(value, tuple) else value
                words.append(f"--{name.replace('_', '-')} {listed}")
        if self.ignore_text_encoder:
            words.append("--ignore-text-encoder")
        return " ".join([*words, f"--out {self.out}"])

    def _result(self, data: dict[str, object], sums: Mapping[str, "DeltaStatistics"]) -> Result:
        from clvr_jax.merging.norms import total
        from clvr_jax.merging.report import report_table

        data |= {"out": str(self.out), "norms": total(sums.values()).to_json()}
        return Result(data, report_table(sums) if self.report else str(self.out))


def parse_weight(option: str, given: tuple[str, ...]) -> float | dict[str, float]:
    """Parses weights: ("0.5",) is one number for all tensors, ("attn=0.5", "0") is {"attn": 0.5, "": 0}.

    The pattern "" matches every key.
    Raises: UsageError for a word that is neither a number nor PATTERN=NUMBER, a pattern that is not a regular
      expression, and a pattern with two weights.
    """
    weights: dict[str, float] = {}
    for word in given:
        pattern, _, number = word.rpartition("=")
        try:
            re.compile(pattern)
            weight = float(number)
        except (re.error, ValueError) as error:
            raise UsageError(f"{option}: {word!r} is neither a number nor PATTERN=NUMBER ({error})") from error
        if pattern in weights:
            raise UsageError(
                f"{option}: {pattern!r} has two weights" if pattern else f"{option}: has two numbers for all"
            )
        weights[pattern] = weight
    if not weights:
        raise UsageError(f"{option}: give a number, or PATTERN=NUMBER")
    if "" in weights:
        weights[""] = weights.pop("")  # the last one, for keys that no other pattern matches
    return weights[""] if list(weights) == [""] else weights


def _origin(source: str, also: tuple[str, ...] | None = None) -> "Origin":
    """Returns the directory of a path or a Hugging Face id.

    With `also`, only transformer, scheduler and these files are downloaded.
    """
    from clvr_jax.convert.hub import local_directory, model_files
    from clvr_jax.merging.sources import GENERATORS, Origin

    patterns = model_files()
    if also is not None:
        own = [pattern.replace("*/", f"{name}/") for pattern in patterns for name in GENERATORS]
        patterns = (*dict.fromkeys(own), *also)
    path = local_directory(source, allow_patterns=patterns)
    is_path = is_bucket(source) or Path(source).expanduser().exists()
    return Origin(source, path, None if is_path else path.name)


def _note_missing_plots() -> None:
    from clvr_jax.display.plots import can_plot

    if not can_plot():
        console.print(
            "[yellow]note:[/] no plots, only report.json: matplotlib is not installed (pip install matplotlib)"
        )
