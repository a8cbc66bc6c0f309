"""The references of FLUX.2 pipelines, as latent tokens or as cached keys and values, which a loop keeps."""

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.display.console import console
from clvr_jax.errors import UsageError
from clvr_jax.models.flux2 import AutoencoderKLFlux2, Flux2Transformer, ReferenceCache
from clvr_jax.pipelines.flux2.programs import References, cache_references, encode_images
from clvr_jax.pipelines.flux2.settings import Flux2Settings, ReferenceMode
from clvr_jax.pipelines.jit_modules import HashedGraphDef, JittedPipeline, jit_module
from clvr_jax.programs import StoredFunction
from clvr_jax.sharding import MeshLayout, active_layout, with_logical_constraint
from clvr_jax.trees import Params

KEPT_BYTES = 2 * 2**30
"""Caches of other histories than those of the last call are kept while all caches together have at most these bytes."""

Grids = tuple[tuple[int, int], ...]
"""Height and width of each reference in tokens."""


class ReferenceStore:
    """Caches of single references, kept from call to call.

    A cache is found by the images of a history up to and including its own, so that a history after a roll-back, or
    with another candidate, never finds the cache of an image that it does not contain. Caches of other weights, of
    another dtype or of another mesh are dropped when they are asked for.
    """

    def __init__(self, max_bytes: int = KEPT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()  # calls may run in several threads
        self._caches: OrderedDict[bytes, ReferenceCache] = OrderedDict()
        self._graphs: list[HashedGraphDef] = []
        self._layout: MeshLayout | None = None
        self._weights: list[weakref.ref[jax.Array]] = []

    def __len__(self) -> int:
        return len(self._caches)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, over all devices."""
        return sum(cache.nbytes for cache in self._caches.values())

    def claim(self, models: Sequence[tuple[HashedGraphDef, Params]], layout: MeshLayout | None) -> None:
        """Drops all caches that other models have computed, or the same ones with other weights or on another mesh.

        models: graph definition and weights of each model that the caches of the next calls depend on.
        """
        graphs, leaves = [graph for graph, _ in models], jax.tree.leaves([weights for _, weights in models])
        with self._lock:
            is_same = len(leaves) == len(self._weights) and all(
                reference() is leaf for reference, leaf in zip(self._weights, leaves, strict=True)
            )
            if not is_same or graphs != self._graphs or layout != self._layout:
                self._caches.clear()
                self._graphs, self._layout = graphs, layout
                self._weights = [weakref.ref(leaf) for leaf in leaves]

    def get(self, key: bytes) -> ReferenceCache | None:
        """Returns the cache of a history's last image, None if there is none; it is now the most recently used."""
        with self._lock:
            if key in self._caches:
                self._caches.move_to_end(key)
            return self._caches.get(key)

    def put(self, key: bytes, cache: ReferenceCache) -> None:
        """Keeps a cache of one row."""
        with self._lock:
            self._caches[key] = cache

    def trim(self, used: Iterable[bytes]) -> None:
        """Drops the least recently used caches, but none of `used`, until all have at most `max_bytes`."""
        with self._lock:
            protected, total = set(used), self.nbytes
            for key in [key for key in self._caches if key not in protected]:
                if total <= self.max_bytes:
                    return
                total -= self._caches.pop(key).nbytes

    def clear(self) -> None:
        """Drops all caches."""
        with self._lock:
            self._caches.clear()


class ReferencePipeline(JittedPipeline):
    """Base of the FLUX.2 pipeline: encodes the references of a call.

    Attributes:
      reference_cache: how images attend to references; the model's own setting, or an approximation of it.
      kept_references: the caches that calls with "loop" keep.
    """

    transformer: Flux2Transformer
    vae: AutoencoderKLFlux2
    settings: Flux2Settings
    reference_cache: ReferenceMode

    def __init__(self) -> None:
        super().__init__()
        self.kept_references = ReferenceStore()
        self._encode_images = jit_module(_encode_tokens, replicate_weights=True, static_argnums=0)
        self._cache_references = jit_module(cache_references, static_argnums=(0, 3, 4))
        self._row_of, self._join_rows = StoredFunction(_row_of), StoredFunction(_join_rows)
        self._join_tokens = StoredFunction(_join_tokens)

    def choose_reference_cache(self, mode: ReferenceMode | None, model: str) -> None:
        """Chooses how images attend to references; another mode than the model's own is said in one line on stderr.

        Args:
          mode: the mode; the model's own if None.
          model: name of the model, for the line.
        Raises: UsageError for another mode.
        """
        trained = self.settings.reference_cache
        if mode not in (None, *(modes := get_args(ReferenceMode))):
            raise UsageError(f"reference_cache {mode!r}: choose one of {', '.join(modes)}")
        self.reference_cache = mode or trained
        if self.reference_cache != trained:
            console.print(
                f"reference_cache {mode}: {model} was trained with {trained}; its images are approximations",
                highlight=False,
                soft_wrap=True,
            )

    def _references(self, pixels: list[list[np.ndarray]], sizes: list[tuple[int, int]]) -> tuple[References, Grids]:
        """Returns what images attend to of their references, and the sizes in tokens of those that enter as tokens.

        Args:
          pixels: the references of each row, float32 (h, w, 3) in [-1, 1].
          sizes: height and width of each reference in pixels, the same in all rows.
        """
        token = self.vae.config.token_pixels
        grids = tuple((height // token, width // token) for height, width in sizes)
        if grids and self.reference_cache == "loop" and (kept := self._kept_caches_or_none(pixels, grids)) is not None:
            return kept, ()
        encoded = [self._tokens([row[number] for row in pixels]) for number in range(len(grids))]
        if not encoded:
            empty: Any = np.zeros((len(pixels), 0, self.transformer.config.in_channels), np.float32)
            return empty, grids
        tokens = encoded[0] if len(encoded) == 1 else self._join_tokens(encoded)
        if self.reference_cache == "none":
            return tokens, grids
        return (self._cache_references(*self._split("transformer"), tokens, grids),), ()

    def _tokens(self, images: Sequence[np.ndarray]) -> jax.Array:
        """Returns the latent tokens of one image of each row, (b, tokens, channels)."""
        return self._encode_images(*self._split("vae"), np.stack(images))

    def _kept_caches_or_none(self, pixels: list[list[np.ndarray]], grids: Grids) -> tuple[ReferenceCache, ...] | None:
        """Returns the caches of "loop"; None, and "image" from now on, if they do not fit into memory.

        Before that, the caches of other histories are dropped. Several processes must do the same, and the memory of
        one may end alone: there it is an error.
        """
        for _ in range(2):
            try:
                kept = self._kept_caches(pixels, grids)
                jax.block_until_ready(kept)
                return kept
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or jax.process_count() > 1:
                    raise
            self.kept_references.clear()
        self.reference_cache = "image"
        console.print(
            f"reference_cache loop: no memory for the keys and values of {len(grids)} references; image from now on, "
            "which computes them again for every image, so images are approximations",
            highlight=False,
            soft_wrap=True,
        )
        return None

    def _kept_caches(self, pixels: list[list[np.ndarray]], grids: Grids) -> tuple[ReferenceCache, ...]:
        """Returns the cache of each reference, which attends to those before it; computes those that are not kept."""
        self.kept_references.claim([self._held("vae"), self._held("transformer")], active_layout())
        keys = [history_keys(row) for row in pixels]
        caches: list[ReferenceCache] = []
        for number, grid in enumerate(grids):
            found = [self.kept_references.get(row[number]) for row in keys]
            kept = [cache for cache in found if cache is not None]
            if len(kept) == len(found):
                caches.append(kept[0] if len(kept) == 1 else self._join_rows(kept))
                continue
            # For all rows, also those that are kept: the number of rows is that of the call, as in its other programs.
            tokens = self._tokens([row[number] for row in pixels])
            made = self._cache_references(*self._split("transformer"), tokens, (grid,), number, tuple(caches))
            caches.append(made)
            for row, cache in enumerate(found):
                if cache is None:
                    self.kept_references.put(keys[row][number], made if len(found) == 1 else self._row_of(made, row))
        self.kept_references.trim(key for row in keys for key in row)
        return tuple(caches)


def history_keys(images: Sequence[np.ndarray]) -> list[bytes]:
    """Returns a digest for each image of a history, of its pixels and shape and of all images before it."""
    keys: list[bytes] = []
    for image in images:
        digest = hashlib.blake2b(b"".join(keys[-1:]), digest_size=32)
        digest.update(repr((image.shape, image.dtype.str)).encode())
        digest.update(np.ascontiguousarray(image).data)
        keys.append(digest.digest())
    return keys


def _encode_tokens(graphdef: nnx.GraphDef[AutoencoderKLFlux2], state: Params, images_bhwc: jax.Array) -> jax.Array:
    """Encodes each image to a row of latent tokens, (b, tokens, channels), see `programs.encode_images`."""
    encoded_bhwc = encode_images(graphdef, state, images_bhwc)
    return encoded_bhwc.reshape(len(images_bhwc), -1, encoded_bhwc.shape[-1])


def _join_tokens(tokens: Sequence[jax.Array]) -> jax.Array:
    """Returns the latent tokens of all references of each row."""
    return jnp.concatenate(tokens, axis=1)


def _sharded(array: jax.Array) -> jax.Array:
    return with_logical_constraint(array, None, "batch", None, "heads", None)


def _row_of(cache: ReferenceCache, row: jax.Array) -> ReferenceCache:
    """Returns the cache of one row of a batch."""
    found: ReferenceCache = jax.tree.map(lambda x: _sharded(jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)), cache)
    return found


def _join_rows(caches: Sequence[ReferenceCache]) -> ReferenceCache:
    """Returns the caches of single rows as that of a batch."""
    found: ReferenceCache = jax.tree.map(lambda *rows: _sharded(jnp.concatenate(rows, axis=1)), *caches)
    return found
