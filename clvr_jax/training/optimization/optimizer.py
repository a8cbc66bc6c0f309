"""Optimizers and learning-rate schedules."""

import dataclasses

import jax
import optax
from jaxtyping import PyTree

from clvr_jax.errors import UsageError
from clvr_jax.trees import KeyPath, Params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon and AdamW, behind a clip of the global gradient norm."""

    steps: int = 1000
    """Train for this many optimizer steps."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW, reached by linear warmup and followed by cosine decay."""
    muon_learning_rate: float = 0.0
    """Train the matrices of the scanned blocks by Muon with this peak learning rate, and the rest by AdamW; 0 trains
    everything by AdamW. It is in units of AdamW's: a step moves an entry by 0.2 of it, as AdamW's typically does."""
    warmup: float = 0.05
    """Warm up over this fraction of the steps; it must be in [0, 1)."""
    final_learning_rate: float = 0.02
    """End the cosine decay at this fraction of the peak learning rate."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW and Muon; 0 switches it off."""
    b1: float = 0.9
    """Decay rate of AdamW's first moment."""
    b2: float = 0.99
    """Decay rate of AdamW's second moment."""
    clip_norm: float = 1.0
    """Rescale gradients whose global norm is above this value."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"{type(self).__name__}: steps must be at least 1, got {self.steps}")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"{type(self).__name__}: warmup must be in [0, 1), got {self.warmup}")

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        if self.muon_learning_rate > 0:
            rule = optax.contrib.muon(
                self._schedule(self.muon_learning_rate),
                adam_learning_rate=self._schedule(self.learning_rate),
                adam_b1=self.b1,
                adam_b2=self.b2,
                weight_decay=self.weight_decay,
                adam_weight_decay=self.weight_decay,
                weight_decay_mask=_is_matrix,
                consistent_rms=0.2,
                muon_weight_dimension_numbers=_block_matrices,
            )
        else:
            rule = optax.adamw(
                self._schedule(self.learning_rate),
                b1=self.b1,
                b2=self.b2,
                weight_decay=self.weight_decay,
                mask=_is_matrix,
            )
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)

    def _schedule(self, peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=max(1, round(self.warmup * self.steps)),
            decay_steps=max(2, self.steps),
            end_value=self.final_learning_rate * peak,
        )


@dataclasses.dataclass(frozen=True)
class AdamWConfig:
    """AdamW with a constant learning rate, behind a clip of the global gradient norm."""

    learning_rate: float = 1e-4
    """Learning rate of AdamW, which is constant."""
    b1: float = 0.9
    """Decay rate of AdamW's first moment."""
    b2: float = 0.999
    """Decay rate of AdamW's second moment."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of AdamW, for all parameters; 0 switches it off."""
    clip_norm: float = 1.0
    """Rescale gradients whose global norm is above this value."""

    def make(self) -> optax.GradientTransformation:
        """Returns the optimizer."""
        rule = optax.adamw(self.learning_rate, self.b1, self.b2, weight_decay=self.weight_decay)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), rule)


def _is_matrix(params: Params) -> PyTree:
    """Returns which parameters are decayed: matrices, not biases and norm scales."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _block_matrices(params: Params) -> PyTree:
    """Returns Muon's dimension numbers of the kernels (layer, in, out) of scanned blocks; None (AdamW) for the rest."""

    def numbers(path: KeyPath, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        is_stacked = leaf.ndim == 3 and any(getattr(key, "key", None) == "kernel" for key in path)
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if is_stacked else None

    return jax.tree_util.tree_map_with_path(numbers, params)
