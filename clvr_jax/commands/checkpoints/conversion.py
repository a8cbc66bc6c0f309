"""`clvr convert`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro

from clvr_jax.arguments import StoragePath
from clvr_jax.commands.common import Common, Flags, Result, prepare_jax
from clvr_jax.display.console import console, progress
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.bucket_results import check_new, result_directory
from clvr_jax.files.buckets.objects import has_entry
from clvr_jax.files.buckets.paths import is_bucket, storage_path
from clvr_jax.files.output_paths import check_directory

if TYPE_CHECKING:
    from clvr_jax.convert.streaming.planning import Conversion


@dataclass(frozen=True)
class Convert:
    """Converts a pipeline or model directory from PyTorch to JAX or back, one tensor at a time."""

    EXAMPLE: ClassVar = "clvr convert black-forest-labs/FLUX.2-klein-base-4B checkpoints/klein --to jax"

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Convert this source: a directory in diffusers or transformers layout with safetensors, one that was converted to
    JAX, a single file of FLUX.2, a Hugging Face id (org/name or org/name@revision), or the directory of a training run.
    Directories may be in a bucket, such as gs://NAME/PREFIX; a model is copied from there first."""
    destination: Annotated[StoragePath, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Write to this new directory, which appears only when it is complete. It may be in a bucket as well; then it is
    made on this machine first."""
    to: Literal["jax", "torch"]
    """Format to write. jax: Orbax. torch: safetensors that diffusers and transformers load."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Convert floating-point tensors to this dtype; each keeps its own, bit for bit, if not given."""
    variant: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Read this variant of the files in the source, such as fp16; the files without a variant if not given."""
    dry_run: bool = False
    """Print what would be written, and write nothing."""
    resume: bool = False
    """Resume an interrupted conversion."""
    verify: bool = False
    """After the conversion, run every model in PyTorch and in JAX and compare the outputs; it takes 4 bytes of memory
    for each parameter of the largest model."""
    common: Flags = field(default_factory=Common)

    def run(self) -> Result:
        """Plans the conversion, and converts unless it is a dry run."""
        from clvr_jax.convert.hub import local_directory, model_files
        from clvr_jax.convert.streaming.planning import plan
        from clvr_jax.convert.streaming.report import conversion_table, tensor_list

        if not self.dry_run:  # before anything is downloaded
            check_new(self.destination)
            check_directory(self.destination)
        prepare_jax()
        if self.verify:
            from clvr_jax.convert.verify import check_torch

            check_torch()  # before the conversion, which takes minutes
        if is_bucket(self.source) and has_entry(storage_path(self.source) / "recipe.json"):
            return self._export(storage_path(self.source))
        source = local_directory(self.source, allow_patterns=model_files(self.variant))
        if (source / "checkpoints").is_dir():
            return self._export(source)
        conversion = plan(source, self.to, self.dtype, self.variant)
        data: dict[str, object] = {
            "source": self.source,
            "to": self.to,
            "tensors": conversion.tensors,
            "bytes": conversion.nbytes,
        }
        if self.dry_run:
            return Result({**data, "plan": tensor_list(conversion)}, conversion_table(conversion))
        card = self._card(source, conversion)
        with result_directory(self.destination) as destination:
            return self._converted(data, source, conversion, destination, card)

    def _converted(
        self, data: dict[str, object], source: Path, conversion: "Conversion", destination: Path, card: str
    ) -> Result:
        """Converts into a directory of this machine, and compares the models if that is asked for."""
        from clvr_jax.convert.streaming.conversion import convert

        with progress(f"{self.source} to {self.to}", conversion.tensors) as advance:
            count = 0

            def on_tensor(name: str) -> None:
                nonlocal count
                count += 1
                advance(count, name)

            not_finite = convert(conversion, destination, card=card, resume=self.resume, on_tensor=on_tensor)
        for name in not_finite:
            console.print(f"[yellow]warning:[/] {name} contains NaN", highlight=False)
        for name, kind in conversion.without_module.items():
            console.print(f"[yellow]note:[/] {name}/ was copied unchanged: there is no JAX module for a {kind}")
        data |= {"out": str(self.destination), "nan": not_finite, "copied": dict(conversion.without_module)}
        return self._verified(data, source, destination) if self.verify else Result(data, str(self.destination))

    def _export(self, run: Path) -> Result:
        """Exports the newest checkpoint of a training run."""
        from clvr_jax.training.recipes import export_run

        if self.to != "torch" or self.dry_run or self.dtype or self.verify:
            raise UsageError(
                f"{run}: a training run is exported with --to torch and no other option; convert the export then"
            )
        with console.status(f"exporting {run}"), result_directory(self.destination) as destination:
            step = export_run(run, destination)
        data = {"source": str(run), "to": self.to, "step": step, "out": str(self.destination)}
        return Result(data, str(self.destination))

    def _card(self, source: Path, conversion: "Conversion") -> str:
        """Returns the model card, and prints a note if the license is non-commercial."""
        from importlib.metadata import version

        from clvr_jax.convert.model_card import Provenance, license_of_all, model_card

        terms = license_of_all(conversion.models)
        if terms.commercial is False:
            console.print(f"[yellow]license:[/] {terms.notice}", highlight=False)
        options = [f"--{name} {value}" for name in ("dtype", "variant") if (value := getattr(self, name))]
        command = " ".join(["clvr convert", self.source, str(self.destination), f"--to {self.to}", *options])
        is_path = is_bucket(self.source) or Path(self.source).expanduser().exists()
        revision = None if is_path else source.name
        provenance = Provenance(self.source, command, version("clvr-jax"), self.to, revision, self.dtype)
        return model_card(self.destination.name, provenance, conversion.models)

    def _verified(self, data: dict[str, object], source: Path, destination: Path) -> Result:
        """Compares the outputs of the converted models in PyTorch and in JAX."""
        from clvr_jax.convert.verify import agreement_list, agreement_table, verify

        torch_directory = destination if self.to == "torch" else source
        jax_directory = destination if self.to == "jax" or source.is_file() else source
        with console.status("running both frameworks") as status:
            agreements = verify(
                torch_directory,
                jax_directory,
                dtype=self.dtype,
                variant=self.variant,
                on_model=lambda name: status.update(f"comparing {name}"),
            )
        different = [agreement.component for agreement in agreements if not agreement.agrees]
        if different:
            console.print(agreement_table(agreements))
            raise ClvrError(f"{self.destination}: PyTorch and JAX disagree on {', '.join(different)}")
        return Result({**data, "verified": agreement_list(agreements)}, agreement_table(agreements))
