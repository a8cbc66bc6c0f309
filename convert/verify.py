"""Does a converted model compute what PyTorch computes? Every model is run once in both frameworks to see.

PyTorch is imported only here, inside functions: nothing else of the package needs it.
"""

import gc
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clvr_jax.convert.architectures import Architecture
from clvr_jax.convert.models import load_model
from clvr_jax.convert.planning import plan
from clvr_jax.convert.probes import PROBES, Inputs
from clvr_jax.convert.tensors import DIFFUSERS_NAME, FLOATS, model_file
from flax import nnx
from jax.sharding import SingleDeviceSharding
from rich.table import Table

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files import read_json

TOLERANCE = 2e-5
"""Largest relative difference that float32 and another order of summation explain."""

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """How far apart the outputs of one model are in the two frameworks; NaN where either has a NaN.

    component: folder of the model in its pipeline, or its own name. title: the architecture, for people.
    outputs: name -> max |ours - theirs| / max |theirs| of that output. largest: max |ours - theirs| over all outputs.
    """

    component: str
    title: str
    outputs: Mapping[str, float]
    largest: float

    @property
    def relative(self) -> float:
        """The worst relative difference of an output."""
        return float(np.max(list(self.outputs.values())))

    @property
    def apart(self) -> list[str]:
        """The outputs that are not within `TOLERANCE`; a NaN is not."""
        return [name for name, relative in self.outputs.items() if not relative <= TOLERANCE]

    @property
    def agrees(self) -> bool:
        """Whether all outputs are within `TOLERANCE`."""
        return not self.apart


def check_torch() -> None:
    """Raises ClvrError, one line, unless PyTorch and its model libraries are installed."""
    missing = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ClvrError(f"verification runs PyTorch, but {missing[0]} is not installed: pip install 'clvr-jax[torch]'")


def verify(
    torch_folder: Path,
    jax_folder: Path,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    on_model: Callable[[str], None] | None = None,
) -> list[Agreement]:
    """Runs every model of a pipeline or model folder in PyTorch and here, on the same random inputs.

    Both run in float32 on the CPU, one framework's copy of one model at a time: the memory that it takes is 4 bytes a
    parameter of the largest model, and some for reading it (6 bytes with `dtype`).

    Args:
      torch_folder: in the format of PyTorch.
      jax_folder: its conversion, or what it was converted from; PyTorch's format is read too, the same folder even.
      dtype: what a conversion cast to, "bfloat16" say: both sides are rounded to it before they compute.
      variant: which of several sets of files, see `model_file`.
      on_model: called with the name of each model before it is run.
    Returns: one Agreement for each model, in the order of their names.
    Raises: ClvrError if PyTorch is not installed, a folder is not complete or the two are not of the same models;
      UsageError if torch_folder is not in the format of PyTorch.
    """
    check_torch()
    components = plan(torch_folder, "jax", "float32", variant).components if torch_folder.is_dir() else ()
    if not components or any(component.source != "torch" for component in components):
        raise UsageError(f"{torch_folder}: is no folder that PyTorch reads; give one with config.json and safetensors")
    agreements = []
    for component in components:
        architecture, theirs_in, ours_in = (
            component.architecture,
            torch_folder / component.name,
            jax_folder / component.name,
        )
        name = theirs_in.absolute().name
        if on_model is not None:
            on_model(name)
        config, other = (
            architecture.config_from_dict(read_json(path / "config.json")) for path in (theirs_in, ours_in)
        )
        if config != other:
            raise ClvrError(f"{ours_in}: its config.json is of another model than that of {theirs_in}")
        inputs = PROBES[architecture].inputs(config, np.random.default_rng(0))
        theirs = _their_outputs(theirs_in, architecture, inputs, dtype, variant)
        gc.collect()  # PyTorch's modules refer to themselves and would stay
        ours = _our_outputs(ours_in, architecture, inputs, dtype, variant)
        agreements.append(compare(name, architecture.title, ours, theirs))
    return agreements


def compare(component: str, title: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Agreement:
    """Measures how far apart outputs of the same names and shapes are."""
    differences, outputs = [], {}
    for name, expected in theirs.items():
        found, expected = np.asarray(ours[name], np.float64), np.asarray(expected, np.float64)
        assert found.shape == expected.shape, f"{name}: {found.shape} against {expected.shape}"
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = np.abs(found - expected).max()
            outputs[name] = float(difference / np.abs(expected).max()) if difference else 0.0
        differences.append(difference)
    return Agreement(component, title, outputs, float(np.max(differences)))


def _their_outputs(
    folder: Path, architecture: Architecture, inputs: Inputs, dtype: str | None, variant: str | None
) -> Outputs:
    import torch

    library = importlib.import_module("diffusers" if architecture.file_name == DIFFUSERS_NAME else "transformers")
    # Of a pipeline not every model has the variant, and PyTorch does not look further.
    found = variant if f".{variant}." in model_file(folder, variant).name else None
    tensors = {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in inputs.items()}
    with _silent_libraries(), torch.no_grad():
        reads: Any = getattr(library, architecture.torch_class).from_pretrained
        model = reads(folder, dtype=torch.float32, variant=found, use_safetensors=True, local_files_only=True).eval()
        for tensor in model.state_dict().values() if dtype else ():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(getattr(torch, str(dtype))))
        return {name: tensor.numpy() for name, tensor in PROBES[architecture].theirs(model, tensors).items()}


def _our_outputs(
    folder: Path, architecture: Architecture, inputs: Inputs, dtype: str | None, variant: str | None
) -> Outputs:
    config = read_json(folder / "config.json")
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: architecture.make(config)))
    cpu = SingleDeviceSharding(jax.devices("cpu")[0])  # accelerators shorten float32 in products of matrices
    shardings = jax.tree.map(lambda _: cpu, abstract)
    stored = nnx.state(load_model(folder, architecture, FLOATS[dtype or "float32"], shardings, variant))
    state = jax.tree.map(_in_float32, stored)
    del stored
    answers = jax.jit(lambda state: PROBES[architecture].ours(nnx.merge(graphdef, state), inputs))(state)
    return {name: np.asarray(array) for name, array in answers.items()}


def _in_float32(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Keeps the advice and the progress bars of diffusers and transformers off the terminal, and of nobody else."""
    loggers = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    before = [(logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
            logger.disable_progress_bar()
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, (verbosity, has_bar) in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
            if has_bar:
                logger.enable_progress_bar()


def agreement_table(agreements: Sequence[Agreement]) -> Table:
    """One row for each model that was run in both frameworks."""
    caption = f"agree: at most {TOLERANCE:g} of the largest value of an output, in float32"
    table = Table("model", "architecture", title="our outputs and PyTorch's", caption=caption)
    for column in ("largest difference", "relative"):
        table.add_column(column, justify="right")
    table.add_column("")
    for agreement in agreements:
        apart = ", ".join(agreement.apart)
        verdict, style = (f"differ: {apart}", "red") if apart else ("agree", None)
        numbers = f"{agreement.largest:.2g}", f"{agreement.relative:.2g}"
        table.add_row(agreement.component, agreement.title, *numbers, verdict, style=style)
    return table


def agreement_list(agreements: Sequence[Agreement]) -> list[dict[str, Any]]:
    """The same for scripts; null for a difference that is no number, because JSON has no NaN."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return [
        {
            "model": agreement.component,
            "architecture": agreement.title,
            "largest": number(agreement.largest),
            "relative": number(agreement.relative),
            "outputs": {name: number(relative) for name, relative in agreement.outputs.items()},
            "agrees": agreement.agrees,
        }
        for agreement in agreements
    ]
