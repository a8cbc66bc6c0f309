"""Image-caption pairs and edit pairs in a directory as training examples of an image generator.

The directory holds either image files, each with its caption in a text file of the same name (`a.png` and `a.txt`), or
`metadata.jsonl`, whose lines are {"file_name": "a.png", "text": "a caption"}, as in datasets of Hugging Face, or
{"source": "a.png", "instruction": "make it red", "target": "b.png"} for an edit.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from clvr_jax.data.preprocessing.histories import token_count
from clvr_jax.data.preprocessing.text import bucket_for, check_prompt, encode_prompts
from clvr_jax.data.sft_examples import Sample
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.atomic_io import located
from clvr_jax.files.file_names import has_entry, listed_file
from clvr_jax.files.image_io import read_image
from clvr_jax.files.json_input import parse_object, read_lines, read_text
from clvr_jax.interfaces.tokenizer import Tokenizer

METADATA = "metadata.jsonl"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_ASPECT = 2.0
"""Images that are longer are cropped to this ratio of their sides."""


@dataclass(frozen=True)
class ImagePair:
    """An image and its text.

    target: the image to generate. text: its caption, or the instruction of an edit. source: the image that is edited;
    None without an edit. where: the file, or file and line, that error messages name.
    """

    target: Path
    text: str
    where: str
    source: Path | None = None

    @property
    def images(self) -> tuple[Path, ...]:
        """The source if there is one, then the target."""
        return (self.target,) if self.source is None else (self.source, self.target)


def read_pairs(directory: Path) -> tuple[ImagePair, ...]:
    """Reads the pairs of a directory without their images.

    Raises: ClvrError, one line that names the pair, for a caption that is missing, empty or too long, a line that is no
      pair, or an image that is missing or outside of the directory; and for a directory without pairs.
    """
    if not directory.is_dir():
        raise ClvrError(f"{directory}: no such directory of image-caption pairs")
    pairs = tuple(_listed(directory) if has_entry(directory / METADATA) else _beside_captions(directory))
    if not pairs:
        raise ClvrError(
            f"{directory}: contains neither {METADATA} nor images ({', '.join(IMAGE_SUFFIXES)}) with captions (.txt)"
        )
    return pairs


def training_size(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """Returns the height and width, in pixels, of an image in training.

    Args:
      height, width: pixels of the original image.
      side: the area is at most `side` x `side`.
      multiple: both sides are multiples of it.
    Returns: of the possible sizes of at most this area, that of the nearest aspect ratio, up to `MAX_ASPECT`.
    """
    if height > width:
        columns, rows = training_size(width, height, side, multiple)
        return rows, columns
    heights = range(multiple, side + 1, multiple)
    sizes = [(h, min(side * side // h, int(h * MAX_ASPECT)) // multiple * multiple) for h in heights]

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        return round(abs(math.log(size[0] * width / (size[1] * height))), 6), -size[0] * size[1]

    return min(sizes, key=distance)


class PairExamples:
    """The pairs of a directory as examples; all images are read once to check them before training begins.

    An image is scaled (Lanczos) to cover its `training_size` and cropped in the middle; the source of an edit gets the
    size of its target.

    Args:
      directory: see `read_pairs`.
      tokenizer: of the text encoder.
      side: images are trained at an area of at most `side` x `side` pixels.
      token_pixels: the pixels on a side of one latent token.
      dropout: fraction of texts that are replaced by the empty text, for classifier-free guidance; sources are kept.
      text_buckets: lengths that texts are padded to.
    Raises: UsageError for an invalid dropout or side; ClvrError, one line that names the pair, as
      `read_pairs`, for an image that cannot be read, and for a text that is longer than all buckets.
    """

    def __init__(
        self,
        directory: Path,
        tokenizer: Tokenizer,
        *,
        side: int,
        token_pixels: int,
        text_buckets: Sequence[int],
        dropout: float = 0.1,
    ):
        if not 0 <= dropout <= 1:
            raise UsageError(f"image pairs: dropout must be in [0, 1], got {dropout}")
        if side < token_pixels or side % token_pixels:
            raise UsageError(f"image pairs: the size must be a multiple of {token_pixels} pixels, got {side}")
        self._pairs, self._tokenizer, self._dropout = read_pairs(directory), tokenizer, dropout
        # Few sizes, so that few programs are compiled.
        multiple = 4 * token_pixels if side >= 32 * token_pixels and side % (4 * token_pixels) == 0 else token_pixels
        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(_checked_size, self._pairs))
        self.samples = tuple(
            _sample(number, pair, training_size(*size, side, multiple), tokenizer, text_buckets)
            for number, (pair, size) in enumerate(zip(self._pairs, sizes, strict=True))
        )

    def batch(self, samples: Sequence[Sample], rngs: Sequence[np.random.Generator]) -> dict[str, np.ndarray]:
        """Returns ids and mask (b, t) int32, references (b, r, h, w, 3) and target (b, h, w, 3) uint8."""
        pairs = [self._pairs[sample.record] for sample in samples]
        texts = ["" if rng.random() < self._dropout else pair.text for pair, rng in zip(pairs, rngs, strict=True)]
        ids, mask = encode_prompts(self._tokenizer, texts, (samples[0].padded,))
        _, height, width = samples[0].shape
        images = np.stack([np.stack([_fitted(pair, path, height, width) for path in pair.images]) for pair in pairs])
        return {"ids": ids, "mask": mask, "references": images[:, :-1], "target": images[:, -1]}


def _listed(directory: Path) -> Iterator[ImagePair]:
    for where, line in read_lines(directory / METADATA):
        fields = parse_object(line, where)
        if "target" in fields.content or "source" in fields.content:
            source = listed_file(directory, fields.text("source"), where)
            target, text = fields.text("target"), fields.text("instruction")
        else:
            source, target, text = None, fields.text("file_name"), fields.text("text")
        yield _pair(listed_file(directory, target, where), text, where, source)


def _beside_captions(directory: Path) -> Iterator[ImagePair]:
    for path in sorted(directory.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            continue
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise ClvrError(f"{path}: has no caption; write it to {caption.name} beside it, or remove the image")
        text = read_text(listed_file(directory, caption.name, str(path)))
        yield _pair(listed_file(directory, path.name, str(path)), text, str(caption))


def _pair(target: Path, text: str, where: str, source: Path | None = None) -> ImagePair:
    text = " ".join(text.split())
    if not text:
        raise ClvrError(f"{where}: the text is empty; describe the image, or remove the pair")
    with located(where):
        check_prompt(text)
    return ImagePair(target, text, where, source)


def _checked_size(pair: ImagePair) -> tuple[int, int]:
    """Reads all images of a pair; returns the height and width of the target, upright."""
    sizes = [_read(pair, path).shape[:2] for path in pair.images]
    return sizes[-1][0], sizes[-1][1]


def _read(pair: ImagePair, path: Path) -> np.ndarray:
    with located(pair.where):
        return read_image(path)


def _fitted(pair: ImagePair, path: Path, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(_read(pair, path))
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))


def _sample(
    number: int, pair: ImagePair, size: tuple[int, int], tokenizer: Tokenizer, text_buckets: Sequence[int]
) -> Sample:
    length = token_count(tokenizer, pair.text)
    with located(pair.where):
        padded = bucket_for(length, text_buckets)
    # A resumed run must have the same pairs: their names and texts are part of the loader's fingerprint.
    names = "\n".join([pair.text, *(path.name for path in pair.images)])
    digest = hashlib.blake2b(names.encode(errors="backslashreplace"), digest_size=8).hexdigest()
    return Sample(number, digest, 0, (len(pair.images) - 1, *size), length, padded)
