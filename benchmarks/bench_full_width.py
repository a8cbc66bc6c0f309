"""Time per NFE and per token at full width in float32, beside diffusers and transformers in the same process.

python benchmarks/bench_full_width.py
python benchmarks/bench_full_width.py --width 0.0625 --rounds 1      # tries the benchmark

The width, the heads and the lengths are those of FLUX.2 klein 4B and of Qwen3-VL 2B. Only the number of layers is
smaller, so that both implementations fit the memory in float32: about 8 GiB at the defaults. An NFE denoises 256 x 256
pixels with one reference and 512 text tokens; tokens are decoded greedily after a prompt of 512. The weights are random
and equal.
"""

import argparse
import dataclasses
import gc
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from contest import contest, show
from flax import nnx

from clvr_jax.convert.architectures import FLUX2_TRANSFORMER, QWEN3_VL
from clvr_jax.convert.models import load_model
from clvr_jax.models.common.decoding import generate
from clvr_jax.models.common.layers import read_only_weights
from clvr_jax.models.flux2 import Flux2TransformerConfig
from clvr_jax.models.flux2.position_ids import latent_ids, reference_ids, text_ids
from clvr_jax.models.qwen3_vl import Qwen3VLConfig

SIDE, TEXT = 16, 512  # tokens of a side of the image, and of the text


def main() -> None:
    """One NFE of the image transformer, then the first token and further ones of the controller's language model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=1, help="number of double-stream blocks; klein 4B has 5")
    parser.add_argument("--single", type=int, default=4, help="number of single-stream blocks; klein 4B has 20")
    parser.add_argument("--layers", type=int, default=6, help="number of layers of the controller; Qwen3-VL 2B has 28")
    parser.add_argument("--tokens", type=int, default=16, help="number of tokens of a reply")
    parser.add_argument("--width", type=float, default=1.0, help="part of the heads and of the vocabulary")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured runs")
    parser.add_argument("--only", choices=("nfe", "tokens"), help="measure only this part; both by default")
    options = parser.parse_args()
    if options.only != "tokens":
        _nfe(options)
        gc.collect()
    if options.only != "nfe":
        _tokens(options)


def _nfe(options: argparse.Namespace) -> None:
    full = Flux2TransformerConfig.klein_4b()
    heads = max(1, round(full.num_attention_heads * options.width))
    config = dataclasses.replace(
        full, num_layers=options.double, num_single_layers=options.single, num_attention_heads=heads
    )
    fields = FLUX2_TRANSFORMER.config_to_dict(config)
    theirs: Any = _randomize(diffusers.Flux2Transformer2DModel.from_config(fields))
    ours = _ours(theirs, FLUX2_TRANSFORMER)
    rng = np.random.default_rng(0)
    image_ids = np.concatenate([latent_ids(SIDE, SIDE), reference_ids([(SIDE, SIDE)])])
    tokens = rng.normal(size=(1, len(image_ids), config.in_channels)).astype(np.float32)
    text = rng.normal(size=(1, TEXT, config.joint_attention_dim)).astype(np.float32)
    graphdef, state = nnx.split(ours)

    @jax.jit
    def evaluate(state: Any, tokens: jax.Array, text: jax.Array, timestep: jax.Array) -> jax.Array:
        with read_only_weights():
            out: jax.Array = nnx.merge(graphdef, state)(tokens, text, timestep, image_ids, text_ids(TEXT))
        return out

    def run() -> np.ndarray:
        return np.asarray(evaluate(state, tokens, text, jnp.full(1, 0.7)))

    def run_theirs() -> np.ndarray:
        with torch.no_grad():
            (out,) = theirs(
                hidden_states=torch.tensor(tokens),
                encoder_hidden_states=torch.tensor(text),
                timestep=torch.full((1,), 0.7),
                img_ids=torch.tensor(image_ids)[None],
                txt_ids=torch.tensor(text_ids(TEXT))[None],
                return_dict=False,
            )
        return np.asarray(out)

    _compare(run(), run_theirs())
    title = f"NFE, {options.double} + {options.single} blocks of width {config.inner_dim}"
    show(title, contest(run, run_theirs, options.rounds), 1.0)


def _tokens(options: argparse.Namespace) -> None:
    full = Qwen3VLConfig.qwen3_vl_2b()
    heads = max(full.text.num_key_value_heads, round(full.text.num_attention_heads * options.width))
    width = heads * full.text.head_dim
    text = dataclasses.replace(
        full.text,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        hidden_size=width,
        intermediate_size=3 * width,
        vocab_size=round(full.text.vocab_size * options.width),
    )
    # The prompt has no images, so that the vision tower is not used; one layer of it is the least that there can be.
    vision = dataclasses.replace(full.vision, depth=1, deepstack_visual_indexes=(0,), out_hidden_size=width)
    fields = QWEN3_VL.config_to_dict(dataclasses.replace(full, text=text, vision=vision))
    configuration = transformers.Qwen3VLConfig.from_dict(fields)
    theirs: Any = _randomize(transformers.Qwen3VLForConditionalGeneration(configuration))
    ours = _ours(theirs, QWEN3_VL)
    ids = np.random.default_rng(0).integers(0, min(text.vocab_size, 1000), (1, TEXT)).astype(np.int32)
    inputs = {
        "input_ids": torch.tensor(ids, dtype=torch.int64),
        "attention_mask": torch.ones(1, TEXT, dtype=torch.int64),
    }
    for tokens in (1, options.tokens):

        def run(tokens: int = tokens) -> np.ndarray:
            return np.asarray(generate(ours, {"input_ids_bt": ids}, max_new_tokens=tokens).tokens_bn)

        def run_theirs(tokens: int = tokens) -> np.ndarray:
            given = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
            with torch.no_grad():
                return theirs.generate(**inputs, **given)[:, TEXT:].numpy()

        _compare(run(), run_theirs())
        title = f"{tokens} tokens after {TEXT}, {options.layers} layers of width {width}"
        show(title, contest(run, run_theirs, options.rounds), 1.0)


def _ours(theirs: Any, architecture: Any) -> Any:
    """Returns our model with the weights of a PyTorch model, which go through files."""
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return load_model(Path(directory), architecture)


def _randomize(module: Any) -> Any:
    """Gives every parameter small random values, so that no activation grows with the width."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
    return module.eval()


def _compare(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Ends the benchmark if the implementations do not compute the same."""
    difference = np.abs(ours.astype(np.float64) - theirs).max() / np.abs(theirs).max()
    if not difference < 1e-3:
        raise SystemExit(f"the results differ by {difference:.1e} of the largest value; no times are compared")


if __name__ == "__main__":
    main()
