"""Programs of full-size models with random weights, timed on one device: sampling, decoding and training steps.

python benchmarks/one_gpu.py --measure sampling --results runs/one_gpu.jsonl

The programs are those that `clvr plan` compiles: FLUX.2 klein 4B and Qwen3-VL 8B in bfloat16. Nothing is read from the
disk. `benchmarks/one_gpu.sh` runs each group in a process of its own, and writes the table of docs/results/gpus.md.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from clvr_jax.configs import flux2_lora, flux2_sample, flux2_sft, pprl_flux2
from clvr_jax.convert.architectures import QWEN3_VL
from clvr_jax.models.common.decoding import generate
from clvr_jax.models.common.lora import LoRAConfig
from clvr_jax.models.qwen3_vl import Qwen3VLConfig
from clvr_jax.pipelines.flux2 import KLEIN
from clvr_jax.tasks.flux2 import LORA_TARGETS
from clvr_jax.training.optimization.step import TrainState, make_train_step

MARKS = ("<!-- table of benchmarks/one_gpu.sh -->", "<!-- end of the table -->")
ROUNDS = 3
TOKENS = 128
Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the programs generate and train: pixels of a side, references, images of a group, and prompt tokens."""

    side: int = 1024
    references: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7)
    rl_side: int = 512
    group: int = 16
    prompt: int = 192


def main() -> None:
    """Measures a group of programs and adds a line of JSON for each, or prints the table of such lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", choices=_GROUPS, help="measure this group of programs")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines; new ones are added at its end")
    parser.add_argument("--small", action="store_true", help="small models and images, to try the benchmark")
    parser.add_argument("--failed", nargs=2, metavar=("GROUP", "REASON"), help="add a line that says why there is none")
    parser.add_argument("--write", type=Path, help="write the table into this document, between its two marks")
    options = parser.parse_args()
    if options.failed:
        _add(options.results, {"name": _GROUPS[options.failed[0]][0], "error": options.failed[1]})
    sizes = Sizes(64, (0, 1), 64, 2, 32) if options.small else Sizes()
    if options.small:
        _use_small_models()
    if options.measure:
        title, measure = _GROUPS[options.measure]
        try:
            for fields in measure(sizes, options.small):
                _add(options.results, fields)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            _add(options.results, {"name": title, "error": "does not fit the memory"})
    if not options.measure and not options.failed:
        lines = table([json.loads(line) for line in options.results.read_text().splitlines()])
        print("\n".join(lines))
        if options.write:
            write_table(options.write, lines)


def _add(results: Path, fields: Fields) -> None:
    with results.open("a") as file:
        file.write(json.dumps(fields) + "\n")
    print(" | ".join(_row(fields)), flush=True)


def _use_small_models() -> None:
    transformer, encoder = KLEIN["klein-4b"]
    encoder = dataclasses.replace(
        encoder, vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16,
    )  # fmt: skip
    transformer = dataclasses.replace(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * 32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    KLEIN["klein-4b"] = (transformer, encoder)


def _chat_config(is_small: bool) -> Qwen3VLConfig:
    config = Qwen3VLConfig.qwen3_vl_8b()
    if not is_small:
        return config
    text = dataclasses.replace(
        config.text, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, mrope_section=(2, 3, 3),
    )  # fmt: skip
    vision = dataclasses.replace(
        config.vision, depth=4, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=32,
        deepstack_visual_indexes=(0, 1, 2),
    )  # fmt: skip
    return dataclasses.replace(config, text=text, vision=vision)


def _sampling(sizes: Sizes, is_small: bool) -> Iterator[Fields]:
    weights = None
    for references in sizes.references:
        config = flux2_sample.Config(batch_size=1, size=sizes.side, references=references)
        program = flux2_sample.program(config)
        weights = random_values(program.weights) if weights is None else weights
        name = f"klein 4B, image of {sizes.side} x {sizes.side}, {config.steps} NFE, {_references(references)}"
        yield _measured(name, jax.jit(program.function), (weights, random_values(program.data)), program.flops)


def _decoding(sizes: Sizes, is_small: bool) -> Iterator[Fields]:
    config = _chat_config(is_small)
    graphdef, state = QWEN3_VL.split(QWEN3_VL.config_to_dict(config), jnp.bfloat16)
    model = nnx.merge(graphdef, random_values(state))
    vision = config.vision
    side = sizes.side // vision.patch_size
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    visual = (side // vision.spatial_merge_size) ** 2
    ids = np.full((1, visual + sizes.prompt), 5, np.int32)
    ids[0, :visual] = config.image_token_id
    prompts = {
        "input_ids_bt": ids,
        "pixel_values": np.zeros((1, side * side, features), np.float32),
        "grid_thw": ((1, side, side),),
    }
    seconds = {}
    for tokens in (1, TOKENS):
        seconds[tokens], compile_seconds = _timed(
            lambda tokens=tokens: generate(model, prompts, max_new_tokens=tokens).tokens_bn
        )
    name = f"Qwen3-VL 8B, one image of {sizes.side} x {sizes.side} and {sizes.prompt} tokens"
    memory = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    yield _fields(f"{name}: first token", seconds[1], compile_seconds, memory)
    each = (seconds[TOKENS] - seconds[1]) / (TOKENS - 1)
    yield _fields(f"{name}: each further token", each, compile_seconds, memory)


def _lora(sizes: Sizes, is_small: bool) -> Iterator[Fields]:
    config = flux2_lora.Config(size=sizes.side, batch_size=1, references=1)
    yield _train_step("klein 4B, SFT step of a LoRA of rank 16", flux2_lora, config, sizes)


def _sft(sizes: Sizes, is_small: bool) -> Iterator[Fields]:
    config = flux2_sft.Config(size=sizes.side, batch_size=1, references=1, remat="full")
    yield _train_step("klein 4B, SFT step of all weights, with EMA", flux2_sft, config, sizes)


def _train_step(title: str, recipe: Any, config: Any, sizes: Sizes) -> Fields:
    task, optimizer = recipe.abstract_task(config), config.train.optimizer()
    batch = task.batches(0)
    step = make_train_step(task.loss, optimizer, config.train.step)
    state = jax.jit(lambda params: TrainState.create(params, optimizer))(random_values(task.params))
    name = f"{title}, one image of {sizes.side} x {sizes.side}, one reference"
    assert task.flops is not None
    arguments = (state, random_values(task.frozen), random_values(batch))
    return _measured(name, step, arguments, task.flops(batch), is_state_donated=True)


def _nft(sizes: Sizes, is_small: bool) -> Iterator[Fields]:
    lora = LoRAConfig(rank=4, alpha=4.0, targets=LORA_TARGETS) if is_small else pprl_flux2.CONFIG.train.lora
    train = dataclasses.replace(pprl_flux2.CONFIG.train, lora=lora, group_size=sizes.group)
    sampler = dataclasses.replace(pprl_flux2.CONFIG.sampler, size=sizes.rl_side)
    titles = {"update": f"one timestep of a group of {sizes.group}", "rollout": f"rollout of a group of {sizes.group}"}
    for planned, title in titles.items():
        config = dataclasses.replace(
            pprl_flux2.CONFIG, train=train, sampler=sampler, planned=planned, references=1, remat="full"
        )
        program = pprl_flux2.program(config)
        images = f"{sizes.rl_side} x {sizes.rl_side}, one reference"
        name = f"klein 4B, NFT with a LoRA of rank {lora.rank}: {title}, {images}"
        arguments = random_values((dict(program.weights), program.data))
        yield _measured(name, jax.jit(program.function), arguments, program.flops)


_GROUPS: dict[str, tuple[str, Callable[[Sizes, bool], Iterator[Fields]]]] = {
    "sampling": ("klein 4B, images with all numbers of references", _sampling),
    "decoding": ("Qwen3-VL 8B", _decoding),
    "lora": ("klein 4B, SFT step of a LoRA", _lora),
    "nft": ("klein 4B, update and rollout of NFT", _nft),
    "sft": ("klein 4B, SFT step of all weights, with EMA", _sft),
}
"""Programs that are measured in one process: what they are, and the function that measures them."""


def random_values(shapes: Any) -> Any:
    """Returns arrays of the shapes and dtypes of a tree: small positive numbers, and ones for integers."""

    # The same numbers again and again, from the host: a program for each shape would take minutes to compile.
    block = np.random.default_rng(0).uniform(0.0, 0.02, 1_000_003).astype(np.float32)
    blocks = {np.dtype(dtype): block.astype(dtype) for dtype in (np.float32, jnp.bfloat16)}

    def make(leaf: Any) -> jax.Array:
        values = blocks.get(np.dtype(leaf.dtype))
        return jax.device_put(np.ones(leaf.shape, leaf.dtype) if values is None else np.resize(values, leaf.shape))

    return jax.tree.map(make, shapes)


def _measured(
    name: str, function: Any, arguments: tuple[Any, ...], flops: float, *, is_state_donated: bool = False
) -> Fields:
    """Compiles and runs a program. is_state_donated: the first of its results is the first argument of the next run."""
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    held += memory.generated_code_size_in_bytes - memory.alias_size_in_bytes
    first, *rest = arguments
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        result = jax.block_until_ready(compiled(first, *rest))
        times.append(time.perf_counter() - began)
        first = result[0] if is_state_donated else first
    return _fields(name, statistics.median(times[1:]), compile_seconds, held, flops)


def _timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Returns the median seconds of a call, and how much longer the first one took."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[1:])
    return seconds, times[0] - seconds


def _fields(
    name: str, seconds: float, compile_seconds: float, memory: float | None, flops: float | None = None
) -> Fields:
    return {
        "name": name,
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "memory_gib": None if memory is None else memory / 2**30,
        "tflops": None if flops is None else flops / seconds / 1e12,
        **_device(),
    }


def _device() -> Fields:
    device = jax.local_devices()[0]
    return {"device": device.device_kind, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}


def _references(count: int) -> str:
    return "one reference" if count == 1 else f"{count or 'no'} references"


def _row(fields: Fields) -> list[str]:
    if "error" in fields:
        return [fields["name"], f"not measured: {fields['error']}", "", "", ""]
    memory, rate = fields["memory_gib"], fields["tflops"]
    return [
        fields["name"],
        _time(fields["seconds"]),
        "" if memory is None else f"{memory:.1f} GiB",
        "" if rate is None else f"{rate:.3g}",
        f"{fields['compile_seconds']:.0f} s",
    ]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def table(results: list[Fields]) -> list[str]:
    """Returns the lines of a Markdown table of results, with the device before it."""
    device: Fields = next((each for each in results if "device" in each), {})
    about = f"{device['device']}, JAX {device['jax']}, {device['date']}:" if device else "Nothing was measured:"
    rows = [["program", "time", "memory", "TFLOP/s", "compilation"], ["---"] * 5, *map(_row, results)]
    return [about, "", *(f"| {' | '.join(row)} |" for row in rows)]


def write_table(document: Path, lines: list[str]) -> None:
    """Replaces what is between the two marks of a document."""
    before, mark, rest = document.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise SystemExit(f"{document}: has no line {MARKS[0]} with {MARKS[1]} after it")
    document.write_text("\n".join([before + mark, "", *lines, "", end + after]))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
