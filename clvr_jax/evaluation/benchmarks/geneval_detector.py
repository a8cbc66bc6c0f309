"""GenEval's detector in PyTorch: Mask2Former (Swin-S, COCO instances) finds objects, CLIP (ViT-L/14) their colors.

The official scorer runs OpenMMLab's weights of the same architecture on mmdet 2.x. This module runs the classes of
transformers with the authors' own weights, which is another detector: state that when you compare scores with published
ones.

Source: Cheng et al. 2022 (arXiv 2112.01527), inference as in mask2former's `instance_inference`; Ghosh et al. 2023,
appendix, for the color classifier.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.geneval import Detector
from clvr_jax.evaluation.benchmarks.geneval_rules import (
    COLORS,
    OBJECTS,
    THRESHOLD,
    Detection,
    keep_confident,
    objects_to_color,
)
from clvr_jax.files.image_io import EncodedImage, as_pil
from clvr_jax.files.json_input import JsonObject, read_object
from clvr_jax.merging.digests import Digests

MULTIPLE = 32
MOST_DETECTIONS = 100
_MAX_SIDE = 8192
GRAY = "#999"
"""The color of everything but the object in the crops for CLIP."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_SENTENCES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class TorchDetector(Detector):
    """A detector that runs Mask2Former and CLIP on one device.

    Args:
      detector: directory in transformers layout, such as facebook/mask2former-swin-small-coco-instance; its
        preprocessor_config.json defines the size to which images are scaled.
      clip: directory in transformers layout, such as openai/clip-vit-large-patch14.
      device: PyTorch's name of the device; if None, a GPU if there is one, else the CPU.
    Raises: ClvrError, one line, if PyTorch is missing, or a directory has another model.
    """

    def __init__(self, detector: Path, clip: Path, device: str | None = None):
        check_models(detector, clip)
        import torch
        from transformers import AutoTokenizer, CLIPModel, Mask2FormerForUniversalSegmentation

        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._detector = _load(Mask2FormerForUniversalSegmentation, detector).eval().to(self._device)
        self._clip = _load(CLIPModel, clip).eval().to(self._device)
        self._tokenizer = _load(AutoTokenizer, clip, trust_remote_code=False)
        processor = read_object(detector / "preprocessor_config.json")
        size = processor.nested("size") if "size" in processor.content else JsonObject({}, processor.where)
        sides = (("shortest_edge", 800), ("longest_edge", 1333))
        self._sides = tuple(size.integer(name, usual, low=1, high=_MAX_SIDE) for name, usual in sides)
        self._names = (detector.resolve().name, clip.resolve().name)
        digests = Digests({"detector": detector, "clip": clip}).finish()
        self._revision = "-".join(digest[:12] for digest in digests.values())
        self._classifiers: dict[str, Any] = {}

    @property
    @override
    def name(self) -> str:
        return f"{self._names[0]} and {self._names[1]}"

    @property
    @override
    def revision(self) -> str:
        return self._revision

    @override
    def find(self, image: EncodedImage, metadata: Mapping[str, Any]) -> dict[str, list[Detection]]:
        rgb = as_pil(image).convert("RGB")
        found: dict[str, list[Detection]] = {}
        masks: dict[str, list[np.ndarray]] = {}
        for label, confidence, mask in self._instances(rgb):
            found.setdefault(OBJECTS[label], []).append(Detection(mask_box(mask), confidence))
            masks.setdefault(OBJECTS[label], []).append(mask)
        for name, count in objects_to_color(keep_confident(found, metadata["tag"]), metadata).items():
            # Both lists begin with the most confident objects, and keep_confident() shortens them at their end.
            colors = self._colors(rgb, name, found[name][:count], masks[name][:count])
            found[name][:count] = [
                Detection(one.box, one.confidence, color) for one, color in zip(found[name], colors, strict=False)
            ]
        return found

    def _instances(self, image: Image.Image) -> list[tuple[int, float, np.ndarray]]:
        """Returns (class, confidence, mask bool (height, width)) above GenEval's threshold, most confident first."""
        import torch

        pixels, (height, width) = _detector_input(image, *self._sides)
        with torch.inference_mode():
            output = self._detector(pixel_values=torch.from_numpy(pixels).to(self._device))
            scores = output.class_queries_logits[0].softmax(-1)[:, :-1].flatten()
            best, order = scores.topk(min(MOST_DETECTIONS, len(scores)))
            sure = best > THRESHOLD  # the factor of the mask, below, cannot increase it
            labels, queries = order[sure] % len(OBJECTS), order[sure] // len(OBJECTS)
            logits = output.masks_queries_logits[0][queries][None]
            if not len(queries):
                return []
            logits = torch.nn.functional.interpolate(logits, pixels.shape[2:], mode="bilinear", align_corners=False)
            logits = torch.nn.functional.interpolate(
                logits[..., :height, :width], image.size[::-1], mode="bilinear", align_corners=False
            )[0]
            masks = logits > 0
            inside = (logits.sigmoid() * masks).flatten(1).sum(1) / (masks.flatten(1).sum(1) + 1e-6)
            confidences = (best[sure] * inside).cpu().tolist()
        rows = zip(labels.cpu().tolist(), confidences, masks.cpu().numpy(), strict=True)
        return sorted((row for row in rows if row[1] > THRESHOLD and row[2].any()), key=lambda row: -row[1])

    def _colors(
        self, image: Image.Image, name: str, objects: Sequence[Detection], masks: Sequence[np.ndarray]
    ) -> list[str]:
        import torch

        crops = np.stack(
            [_clip_input(masked_crop(image, one.box, mask)) for one, mask in zip(objects, masks, strict=True)]
        )
        with torch.inference_mode():
            features = _unit(_features(self._clip.get_image_features(torch.from_numpy(crops).to(self._device))))
            return [COLORS[best] for best in (features @ self._classifier(name)).argmax(1).tolist()]

    def _classifier(self, name: str) -> Any:
        """Returns (features, colors): for each color the normalized mean embedding of its sentences."""
        import torch

        if name not in self._classifiers:
            columns = []
            for color in COLORS:
                sentences = [sentence.format(color=color, name=name) for sentence in _SENTENCES]
                tokens = self._tokenizer(sentences, padding=True, return_tensors="pt").to(self._device)
                columns.append(_unit(_unit(_features(self._clip.get_text_features(**tokens))).mean(0)))
            self._classifiers[name] = torch.stack(columns, dim=1)
        return self._classifiers[name]


def check_models(detector: Path, clip: Path) -> None:
    """Checks the models before any image is generated. Raises: ClvrError for other models, or without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        raise ClvrError("GenEval's scorer needs PyTorch: pip install 'clvr-jax[torch]'")
    for directory, kind in ((detector, "mask2former"), (clip, "clip")):
        config = read_object(directory / "config.json")
        if (found := config.content.get("model_type")) != kind:
            raise ClvrError(f"{directory}: has a {found!s:.60} model, GenEval's scorer needs {kind}")
        labels = config.nested("id2label").content if "id2label" in config.content else ()
        if kind == "mask2former" and (classes := len(labels)) != len(OBJECTS):
            raise ClvrError(
                f"{directory}: the model has {classes} classes, not COCO's {len(OBJECTS)}; use a coco-instance model"
            )


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Returns the smallest box (x0, y0, x1, y1) around a mask bool (height, width); x1 and y1 are exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def masked_crop(image: Image.Image, box: Sequence[float], mask: np.ndarray) -> Image.Image:
    """Returns the crop of the box, with gray in place of everything but the object."""
    blank = Image.new("RGB", image.size, GRAY)
    left, top, right, bottom = (round(edge) for edge in box)
    return Image.composite(image, blank, Image.fromarray(mask)).crop((left, top, right, bottom))


def _detector_input(image: Image.Image, shortest: int, longest: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns (1, 3, h, w) float32, padded to a multiple of 32; and the (height, width) without padding."""
    scale = min(shortest / min(image.size), longest / max(image.size))
    width, height = (max(1, int(side * scale + 0.5)) for side in image.size)
    resized = _normalized(image.resize((width, height), Image.Resampling.BILINEAR), _MEAN, _STD)
    below, right = -height % MULTIPLE, -width % MULTIPLE
    return np.pad(resized, ((0, 0), (0, below), (0, right)))[None], (height, width)


def _clip_input(image: Image.Image, side: int = 224) -> np.ndarray:
    """Returns (3, side, side) float32: the center crop of the image with its shorter side scaled to `side`."""
    scale = side / min(image.size)
    width, height = (max(side, int(edge * scale)) for edge in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
    return _normalized(resized, _CLIP_MEAN, _CLIP_STD)


def _normalized(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    values = (np.asarray(image, np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _unit(vectors: Any) -> Any:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _features(output: Any) -> Any:
    """Returns the features from the output of a CLIP tower, which transformers 5 wraps in an object."""
    return getattr(output, "pooler_output", output)


def _load(kind: Any, directory: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(str(directory), local_files_only=True, **options)
    # A damaged file ends in whatever exception the code raises at which transformers or a library in Rust notices it;
    # a panic of the latter is no `Exception`.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise ClvrError(f"{directory}: cannot be loaded ({reason})") from error
