"""Helpers of the parity tests: PyTorch modules with random weights, and the distance that the design asks for."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from clvr_jax.convert.rules import KeyMapping, state_from_torch

TOLERANCE = 2e-5


def relative_error(ours: Any, reference: Any) -> float:
    """max |ours - reference| / max |reference|; shapes must agree."""
    if isinstance(reference, torch.Tensor):
        reference = reference.detach().float().numpy()
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, f"{ours.shape} against {reference.shape}"
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def run_jitted(function: Callable[..., Any], model: nnx.Module, *arrays: Any) -> Any:
    """Returns function(model, *arrays), as one program; without `jax.jit` every operation would be one."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, *arrays: function(nnx.merge(graphdef, state), *arrays))(state, *arrays)


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter and statistic values that make a mistake visible: no zeros, no ones, no two alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
            if not parameter.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("running_var"):
                parameter.copy_(0.5 + noise.abs())
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (0.0 if name.endswith(("bias", "running_mean")) else 1.0))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(noise / fan_in**0.5)
    return module.eval()


def load_tensors(model: nnx.Module, tensors: dict[str, np.ndarray], key_mapping: KeyMapping) -> None:
    """Fills a module, of which shapes are enough, with PyTorch tensors, through the key mapping.

    `jnp.asarray` would compile a program for each shape. `device_put` may share memory, so it is given a copy.
    """
    state = state_from_torch(tensors, nnx.state(model), key_mapping)
    nnx.update(model, jax.tree.map(lambda leaf: jax.device_put(np.array(leaf)), state))


def load_state(model: nnx.Module, reference: torch.nn.Module, key_mapping: KeyMapping) -> None:
    """Copies the weights of a PyTorch module into ours; see `load_tensors`."""
    load_tensors(model, {key: tensor.numpy() for key, tensor in reference.state_dict().items()}, key_mapping)
