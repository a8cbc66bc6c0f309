"""The closed loop over 16 prompts together beside one by one, and the cost of 8 images with references cached or not.

The second part generates 8 images, each with all earlier ones as references, with each value of `reference_cache` in
turn, and prints seconds and token passes of each image: for the shipped model, and for a transformer of 100 M random
parameters. The prompt is the same for all images, so that only the references differ. `full-size` counts token passes
and FLOPs of klein 4B at 1024 x 1024, and computes nothing.

python benchmarks/bench_loop.py [--part together|generations|large|full-size]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np
from contest import contest, folder_of, show

from clvr_jax.cost_model.flops import flux2_flops, reference_cache_flops, token_passes
from clvr_jax.data.preprocessing.text import bucket_for
from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
from clvr_jax.pipelines.flux2 import KLEIN, Flux2Pipeline
from clvr_jax.pipelines.flux2.settings import ReferenceMode
from clvr_jax.worlds.shapes.prompts import train_prompt

COUNT = 16
TARGET = 3.0
IMAGES = 8
PROMPT = "two red circles above a blue square"


def loop(name: str, pipeline: ClosedLoopPipeline, prompts: list[str], seeds: list[int], rounds: int) -> None:
    """One line: the prompts in one call, and in one call each."""

    def together() -> list:
        return pipeline.run(prompts, seeds)

    def one_by_one() -> list:
        return [pipeline.run([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]

    show(name, contest(together, one_by_one, rounds), TARGET)


def together(model: str, rounds: int) -> None:
    """Training prompts, the shipped controller, the model's own number of steps."""
    pipeline = ClosedLoopPipeline.from_pretrained(model)
    prompts = [train_prompt(np.random.default_rng((7, number)))["prompt"] for number in range(COUNT)]
    print("closed loop: 16 prompts together beside one by one")
    loop(f"{model}, {COUNT} prompts", pipeline, prompts, list(range(COUNT)), rounds)
    # The same prompt and seed 16 times: all take the same way, nothing waits and nothing is drawn apart.
    middling = sorted(prompts, key=len)[COUNT // 2]
    loop(f"bound: {COUNT} times the same prompt", pipeline, [middling] * COUNT, [0] * COUNT, rounds)


def seconds_of(pipeline: Flux2Pipeline) -> list[float]:
    """Seconds of each image of a new loop."""
    pipeline.kept_references.clear()
    images, seconds = [], []
    for number in range(IMAGES):
        began = time.perf_counter()
        output = pipeline.generate_each([PROMPT], [images], [number])
        seconds.append(time.perf_counter() - began)
        images = [*images, output.images[0]]
    return seconds


def generations(title: str, model: str, rounds: int) -> None:
    """A line for each value of `reference_cache`: medians over the rounds, and the last image over the first."""
    pipelines = {mode: Flux2Pipeline.from_pretrained(model, reference_cache=mode) for mode in get_args(ReferenceMode)}
    found: dict[str, list[list[float]]] = {mode: [] for mode in pipelines}
    for number in range(rounds + 1):  # the first round compiles
        for mode, pipeline in pipelines.items():
            times = seconds_of(pipeline)
            if number:
                found[mode].append(times)
    settings, token = pipeline.settings, pipeline.vae.config.token_pixels
    text = bucket_for(pipeline.prompt_length(PROMPT), settings.text_buckets)
    image, steps = (settings.sample_size // token) ** 2, settings.num_inference_steps
    rows = pipeline.nfe_per_step
    print(f"{title}: images 1 to {IMAGES} of a loop, {text} text tokens, {image} an image, {steps} steps")
    for mode, runs in found.items():
        medians = [statistics.median(times) for times in zip(*runs, strict=True)]
        ratios = sorted(times[-1] / times[0] for times in runs)
        passes = [
            token_passes(mode, steps=steps * rows, text=text, image=image, references=number)
            for number in range(IMAGES)
        ]
        print(
            f"  {mode:<6} seconds {' '.join(f'{each:.3f}' for each in medians)}   last / first "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
        print(f"         token passes {' '.join(f'{each:,}' for each in passes)}   in all {sum(passes):,}", flush=True)


def full_size(steps: int = 4, text: int = 512, image: int = 4096) -> None:
    """Two lines for each value of `reference_cache`: token passes and FLOPs of each image."""
    config, _ = KLEIN["klein-4b"]
    print(f"klein-4b: images 1 to {IMAGES} of a loop at 1024 x 1024, {text} text tokens, {steps} steps, no guidance")
    for mode in get_args(ReferenceMode):
        passes, flops = [], []
        for number in range(IMAGES):
            passes.append(token_passes(mode, steps=steps, text=text, image=image, references=number))
            is_cached, tokens = mode != "none", number * image
            seen = {"cached" if is_cached else "references": tokens}
            flops.append(steps * flux2_flops(config, 1, text=text, image=image, **seen).forward)
            if is_cached and number:
                new = image if mode == "loop" else tokens
                flops[-1] += reference_cache_flops(config, 1, references=new, earlier=tokens - new).forward
        print(f"  {mode:<6} token passes {' '.join(f'{each:,}' for each in passes)}   in all {sum(passes):,}")
        print(
            f"         TFLOPs {' '.join(f'{each / 1e12:,.0f}' for each in flops)}   in all {sum(flops) / 1e12:,.0f}"
            f"   last / first {flops[-1] / flops[0]:.2f}"
        )


def main() -> None:
    """All parts, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="shapes-tiny", help="shipped name or folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", choices=("all", "together", "generations", "large", "full-size"), default="all")
    options = parser.parse_args()
    rounds = max(2, options.rounds // 2)
    if options.part in ("all", "together"):
        together(options.model, rounds)
    if options.part in ("all", "generations"):
        generations(options.model, options.model, options.rounds)
    if options.part in ("all", "full-size"):
        full_size()
    if options.part in ("all", "large"):
        from bench_sampling import random_folder  # imports PyTorch

        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / "random"
            random_folder(path, folder_of(options.model) / "tokenizer")
            generations("random 100 M", str(path), rounds)


if __name__ == "__main__":
    main()
