"""The references of FLUX.2 pipelines, as latent tokens or as cached keys and values, which a loop keeps.

A generated image that becomes a reference is encoded again, or its latents are kept and used in place of that.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from clvr_jax.display.console import console
from clvr_jax.errors import UsageError
from clvr_jax.models.common.quantization import Quantization
from clvr_jax.models.flux2 import AutoencoderKLFlux2, Flux2Transformer, ReferenceCache
from clvr_jax.pipelines.flux2.kept_latents import (
    LatentReference,
    LatentStore,
    Reference,
    ReferenceImage,
    history_keys,
    is_scaled,
)
from clvr_jax.pipelines.flux2.programs import References, cache_references, encode_images
from clvr_jax.pipelines.flux2.settings import MAX_REFERENCE_PIXELS, Flux2Settings, ReferenceLatents, ReferenceMode
from clvr_jax.pipelines.images import check_size, prepare_reference
from clvr_jax.pipelines.jit_modules import HashedGraphDef, JittedPipeline, ModelTracker, jit_module
from clvr_jax.programs import StoredFunction
from clvr_jax.sharding import MeshLayout, active_layout, process_allgather, with_logical_constraint
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
        self._models = ModelTracker()

    def __len__(self) -> int:
        return len(self._caches)

    @property
    def nbytes(self) -> int:
        """Bytes of all caches, over all devices."""
        return sum(cache.nbytes for cache in self._caches.values())

    def claim(
        self,
        models: Sequence[tuple[HashedGraphDef, Params]],
        layout: MeshLayout | None,
        quantize: Quantization | None = None,
    ) -> None:
        """Drops all caches that other models have computed, or the same ones with other weights or on another mesh.

        models: graph definition and weights of each model that the caches of the next calls depend on. quantize: format
        of the caches; those of another one are dropped, too.
        """
        with self._lock:
            if not self._models.are_same(models, (layout, quantize)):
                self._caches.clear()

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
      reference_cache_dtype: "int8" if cached keys and values are 8-bit integers, None if they are in the compute dtype.
      kept_references: the caches that calls with "loop" keep.
      reference_latents: which latents generated images have as references, see `ReferenceLatents`.
      kept_latents: the latents that calls with "kept" keep.
    """

    transformer: Flux2Transformer
    vae: AutoencoderKLFlux2
    settings: Flux2Settings
    reference_cache: ReferenceMode
    reference_cache_dtype: Quantization | None = None
    reference_latents: ReferenceLatents

    def __init__(self) -> None:
        super().__init__()
        self.kept_references, self.kept_latents = ReferenceStore(), LatentStore()
        self._printed: set[str] = set()
        self._encode_images = jit_module(_encode_tokens, replicate_weights=True, static_argnums=0)
        self._cache_references = jit_module(cache_references, static_argnums=(0, 3, 4, 6))
        self._row_of, self._join_rows = StoredFunction(_row_of), StoredFunction(_join_rows)
        self._join_tokens, self._choose_tokens = StoredFunction(_join_tokens), StoredFunction(_choose_tokens)

    def choose_reference_cache(self, mode: ReferenceMode | None, model: str, dtype: Quantization | None = None) -> None:
        """Chooses how images attend to references; another mode than the model's own is said in one line on stderr.

        Args:
          mode: the mode; the model's own if None.
          model: name of the model, for the line.
          dtype: "int8" stores cached keys and values as 8-bit integers; None stores them in the compute dtype.
        Raises: UsageError for another mode or dtype, and for a dtype of caches in a mode without.
        """
        trained = self.settings.reference_cache
        if mode not in (None, *(modes := get_args(ReferenceMode))):
            raise UsageError(f"reference_cache {mode!r}: choose one of {', '.join(modes)}")
        if dtype not in (None, *(formats := get_args(Quantization))):
            raise UsageError(f"reference_cache_dtype {dtype!r}: choose {', '.join(formats)}, or leave it out")
        if dtype and (mode or trained) == "none":
            raise UsageError(
                f"reference_cache_dtype {dtype}: with reference_cache none there are no caches; leave it out, or "
                "choose reference_cache image or loop"
            )
        self.reference_cache, self.reference_cache_dtype = mode or trained, dtype
        if self.reference_cache != trained:
            console.print(
                f"reference_cache {mode}: {model} was trained with {trained}; its images are approximations",
                highlight=False,
                soft_wrap=True,
            )

    def choose_reference_latents(self, choice: ReferenceLatents | None) -> None:
        """Chooses which latents generated images have as references; the model's own setting if None.

        Raises: UsageError for another choice.
        """
        if choice not in (None, *(choices := get_args(ReferenceLatents))):
            raise UsageError(f"reference_latents {choice!r}: choose one of {', '.join(choices)}")
        self.reference_latents = choice or self.settings.reference_latents

    def with_latents(self, images: Sequence[Image.Image], num_given: int = 0) -> list[ReferenceImage]:
        """Returns the references of a history, which have their latents if these are kept.

        One line on stderr, once, says that an image has none: it was read from a file, it was generated before other
        weights were loaded, or it is scaled down as a reference.

        Args:
          images: the images in order.
          num_given: how many of them, the first ones, are the user's own. They never have latents, so that results do
            not depend on what was generated before.
        """
        if self.reference_latents == "encoded":
            return list(images)
        self.kept_latents.claim(self._held("vae"))
        references: list[ReferenceImage] = list(images[:num_given])
        for image in images[num_given:]:
            latents_tc = self.kept_latents.get(image)
            if latents_tc is None:
                reason = "is scaled down" if is_scaled(image) else "was not generated by the models in memory"
                self._print_once(f"reference_latents kept: an earlier image {reason}, so that it is encoded")
            references.append(image if latents_tc is None else LatentReference(image, latents_tc))
        return references

    @property
    def latents_dtype(self) -> np.dtype:
        """The dtype of the latents of encoded images, and of those that are kept."""
        return np.dtype(self.vae.encoder.conv_in.dtype)

    def _keep_latents(self, images: Sequence[Image.Image], latents_btc: jax.Array) -> None:
        """Keeps the latents of images, unless they are scaled down as references.

        latents_btc: of these images, and of rows that fill up the batch.
        """
        self.kept_latents.claim(self._held("vae"))
        latents = np.asarray(process_allgather(latents_btc)).astype(self.latents_dtype)
        for image, latents_tc in zip(images, latents, strict=False):
            if not is_scaled(image):
                self.kept_latents.put(image, latents_tc.copy())  # a view would keep the latents of the whole batch

    def _print_once(self, line: str) -> None:
        if line not in self._printed:
            self._printed.add(line)
            console.print(line, highlight=False, soft_wrap=True)

    def _prepared(self, image: ReferenceImage) -> Reference:
        """Returns a reference as the models take it. Raises: UsageError for latents of another size than the image."""
        token = self.vae.config.token_pixels
        if not isinstance(image, LatentReference):
            pixels = prepare_reference(image, token, MAX_REFERENCE_PIXELS)
            return Reference(pixels.shape[:2], pixels)
        width, height = image.size
        check_size(height, width, token)
        expected = (height // token * (width // token), self.vae.config.token_channels)
        if image.latents_tc.shape != expected:
            raise UsageError(
                f"latents of a reference of {height} x {width} pixels have shape {image.latents_tc.shape}; expected "
                f"{expected} (tokens, channels)"
            )
        return Reference((height, width), image.latents_tc, has_latents=True)

    def _references(self, references: list[list[Reference]], sizes: list[tuple[int, int]]) -> tuple[References, Grids]:
        """Returns what images attend to of their references, and the sizes in tokens of those that enter as tokens.

        Args:
          references: those of each row.
          sizes: height and width of each reference in pixels, the same in all rows.
        """
        token = self.vae.config.token_pixels
        grids = tuple((height // token, width // token) for height, width in sizes)
        if grids and self.reference_cache == "loop":
            kept = self._kept_caches_or_none(references, grids)
            if kept is not None:
                return kept, ()
        encoded = [self._tokens([row[number] for row in references]) for number in range(len(grids))]
        if not encoded:
            empty: Any = np.zeros((len(references), 0, self.transformer.config.in_channels), np.float32)
            return empty, grids
        tokens = encoded[0] if len(encoded) == 1 else self._join_tokens(encoded)
        if self.reference_cache == "none":
            return tokens, grids
        cache = self._cache_references(*self._split("transformer"), tokens, grids, 0, (), self._quantizes)
        return (cache,), ()

    @property
    def _quantizes(self) -> bool:
        return self.reference_cache_dtype == "int8"

    def _tokens(self, references: Sequence[Reference]) -> jax.Array:
        """Returns the latent tokens of one reference of each row, (b, tokens, channels)."""
        kept = np.array([reference.has_latents for reference in references])
        if kept.all():
            of_all: Any = np.stack([reference.content for reference in references])
            tokens: jax.Array = of_all  # an array of NumPy, which programs take as well
            return tokens
        (height, width), *_ = (reference.size for reference in references)
        blank = np.zeros((height, width, 3), np.float32)
        pixels = np.stack([blank if reference.has_latents else reference.content for reference in references])
        encoded: jax.Array = self._encode_images(*self._split("vae"), pixels)
        if not kept.any():
            return encoded
        none = np.zeros_like(next(reference.content for reference in references if reference.has_latents))
        latents = np.stack([reference.content if reference.has_latents else none for reference in references])
        chosen: jax.Array = self._choose_tokens(kept, latents, encoded)
        return chosen

    def _kept_caches_or_none(
        self, references: list[list[Reference]], grids: Grids
    ) -> tuple[ReferenceCache, ...] | None:
        """Returns the caches of "loop"; None, and "image" from now on, if they do not fit into memory.

        Before that, the caches of other histories are dropped. Several processes must do the same, and the memory of
        one may end alone: there it is an error.
        """
        for _ in range(2):
            try:
                kept = self._kept_caches(references, grids)
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

    def _kept_caches(self, references: list[list[Reference]], grids: Grids) -> tuple[ReferenceCache, ...]:
        """Returns the cache of each reference, which attends to those before it; computes those that are not kept."""
        models = [self._held("vae"), self._held("transformer")]
        self.kept_references.claim(models, active_layout(), self.reference_cache_dtype)
        keys = [history_keys(row) for row in references]
        caches: list[ReferenceCache] = []
        for number, grid in enumerate(grids):
            found = [self.kept_references.get(row[number]) for row in keys]
            kept = [cache for cache in found if cache is not None]
            if len(kept) == len(found):
                caches.append(kept[0] if len(kept) == 1 else self._join_rows(kept))
                continue
            # For all rows, also those that are kept: the number of rows is that of the call, as in its other programs.
            tokens = self._tokens([row[number] for row in references])
            model, earlier = self._split("transformer"), tuple(caches)
            made = self._cache_references(*model, tokens, (grid,), number, earlier, self._quantizes)
            caches.append(made)
            for row, cache in enumerate(found):
                if cache is None:
                    self.kept_references.put(keys[row][number], made if len(found) == 1 else self._row_of(made, row))
        self.kept_references.trim(key for row in keys for key in row)
        return tuple(caches)


def _encode_tokens(graphdef: nnx.GraphDef[AutoencoderKLFlux2], state: Params, images_bhwc: jax.Array) -> jax.Array:
    """Encodes each image to a row of latent tokens, (b, tokens, channels), see `programs.encode_images`."""
    encoded_bhwc = encode_images(graphdef, state, images_bhwc)
    return encoded_bhwc.reshape(len(images_bhwc), -1, encoded_bhwc.shape[-1])


def _join_tokens(tokens: Sequence[jax.Array]) -> jax.Array:
    """Returns the latent tokens of all references of each row."""
    return jnp.concatenate(tokens, axis=1)


def _choose_tokens(is_kept_b: np.ndarray, kept_btc: np.ndarray, encoded_btc: jax.Array) -> jax.Array:
    """Returns the kept tokens of the rows that have some, and the encoded ones of the others."""
    return jnp.where(is_kept_b[:, None, None], kept_btc, encoded_btc)


def _sharded(array: jax.Array) -> jax.Array:
    """Returns an array of a cache, sharded by rows and heads; scales have four axes."""
    tokens_and_heads = (None, "heads", None) if array.ndim == 5 else ("heads", None)
    return with_logical_constraint(array, None, "batch", *tokens_and_heads)


def _row_of(cache: ReferenceCache, row: jax.Array) -> ReferenceCache:
    """Returns the cache of one row of a batch."""
    found: ReferenceCache = jax.tree.map(lambda x: _sharded(jax.lax.dynamic_slice_in_dim(x, row, 1, axis=1)), cache)
    return found


def _join_rows(caches: Sequence[ReferenceCache]) -> ReferenceCache:
    """Returns the caches of single rows as that of a batch."""
    found: ReferenceCache = jax.tree.map(lambda *rows: _sharded(jnp.concatenate(rows, axis=1)), *caches)
    return found
