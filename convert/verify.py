"""The verification of a conversion: every model runs once in both frameworks, and the outputs are compared.

PyTorch is imported only here, inside functions: nothing else in the package needs it.
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

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding
from rich.table import Table

from clvr_jax.checkpoint_io.tensors import DIFFUSERS_NAME, FLOATS, model_file
from clvr_jax.convert.architectures import Architecture
from clvr_jax.convert.models import load_model
from clvr_jax.convert.probes import PROBES, Inputs
from clvr_jax.convert.streaming.planning import plan
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import read_json
from clvr_jax.files.json_input import JSON

TOLERANCE = 2e-5
"""Largest relative difference that results from float32 and another order of summation."""

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Agreement:
    """The differences between the outputs of one model in JAX and PyTorch; NaN where either has a NaN.

    component: directory of the model in its pipeline, or its own name. title: name of the architecture.
    outputs: name -> max |JAX - PyTorch| / max |PyTorch| of that output. largest: max |JAX - PyTorch| over all outputs.
    """

    component: str
    title: str
    outputs: Mapping[str, float]
    largest: float

    @property
    def relative(self) -> float:
        """The largest relative difference of an output."""
        return float(np.max(list(self.outputs.values())))

    @property
    def differing(self) -> list[str]:
        """The outputs whose relative difference is above `TOLERANCE` or NaN."""
        return [name for name, relative in self.outputs.items() if not relative <= TOLERANCE]

    @property
    def agrees(self) -> bool:
        """True if all outputs are within `TOLERANCE`."""
        return not self.differing


def check_torch() -> None:
    """Raises ClvrError, one line, unless PyTorch and its model libraries are installed."""
    missing = [name for name in ("torch", "diffusers", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ClvrError(f"verification runs PyTorch, but {missing[0]} is not installed: pip install 'clvr-jax[torch]'")


def verify(
    torch_directory: Path,
    jax_directory: Path,
    *,
    dtype: str | None = None,
    variant: str | None = None,
    on_model: Callable[[str], None] | None = None,
) -> list[Agreement]:
    """Runs every model of a pipeline or model directory in PyTorch and in JAX, on the same random inputs.

    Both run in float32 on the CPU, one framework's copy of one model at a time: the required memory is 4 bytes per
    parameter of the largest model, and some for loading it (6 bytes with `dtype`).

    Args:
      torch_directory: in the format of PyTorch.
      jax_directory: its conversion or its source; it may also be in PyTorch's format, or the same directory.
      dtype: dtype of the conversion, for example "bfloat16": the weights of both models are rounded to it.
      variant: which of several sets of files; see `model_file`.
      on_model: called with the name of each model before it runs.
    Returns: one Agreement per model, in the order of the models' names.
    Raises: ClvrError if PyTorch is not installed, a directory is incomplete or the two contain different models;
      UsageError if torch_directory is not in the format of PyTorch.
    """
    check_torch()
    components = plan(torch_directory, "jax", "float32", variant).components if torch_directory.is_dir() else ()
    if not components or any(component.source != "torch" for component in components):
        raise UsageError(
            f"{torch_directory}: is not a directory that PyTorch reads; give one with config.json and safetensors"
        )
    agreements = []
    for component in components:
        architecture = component.architecture
        torch_model, jax_model = torch_directory / component.name, jax_directory / component.name
        name = torch_model.absolute().name
        if on_model is not None:
            on_model(name)
        config, other = (
            architecture.config_from_dict(read_json(path / "config.json")) for path in (torch_model, jax_model)
        )
        if config != other:
            raise ClvrError(f"{jax_model}: its config.json describes another model than that of {torch_model}")
        inputs = PROBES[architecture].inputs(config, np.random.default_rng(0))
        theirs = _torch_outputs(torch_model, architecture, inputs, dtype, variant)
        gc.collect()  # PyTorch's modules have reference cycles and would stay in memory
        ours = _jax_outputs(jax_model, architecture, inputs, dtype, variant)
        agreements.append(compare(name, architecture.title, ours, theirs))
    return agreements


def compare(component: str, title: str, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> Agreement:
    """Returns the differences between our outputs and PyTorch's of the same names and shapes."""
    differences, outputs = [], {}
    for name, expected in theirs.items():
        found, expected = np.asarray(ours[name], np.float64), np.asarray(expected, np.float64)
        assert found.shape == expected.shape, f"{name}: {found.shape} against {expected.shape}"
        with np.errstate(divide="ignore", invalid="ignore"):
            difference = np.abs(found - expected).max()
            outputs[name] = float(difference / np.abs(expected).max()) if difference else 0.0
        differences.append(difference)
    return Agreement(component, title, outputs, float(np.max(differences)))


def _torch_outputs(
    directory: Path, architecture: Architecture, inputs: Inputs, dtype: str | None, variant: str | None
) -> Outputs:
    import torch

    library = importlib.import_module("diffusers" if architecture.file_name == DIFFUSERS_NAME else "transformers")
    # Not every model of a pipeline has the variant, and PyTorch does not fall back to the plain files.
    found = variant if f".{variant}." in model_file(directory, variant).name else None
    tensors = {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in inputs.items()}
    with _silent_libraries(), torch.no_grad():
        reads = getattr(library, architecture.torch_class).from_pretrained
        model = reads(directory, dtype=torch.float32, variant=found, use_safetensors=True, local_files_only=True).eval()
        for tensor in model.state_dict().values() if dtype else ():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(getattr(torch, str(dtype))))
        return {name: tensor.numpy() for name, tensor in PROBES[architecture].run_torch(model, tensors).items()}


def _jax_outputs(
    directory: Path, architecture: Architecture, inputs: Inputs, dtype: str | None, variant: str | None
) -> Outputs:
    config = read_json(directory / "config.json")
    graphdef, abstract = architecture.split(config)
    cpu = SingleDeviceSharding(jax.devices("cpu")[0])  # accelerators reduce the precision of float32 matmuls
    shardings = jax.tree.map(lambda _: cpu, abstract)
    stored = nnx.state(load_model(directory, architecture, FLOATS[dtype or "float32"], shardings, variant))
    state = jax.tree.map(_in_float32, stored)
    del stored
    outputs = jax.jit(lambda state: PROBES[architecture].run_jax(nnx.merge(graphdef, state), inputs))(state)
    return {name: np.asarray(array) for name, array in outputs.items()}


def _in_float32(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Suppresses the messages and progress bars of diffusers and transformers only."""
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
    """Returns a table with one row per model that was run in both frameworks."""
    caption = f"agree: at most {TOLERANCE:g} of the largest value of an output, in float32"
    table = Table("model", "architecture", title="our outputs and PyTorch's", caption=caption)
    for column in ("largest difference", "relative"):
        table.add_column(column, justify="right")
    table.add_column("")
    for agreement in agreements:
        differing = ", ".join(agreement.differing)
        verdict, style = (f"differ: {differing}", "red") if differing else ("agree", None)
        numbers = f"{agreement.largest:.2g}", f"{agreement.relative:.2g}"
        table.add_row(agreement.component, agreement.title, *numbers, verdict, style=style)
    return table


def agreement_list(agreements: Sequence[Agreement]) -> list[dict[str, JSON]]:
    """Returns the differences for JSON; null in place of a NaN, which JSON does not have."""

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
