"""What judging costs beside the judge: the share of one core that is busy while many questions are in flight.

PYTHONPATH=. python benchmarks/bench_judging.py

Images in GenEval++'s layout are scored by an endpoint on loopback that answers after a second, as soon as a model can
have looked at an image and written its verdict, 64 questions at a time; then once more, with every answer on disk. The
target is 30 % of one core. The server is a process of its own. What a call costs is mostly the openai package's,
whatever the delay, so the share grows as that falls: try --delay 0.2.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from endpoint import endpoint
from PIL import Image

from clvr_jax.evaluation.benchmarks.genevalpp import GenEvalPP
from clvr_jax.evaluation.harness.images import BenchmarkImages, load_external
from clvr_jax.evaluation.harness.scoring import score_images
from clvr_jax.evaluation.judging.judges import endpoint_judge
from clvr_jax.evaluation.judging.scorer import JudgeScorer
from tests.providers.server import KEY, completion


def main() -> None:
    """Prints both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=64, help="pixels of a side")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--delay", type=float, default=1.0, help="seconds before the endpoint answers")
    options = parser.parse_args()
    os.environ["LOOPBACK_KEY"] = KEY
    with endpoint(_answer, options.delay) as server, tempfile.TemporaryDirectory() as folder:
        images = _images(Path(folder), options.images, options.size)
        ideal = options.images / options.in_flight * options.delay
        for name in ("with the judge", "from its answers on disk"):
            judge = endpoint_judge("tiny", server.url, "LOOPBACK_KEY", in_flight=options.in_flight)
            began, busy = time.monotonic(), time.process_time()
            score_images(images, JudgeScorer(judge))
            seconds, busy = time.monotonic() - began, time.process_time() - busy
            print(
                f"{options.images} images of {options.size} x {options.size}, {name}: {seconds:.1f} s "
                f"(the judge alone {ideal:.1f} s), {busy / options.images * 1e3:.2f} ms of processor time per image, "
                f"{busy / seconds:.0%} of one core"
            )
            ideal = 0.0


def _answer(path: str, request: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = completion('{"correct": 1, "reason": "all is there"}').content
    return content


def _images(folder: Path, count: int, size: int) -> BenchmarkImages:
    """Noise, for the prompts of one tag."""
    entry = {"tag": "counting", "include": [{"class": "cup", "count": 5}], "prompt": "A photo of five cups"}
    (folder / "prompts.jsonl").write_text(f"{json.dumps(entry)}\n" * count)
    rng = np.random.default_rng(0)
    for number in range(1, count + 1):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{number}.jpg")
    benchmark = GenEvalPP()
    return load_external(benchmark, benchmark.read(folder / "prompts.jsonl"), folder, 1, folder / "out")


if __name__ == "__main__":
    main()
