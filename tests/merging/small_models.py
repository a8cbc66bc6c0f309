"""What the tests of merged folders share: small FLUX.2 transformers that were tuned from one base, in shards."""

import dataclasses
import hashlib
import json
from contextlib import contextmanager

import numpy as np
import pytest

from clvr_jax.checkpoint_io.tensors import FLOATS, stored_tensors, write_tensors
from clvr_jax.convert.architectures import FLUX2_TRANSFORMER
from clvr_jax.merging import streaming
from clvr_jax.models.flux2 import Flux2TransformerConfig

CONFIG = Flux2TransformerConfig(
    in_channels=12,
    num_layers=2,
    num_single_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=20,
    timestep_guidance_channels=32,
    axes_dims_rope=(2, 6, 6, 2),
    guidance_embeds=False,
)
KEY = "single_transformer_blocks.1.attn.to_out.weight"
FILE = "diffusion_pytorch_model"
ROLES = ("base", "distill", "align")


def random_tensors(seed, config=CONFIG):
    """Random float64 weights, in no order of their own."""
    random = np.random.default_rng(seed)
    entries = FLUX2_TRANSFORMER.entries(FLUX2_TRANSFORMER.config_to_dict(config))
    return {key: 0.3 * random.normal(size=entry.torch_shape) for entry in entries for key in entry.keys}


def tuned(tensors, seed, spread=0.01):
    random = np.random.default_rng(seed)
    return {key: values + spread * random.normal(size=values.shape) for key, values in tensors.items()}


def write_model(folder, tensors, dtype="float32", shards=1, **changed):
    """A transformer folder; `changed` are fields of its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = FLUX2_TRANSFORMER.config_to_dict(dataclasses.replace(CONFIG, **changed))
    (folder / "config.json").write_text(json.dumps(config))
    cast = {key: np.asarray(values).astype(FLOATS[dtype]) for key, values in tensors.items()}
    size = sum(values.nbytes for values in cast.values())
    write_tensors(folder, cast, FILE, size // shards + 1)
    return folder


def three_models(root, dtypes=("float32",) * 3, shards=(1, 1, 1)):
    """Folders base, distill, align."""
    base = random_tensors(0)
    sides = base, tuned(base, 1), tuned(base, 2)
    return [
        write_model(root / role, tensors, dtype, count)
        for role, tensors, dtype, count in zip(ROLES, sides, dtypes, shards, strict=True)
    ]


def tensors_of(folder):
    return {key: np.array(stored.open()) for key, stored in stored_tensors(folder).items()}


def edit(folder, change, config=None):
    """Changes the tensors of a model of one file, and its config.json."""
    tensors = tensors_of(folder)
    change(tensors)
    write_tensors(folder, tensors, FILE)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))


def bits(folder):
    return {key: (s.dtype.name, s.shape, s.open().tobytes()) for key, s in stored_tensors(folder).items()}


def sha256(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def interrupt():
    raise KeyboardInterrupt


@contextmanager
def before_tensor(number, act):
    """Calls `act` before a merge computes this tensor, counted from 0."""
    real, count = streaming._merged, iter(range(number))

    def merged(*arguments):
        nonlocal count
        if count is not None and next(count, None) is None:
            count = None
            act()
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "_merged", merged)
        yield
