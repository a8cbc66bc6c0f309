"""FLUX.2 klein 4B and Qwen3-VL 2B at their real shapes with random bfloat16 weights: loading, an image, a reply.

python benchmarks/bench_full_size.py --directory /tmp

This needs 20 GB of disk and 16 GB of memory. Each measurement runs in its own process, because the peak of resident
memory is that of a process. Loading is compared with reading the bytes of the same tensors into fresh memory, one
after another, before and after it. --keep leaves the models on the disk, and --steps then runs the steps one by one.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

STEPS = ("make", "load", "generate", "reply")
PARTS = {"transformer": "klein/transformer", "text_encoder": "klein/text_encoder", "controller": "qwen3_vl"}
ALLOWED_SECONDS, ALLOWED_GIB = 2.0, 1.5
_BLOCK = 1 << 24


def main() -> None:
    """Makes the directories, measures, prints a table and removes the directories."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="write the models here; a temporary directory if not given")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--keep", action="store_true", help="leave the models on the disk")
    parser.add_argument(
        "--blocks", type=int, help="number of blocks of each kind, to try the benchmark; the real number if not given"
    )
    parser.add_argument("--side", type=int, default=256, help="height and width of the image and of its reference")
    parser.add_argument("--nfe", type=int, default=1, help="number of network evaluations (NFE)")
    parser.add_argument("--tokens", type=int, default=8, help="number of tokens of the reply")
    parser.add_argument("--quantize", choices=["int8"], help="for every step; bfloat16 if not given")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(_PARTS[options.part.split(":")[0]](options)))
        return
    root = options.directory / "clvr-full-size" if options.directory else Path(tempfile.mkdtemp())
    try:
        if "make" in options.steps:
            began = time.perf_counter()
            make(root, options.blocks)
            print(f"models: {_directory_gib(root):.1f} GiB, made in {time.perf_counter() - began:.0f} s", flush=True)
        if "load" in options.steps:
            for part in PARTS:
                # The first reading fills the page cache. The fastest of each kind counts.
                kinds = ("read", "load", "read", "load", "read")
                found = [_measured(root, options, f"{kind}:{part}") for kind in kinds]
                load = min((each for each in found if "peak" in each), key=lambda each: each["seconds"])
                seconds = min(each["seconds"] for each in found if "peak" not in each)
                print(
                    f"load {part}: {load['gib']:.2f} GiB in {load['seconds']:.1f} s, reading {seconds:.1f} s, "
                    f"{load['seconds'] / seconds:.2f} x (target {ALLOWED_SECONDS:.0f} x); peak {load['peak']:.2f} GiB, "
                    f"{load['peak'] - load['gib']:.2f} GiB more than the weights (target {ALLOWED_GIB})",
                    flush=True,
                )
        if "generate" in options.steps:
            found = _measured(root, options, "generate:")
            print(
                f"generate {options.side} x {options.side}, one reference, NFE {options.nfe}: loading "
                f"{found['load']:.0f} s, generation {found['seconds']:.0f} s with compilation; weights "
                f"{found['gib']:.2f} GiB, peak {found['peak']:.2f} GiB",
                flush=True,
            )
        if "reply" in options.steps:
            found = _measured(root, options, "reply:")
            print(
                f"reply of {found['tokens']} tokens to one image of 256 x 256: loading {found['load']:.0f} s, "
                f"{found['seconds']:.0f} s with compilation, {found['again']:.1f} s again; weights "
                f"{found['gib']:.2f} GiB, peak {found['peak']:.2f} GiB",
                flush=True,
            )
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)


def _measured(root: Path, options: argparse.Namespace, part: str) -> dict[str, Any]:
    arguments = [sys.executable, __file__, "--directory", str(root), "--part", part]
    for name in ("side", "nfe", "tokens", "quantize"):
        if getattr(options, name) is not None:
            arguments += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make(root: Path, blocks: int | None) -> None:
    """Writes both models; layers of the text encoder that are never read are holes in its files."""
    from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, FLUX2_VAE, QWEN3, QWEN3_VL
    from clvr_jax.data.preprocessing.qwen3_vl_images import Qwen3VLImageProcessor, processor_to_dict
    from clvr_jax.files.atomic_io import read_json
    from clvr_jax.models.flux2 import AutoencoderKLFlux2Config
    from clvr_jax.models.qwen3_vl import Qwen3VLConfig
    from clvr_jax.pipelines.flux2 import KLEIN
    from clvr_jax.pipelines.registry import SHIPPED

    transformer, encoder = KLEIN["klein-4b"]
    chat = Qwen3VLConfig.qwen3_vl_2b()
    small = QWEN3_VL.config_from_dict(read_json(SHIPPED / "shapes-tiny" / "controller" / "config.json"))
    named = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    chat = dataclasses.replace(chat, **{name: getattr(small, name) for name in named})
    settings: dict[str, Any] = {"is_distilled": True, "num_inference_steps": 4}
    if blocks is not None:
        transformer = dataclasses.replace(transformer, num_layers=blocks, num_single_layers=blocks)
        encoder = dataclasses.replace(encoder, num_hidden_layers=3)
        settings["text_encoder_out_layers"] = [1, 2, 3]
        text = dataclasses.replace(chat.text, num_hidden_layers=3)
        vision = dataclasses.replace(chat.vision, depth=3, deepstack_visual_indexes=(0, 1, 2))
        chat = dataclasses.replace(chat, text=text, vision=vision)
    klein, tokens = root / "klein", SHIPPED / "shapes-tiny" / "tokenizer"
    klein.mkdir(parents=True)
    _write_model(klein / "transformer", FLUX2_TRANSFORMER, transformer)
    _write_model(klein / "text_encoder", QWEN3, encoder, skip=range(27, 36))
    _write_model(klein / "vae", FLUX2_VAE, AutoencoderKLFlux2Config())
    shutil.copytree(tokens, klein / "tokenizer")
    shutil.copytree(SHIPPED / "shapes-tiny" / "scheduler", klein / "scheduler")
    (klein / "clvr.json").write_text(json.dumps({"flux2": {k: v for k, v in settings.items() if k != "is_distilled"}}))
    (klein / "model_index.json").write_text(json.dumps({"_class_name": "Flux2KleinPipeline", "is_distilled": True}))
    _write_model(root / "qwen3_vl", QWEN3_VL, chat)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHIPPED / "shapes-tiny" / "controller" / name, root / "qwen3_vl")
    processor = processor_to_dict(Qwen3VLImageProcessor())
    (root / "qwen3_vl" / "preprocessor_config.json").write_text(json.dumps(processor))


def _write_model(directory: Path, architecture: Any, config: Any, skip: range = range(0)) -> None:
    from clvr_jax.checkpoint_io.disk import put
    from clvr_jax.checkpoint_io.tensors import FLOATS, TensorSpec, preallocate_files

    fields = architecture.config_to_dict(config)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    specs = [
        TensorSpec(key, entry.torch_shape, np.dtype(entry.torch_dtype) if entry.torch_dtype else FLOATS["bfloat16"])
        for entry in architecture.entries(fields)
        for key in entry.keys
    ]
    # The same small numbers again and again: sampling billions of them would take minutes.
    block = (np.random.default_rng(0).normal(size=_BLOCK).astype(np.float32) / 50).astype(FLOATS["bfloat16"])
    for stored in preallocate_files(directory, specs, architecture.file_name).values():
        if any(f".layers.{layer}." in stored.key for layer in skip):
            continue
        if stored.dtype != block.dtype:
            put(stored.file, stored.offset, np.zeros(stored.shape, stored.dtype))
            continue
        size = stored.nbytes // block.itemsize
        for begin in range(0, size, _BLOCK):
            values = block[: min(_BLOCK, size - begin)]
            values = np.abs(values) if stored.key.endswith("running_var") else values
            put(stored.file, stored.offset + begin * block.itemsize, values)


def _stored(options: argparse.Namespace) -> tuple[Path, Any, list[Any]]:
    """Returns the directory of a model, its architecture and the tensors that are used."""
    from clvr_jax.checkpoint_io.tensors import stored_tensors
    from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, QWEN3_VL, qwen3_hidden_states
    from clvr_jax.files.atomic_io import read_json

    part = options.part.split(":")[1]
    config = read_json(options.directory / "klein" / "clvr.json")["flux2"]
    layers = tuple(config.get("text_encoder_out_layers", (9, 18, 27)))
    architecture = {
        "transformer": FLUX2_TRANSFORMER,
        "text_encoder": qwen3_hidden_states(layers),
        "controller": QWEN3_VL,
    }[part]
    directory = options.directory / PARTS[part]
    stored = architecture.canonicalize_keys(
        stored_tensors(directory), architecture.config_from_dict(read_json(directory / "config.json"))
    )
    return directory, architecture, list(stored.values())


def _read(options: argparse.Namespace) -> dict[str, Any]:
    _, _, stored = _stored(options)
    began = time.perf_counter()
    held = []
    for tensor in stored:
        with tensor.file.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            memory = bytearray(tensor.nbytes) if tensor.nbytes < 4096 else np.empty(tensor.nbytes, np.uint8)
            view = memoryview(memory)
            done = 0
            while done < tensor.nbytes:
                done += file.readinto(view[done:])
            held.append(memory)
    return {"seconds": time.perf_counter() - began, "gib": sum(tensor.nbytes for tensor in stored) / 2**30}


def _load(options: argparse.Namespace) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from clvr_jax.convert.models import load_model

    directory, architecture, _ = _stored(options)
    jax.block_until_ready(jnp.zeros(8) + 1)
    began = time.perf_counter()
    model = load_model(directory, architecture, jnp.bfloat16, quantize=options.quantize)
    jax.block_until_ready(nnx.state(model))
    return {"seconds": time.perf_counter() - began, **_memory(model)}


def _generate(options: argparse.Namespace) -> dict[str, Any]:
    from PIL import Image

    from clvr_jax.pipelines.flux2 import Flux2Pipeline

    began = time.perf_counter()
    pipeline = Flux2Pipeline.from_pretrained(str(options.directory / "klein"), "bfloat16", quantize=options.quantize)
    loaded = time.perf_counter()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (options.side, options.side, 3), np.uint8))
    size = {"height": options.side, "width": options.side}
    pipeline("a red circle", [photo], num_inference_steps=options.nfe, **size)
    seconds = time.perf_counter() - loaded
    return {
        "load": loaded - began,
        "seconds": seconds,
        **_memory(pipeline.transformer, pipeline.text_encoder, pipeline.vae),
    }


def _reply(options: argparse.Namespace) -> dict[str, Any]:
    from PIL import Image

    from clvr_jax.pipelines.qwen3_vl import Qwen3VLPipeline

    began = time.perf_counter()
    pipeline = Qwen3VLPipeline.from_pretrained(options.directory / "qwen3_vl", "bfloat16", quantize=options.quantize)
    times = [time.perf_counter()]
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red circle"}]}]
    for _ in range(2):
        (answer,) = pipeline.answer_all([chat], [[photo]], options.tokens)
        times.append(time.perf_counter())
    return {
        "load": times[0] - began,
        "seconds": times[1] - times[0],
        "again": times[2] - times[1],
        "tokens": answer.output_tokens,
        **_memory(pipeline.model),
    }


def _memory(*models: Any) -> dict[str, float]:
    from flax import nnx

    from clvr_jax.models.common.quantization import weight_bytes

    held = sum(weight_bytes(nnx.state(model)) for model in models)
    return {"gib": held / 2**30, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def _directory_gib(root: Path) -> float:
    def blocks() -> Iterator[int]:
        for directory, _, files in os.walk(root):
            yield from (os.stat(os.path.join(directory, file)).st_blocks * 512 for file in files)

    return sum(blocks()) / 2**30


_PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "read": _read,
    "load": _load,
    "generate": _generate,
    "reply": _reply,
}

if __name__ == "__main__":
    main()
