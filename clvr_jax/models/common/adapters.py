"""Adapters whose delta is not one product of two factors: LoHa, LoKr, LoRA with a core tensor, and DoRA of each.

A LoRA tree holds a `KernelAdapter` in the place of a `LoRAPair` at a kernel with such an adapter. These are read and
merged, never trained. The delta is computed when it is needed, so that only the small tensors of the file are held.

Source: the arithmetic of PEFT and of LyCORIS (arXiv 2309.14859), which give the same result; DoRA (arXiv 2402.09353).
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import ModuleType
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from clvr_jax.models.common.lora import LoRAPair

NumPyOrJax: TypeAlias = np.ndarray | jax.Array
ArrayModule: TypeAlias = ModuleType
"""`numpy` or `jax.numpy`, two modules without a common type."""

MAGNITUDE = "dora_scale"
_TO_KERNEL = {2: (1, 0), 4: (2, 3, 1, 0)}  # axes of a PyTorch weight -> those of a kernel
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("tensors",),
    meta_fields=("shape", "scale", "rows", "swapped", "magnitude_axis"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class WeightAdapter:
    """The adapter of one PyTorch weight.

    tensors: by LyCORIS' names: lora_down, lora_up and lora_mid; hada_w1_a to hada_w2_b, hada_t1 and hada_t2; lokr_w1,
      lokr_w2, their factors _a and _b, and lokr_t2; and dora_scale, the magnitudes of DoRA.
    shape: of the weight in the adapter's own code, which fuses some weights: (out, in) or (out, in, height, width).
    scale: factor of the product.
    rows: the first row of this weight in the fused one, and the row after its last.
    swapped: whether the two halves of the rows are exchanged in the adapter's own code.
    magnitude_axis: axis of dora_scale, 0 for a magnitude of each output and 1 for one of each input.
    """

    tensors: Mapping[str, NumPyOrJax]
    shape: tuple[int, ...]
    scale: float
    rows: tuple[int, int]
    swapped: bool = False
    magnitude_axis: int = 0

    def delta(self, weight: NumPyOrJax) -> NumPyOrJax:
        """Returns the difference that the adapter makes to a weight, in float32.

        Args:
          weight: PyTorch weight of the base model, (out, in) or (out, in, height, width), in float32; DoRA needs its
            values. With a NumPy array the computation runs in NumPy, on the host.
        """
        xp: ArrayModule = np if isinstance(weight, np.ndarray) else jnp
        tensors = {name: xp.asarray(tensor).astype(np.float32) for name, tensor in self.tensors.items()}
        # Full precision: the default of a TPU would round the factors to bfloat16.
        with jax.default_matmul_precision("highest"):
            delta = np.float32(self.scale) * adapter_product(tensors, xp).reshape(self.shape)
        if self.swapped:
            delta = xp.concatenate([delta[len(delta) // 2 :], delta[: len(delta) // 2]])
        delta = delta[slice(*self.rows)]
        if MAGNITUDE not in tensors:
            return delta
        tuned = weight + delta
        axes = tuple(axis for axis in range(tuned.ndim) if axis != self.magnitude_axis)
        norms = xp.sqrt(xp.sum(xp.square(tuned), axis=axes, keepdims=True))
        # A row of zeros has no direction, and stays zero.
        out: NumPyOrJax = tuned * (tensors[MAGNITUDE].reshape(norms.shape) / xp.where(norms > 0, norms, 1)) - weight
        return out


@functools.partial(jax.tree_util.register_dataclass, data_fields=("layers",), meta_fields=("stacked",))
@dataclasses.dataclass(frozen=True, eq=False)
class KernelAdapter:
    """The adapters of one kernel.

    layers: one adapter for each layer of a stack, None for a layer that is not adapted; one for other kernels.
    stacked: whether the kernel is a stack.
    """

    layers: tuple[WeightAdapter | None, ...]
    stacked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        layer = next(layer for layer in self.layers if layer is not None)
        weight = (layer.rows[1] - layer.rows[0], *layer.shape[1:])
        kernel = tuple(weight[axis] for axis in _TO_KERNEL[len(weight)])
        return (len(self.layers), *kernel) if self.stacked else kernel

    def delta(self, kernel: NumPyOrJax) -> Float32[Array, "..."]:
        """Returns the difference that the adapters make to a kernel, in float32 and of its shape."""
        kernel = jnp.asarray(kernel, jnp.float32)
        if not self.stacked:
            return jnp.asarray(self.layer_delta(None, kernel))
        return jnp.stack([self.layer_delta(layer, kernel[layer]) for layer in range(len(self.layers))])

    def layer_delta(self, layer: int | None, kernel: NumPyOrJax) -> NumPyOrJax:
        """Returns the difference to the kernel of one layer (None for a kernel that is no stack), in float32.

        Args:
          layer: index in the stack.
          kernel: kernel of this layer, in float32. With a NumPy array the computation runs in NumPy, on the host.
        """
        adapter = self.layers[layer or 0]
        if adapter is None:
            return 0 * kernel
        delta = adapter.delta(kernel.transpose(_TO_TORCH[kernel.ndim]))
        return delta.transpose(_TO_KERNEL[delta.ndim])


def is_adapter(node: object) -> bool:
    """Returns whether a node is the adapter of one kernel: `is_leaf` for functions over LoRA trees that were read."""
    return isinstance(node, LoRAPair | KernelAdapter)


def kernel_delta(adapter: LoRAPair | KernelAdapter, kernel: NumPyOrJax) -> Float32[Array, "..."]:
    """Returns the difference that an adapter makes to a kernel, in float32; a `LoRAPair` does not read the kernel."""
    return adapter.product() if isinstance(adapter, LoRAPair) else adapter.delta(kernel)


def adapter_product(tensors: Mapping[str, NumPyOrJax], xp: ArrayModule = jnp) -> NumPyOrJax:
    """Returns the product of an adapter's tensors, without scale, as (out, -1) or with the axes of a convolution.

    Args:
      tensors: see `WeightAdapter`; all have one dtype.
      xp: the array module, `numpy` or `jax.numpy`.
    """
    product: NumPyOrJax
    if "hada_w1_a" in tensors:
        return _product(tensors, "hada_w1", "hada_t1", xp) * _product(tensors, "hada_w2", "hada_t2", xp)
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        left = _product(tensors, "lokr_w1", "", xp)
        right = _product(tensors, "lokr_w2", "lokr_t2", xp)
        # The last axes of a convolution's weight are its window, so one product of matrices computes both kinds.
        product = xp.kron(left, right.reshape(len(right), -1))
        return product
    down, up = tensors["lora_down"], tensors["lora_up"]
    up, flat = up.reshape(len(up), -1), down.reshape(len(down), -1)
    if "lora_mid" in tensors:
        product = xp.einsum("ijhw,oi,jk->okhw", tensors["lora_mid"], up, flat)
    else:
        product = xp.matmul(up, flat)
    return product


def _product(tensors: Mapping[str, NumPyOrJax], name: str, core: str, xp: ArrayModule) -> NumPyOrJax:
    """Returns one matrix of a product, which is stored whole, as two factors, or as two factors and a core tensor."""
    if name in tensors:
        return tensors[name]
    product: NumPyOrJax
    a, b = tensors[f"{name}_a"], tensors[f"{name}_b"]
    if core in tensors:
        product = xp.einsum("ijhw,io,jk->okhw", tensors[core], a, b)
    else:
        product = xp.matmul(a, b.reshape(len(b), -1))
    return product
