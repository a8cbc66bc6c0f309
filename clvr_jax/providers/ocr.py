"""Text in images by RapidOCR, on the CPU, with the weights that are in its package: the extra `ocr`."""

from __future__ import annotations

import importlib.metadata
import threading
from typing import Any

from typing_extensions import override

from clvr_jax.errors import ClvrError
from clvr_jax.files.image_io import ImageLike, pixels
from clvr_jax.reasoning.verification.text_in_images import TextLine, TextReader


class RapidTextReader(TextReader):
    """Reads Latin and Chinese text by PP-OCR, from top to bottom.

    Args:
      threads: number of threads for an image; -1 uses all cores.
    Raises: ClvrError if rapidocr or onnxruntime is not installed.
    """

    def __init__(self, threads: int = -1):
        try:
            import onnxruntime  # noqa: F401 - rapidocr has it as one of several engines, and names none that is missing
            from rapidocr import RapidOCR
        except ModuleNotFoundError as error:
            raise ClvrError(f"reading text in images needs {error.name}: pip install 'clvr-jax[ocr]'") from error
        # Models are read from the package, and nothing is fetched.
        settings = {"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": threads}
        self._engine: Any = RapidOCR(params=settings)
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Package and version."""
        return f"rapidocr {importlib.metadata.version('rapidocr')}"

    @override
    def read_text(self, image: ImageLike) -> tuple[TextLine, ...]:
        with self._lock:  # a call changes the options of the engine
            found = self._engine(pixels(image)[..., ::-1])  # it takes blue first, as OpenCV does
        if found.txts is None:
            return ()
        return tuple(TextLine(str(text), float(score)) for text, score in zip(found.txts, found.scores, strict=True))
