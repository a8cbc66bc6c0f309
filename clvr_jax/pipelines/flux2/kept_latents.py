"""Latents of generated images, which are references in place of the encoded images."""

import hashlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from clvr_jax.pipelines.flux2.settings import MAX_REFERENCE_PIXELS
from clvr_jax.pipelines.jit_modules import HashedGraphDef, ModelTracker
from clvr_jax.trees import Params


@dataclass(frozen=True, eq=False)
class LatentReference:
    """A generated image as a reference, with its latents, so that it is not encoded.

    image: the image. latents_tc: (tokens, channels), the clean latents that were decoded to it, in rows of its grid.
    """

    image: Image.Image
    latents_tc: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        return self.image.size


ReferenceImage = Image.Image | LatentReference
"""A reference: an image that is encoded, or a generated one with its latents."""


class Reference(NamedTuple):
    """A reference of one row, as the models take it: pixels that are encoded, or latents.

    size: height and width in pixels. content: float32 (h, w, 3) in [-1, 1]; with `has_latents` (tokens, channels).
    """

    size: tuple[int, int]
    content: np.ndarray
    has_latents: bool = False


class LatentStore:
    """Latents of generated images, in host memory, as long as the images exist.

    An image is found by its pixels, so that an image that was changed never has latents. If several images have the
    same pixels, the latents are those of the image itself, or else those that were kept first. Latents of another
    autoencoder, or of the same one with other weights, are dropped when they are asked for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # calls may run in several threads
        self._kept: dict[bytes, list[tuple[weakref.ref[Image.Image], np.ndarray]]] = {}
        self._models = ModelTracker()

    def __len__(self) -> int:
        self._drop_unused()
        return sum(len(same) for same in self._kept.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all latents."""
        self._drop_unused()
        return sum(latents.nbytes for same in self._kept.values() for _, latents in same)

    def claim(self, autoencoder: tuple[HashedGraphDef, Params]) -> None:
        """Drops all latents that another autoencoder has decoded, or the same one with other weights."""
        with self._lock:
            if not self._models.are_same([autoencoder]):
                self._kept.clear()

    def put(self, image: Image.Image, latents_tc: np.ndarray) -> None:
        """Keeps the latents of an image until the image is deleted; see `LatentReference`."""
        self._drop_unused()
        with self._lock:
            self._kept.setdefault(_key(image), []).append((weakref.ref(image), latents_tc))

    def get(self, image: Image.Image) -> np.ndarray | None:
        """Returns the latents of an image, None if there are none."""
        with self._lock:
            same = [(kept(), latents) for kept, latents in self._kept.get(_key(image), [])]
        found = [(kept, latents) for kept, latents in same if kept is not None]
        return next((latents for kept, latents in found if kept is image), found[0][1] if found else None)

    def _drop_unused(self) -> None:
        """Drops the latents of images that do not exist any more."""
        with self._lock:
            for key, same in list(self._kept.items()):
                self._kept[key] = [(image, latents) for image, latents in same if image() is not None]
                if not self._kept[key]:
                    del self._kept[key]


def history_keys(references: Sequence[Reference]) -> list[bytes]:
    """Returns a digest for each reference of a history, of its content and of all references before it."""
    keys: list[bytes] = []
    for reference in references:
        keys.append(_digest(reference.content, b"".join(keys[-1:])))
    return keys


def is_scaled(image: Image.Image) -> bool:
    """Returns whether an image is scaled down as a reference, so that its latents are of another size."""
    return image.width * image.height > MAX_REFERENCE_PIXELS


def _key(image: Image.Image) -> bytes:
    return _digest(np.asarray(image), image.mode.encode())


def _digest(array: np.ndarray, before: bytes) -> bytes:
    """Returns a digest of an array with its shape and dtype, and of another digest."""
    digest = hashlib.blake2b(before, digest_size=32)
    digest.update(repr((array.shape, array.dtype.str)).encode())
    digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.digest()
