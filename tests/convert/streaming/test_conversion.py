import errno
import json
import math
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from clvr_jax.checkpoint_io import tensors
from clvr_jax.checkpoint_io.orbax_tree import PARAMS
from clvr_jax.checkpoint_io.tensors import stored_tensors, write_tensors
from clvr_jax.convert import models
from clvr_jax.convert.architectures import architecture_of
from clvr_jax.convert.models import load_model
from clvr_jax.convert.rules import leaves_of
from clvr_jax.convert.streaming import conversion as module
from clvr_jax.convert.streaming.conversion import convert
from clvr_jax.convert.streaming.planning import plan
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.flux2 import Flux2Pipeline
from clvr_jax.pipelines.registry import SHIPPED

SHAPES = SHIPPED / "shapes-tiny"
MODELS = ("controller", "text_encoder", "transformer", "transformer_base", "transformer_sft", "vae")


def bits(folder):
    return {key: (s.dtype, s.shape, s.open().tobytes()) for key, s in stored_tensors(folder).items()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The shipped pipeline as a JAX folder."""
    folder = tmp_path_factory.mktemp("convert") / "jax"
    assert convert(plan(SHAPES, "jax"), folder) == []
    return folder


def test_every_model_returns_bit_for_bit_with_all_files_beside_it(converted, tmp_path):
    conversion = plan(converted, "torch")
    assert [component.name for component in conversion.components] == list(MODELS)
    seen = []
    convert(conversion, tmp_path / "torch", on_tensor=seen.append)
    assert len(seen) == conversion.tensors
    for name in MODELS:
        assert bits(tmp_path / "torch" / name) == bits(SHAPES / name), name

    def others(root):
        files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".safetensors")
        return {str(path.relative_to(root)): path.read_bytes() for path in files}

    assert others(tmp_path / "torch") == others(SHAPES)


def test_a_broken_link_or_a_pipe_beside_the_weights_is_named(tmp_path):
    shutil.copytree(SHAPES / "vae", tmp_path / "vae")
    beside = tmp_path / "vae" / "generation_config.json"
    for make in (lambda: beside.symlink_to("nowhere"), lambda: os.mkfifo(beside)):
        make()
        with pytest.raises(ClvrError, match=r"generation_config.json: a broken link, or no file"):
            plan(tmp_path / "vae", "jax")
        beside.unlink()


def test_orbax_restores_what_was_written(converted):
    architecture = architecture_of(SHAPES / "transformer")
    config = json.loads((SHAPES / "transformer" / "config.json").read_text())
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore((converted / "transformer" / PARAMS).absolute())
    tensors = load_file(SHAPES / "transformer" / "diffusion_pytorch_model.safetensors")
    for entry in architecture.entries(config):
        leaf = restored
        for name in entry.path:
            leaf = leaf[str(name)]
        expected = entry.from_torch([tensors[key] for key in entry.keys])
        assert leaf.dtype == expected.dtype
        assert np.array_equal(np.asarray(leaf), expected), entry.path


def test_a_tree_that_orbax_saved_is_converted_too(converted, tmp_path):
    shutil.copytree(converted / "vae", tmp_path / "vae")
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore((converted / "vae" / PARAMS).absolute())
        shutil.rmtree(tmp_path / "vae" / PARAMS)
        checkpointer.save(tmp_path / "vae" / PARAMS, tree)
    convert(plan(tmp_path / "vae", "torch"), tmp_path / "torch")
    assert bits(tmp_path / "torch") == bits(SHAPES / "vae")


def test_a_pipeline_loads_from_either_format(converted):
    ours = Flux2Pipeline.from_pretrained(str(converted))
    theirs = Flux2Pipeline.from_pretrained("shapes-tiny")
    for part in ("transformer", "vae", "text_encoder"):
        found, expected = leaves_of(getattr(ours, part)), leaves_of(getattr(theirs, part))
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[path], expected[path]) for path in expected), part


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_what_a_cast_gives(tmp_path, dtype):
    convert(plan(SHAPES / "vae", "jax", dtype), tmp_path / "jax")
    convert(plan(tmp_path / "jax", "torch"), tmp_path / "torch")
    source, found = stored_tensors(SHAPES / "vae"), stored_tensors(tmp_path / "torch")
    for key, stored in source.items():
        target = np.dtype(module.FLOATS[dtype]) if stored.dtype.kind == "f" else stored.dtype
        assert found[key].dtype == target
        assert found[key].open().tobytes() == stored.open().astype(target).tobytes(), key


@pytest.mark.parametrize("to", ["jax", "torch"])
def test_a_run_that_was_killed_goes_on_and_ends_the_same(converted, tmp_path, monkeypatch, to):
    source = (SHAPES if to == "jax" else converted) / "text_encoder"
    whole = tmp_path / "whole"
    convert(plan(source, to), whole)
    written, real = [], module._seen_as

    def counted(source, values, tensor_slice, to):
        written.append(tensor_slice.spec.key)
        return real(source, values, tensor_slice, to)

    class Killed(BaseException):
        pass

    told = []

    def kill(name):
        told.append(name)
        if len(told) == 30:
            raise Killed

    monkeypatch.setattr(module, "_seen_as", counted)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        convert(plan(source, to), out, on_tensor=kill)
    assert not out.exists()
    with pytest.raises(UsageError, match="--resume"):
        convert(plan(source, to), out)
    with pytest.raises(ClvrError, match="another conversion"):
        convert(plan(source, to, "float32"), out, resume=True)
    before = len(written)
    convert(plan(source, to), out, resume=True)
    assert len(written) - before < 25  # of 46: most were not written again
    if to == "jax":
        convert(plan(out, "torch"), tmp_path / "a")
        convert(plan(whole, "torch"), tmp_path / "b")
        out, whole = tmp_path / "a", tmp_path / "b"
    assert bits(out) == bits(whole)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


def test_devices_of_a_mesh_hold_and_read_their_shards_only(monkeypatch):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    folder = SHAPES / "transformer"
    architecture = architecture_of(folder)
    _, state = architecture.split(json.loads((folder / "config.json").read_text()))

    def place(leaf):
        widest = max(range(len(leaf.shape)), key=lambda axis: (leaf.shape[axis] % 4 == 0, leaf.shape[axis]))
        axes = ["fsdp" if axis == widest and leaf.shape[axis] % 4 == 0 else None for axis in range(len(leaf.shape))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    shardings = jax.tree.map(place, state)
    read, real = [], models.read_part

    def counted(entry, stored, index, target, pairs):
        part = real(entry, stored, index, target, pairs)
        read.append(part.size)
        return part

    monkeypatch.setattr(models, "read_part", counted)
    model = load_model(folder, architecture, shardings=shardings)
    size = sum(math.prod(stored.shape) for stored in stored_tensors(folder).values())
    assert sum(read) == size  # not twice, although two devices hold each part
    plain = leaves_of(Flux2Pipeline.from_pretrained("shapes-tiny").transformer)
    held = dict.fromkeys(jax.devices(), 0)
    for path, leaf in leaves_of(model).items():
        assert leaf.sharding == leaves_of(shardings)[path]
        assert np.array_equal(leaf, plain[path]), path
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in plain.values())
    assert all(part < 0.251 * whole for part in held.values()), held


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no tensors"),
        (lambda folder: shorten(folder / "model.safetensors"), "not a complete safetensors file"),
        (lambda folder: rewrite(folder, lambda t: t.pop("model.norm.weight")), "1 missing: model.norm.weight"),
        (lambda folder: rewrite(folder, lambda t: t.update(more=np.zeros(2))), "1 unexpected: more"),
        (lambda folder: rewrite(folder, lambda t: t.update({"model.norm.weight": np.zeros(2)})), "expected"),
        (lambda folder: pickle_only(folder), "pickle"),
        (lambda folder: change(folder, architectures=["LlamaForCausalLM"]), "contains a LlamaForCausalLM"),
        (lambda folder: index(folder), "shards that are absent: gone.safetensors"),
    ],
)
def test_what_cannot_be_converted_is_one_clear_error(tmp_path, spoil, message):
    folder = tmp_path / "model"
    shutil.copytree(SHAPES / "text_encoder", folder)
    spoil(folder)
    with pytest.raises(ClvrError, match=message):
        plan(folder, "jax")


def test_not_a_number_is_reported_and_kept(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHAPES / "text_encoder", folder)
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(3, np.nan))
    assert convert(plan(folder, "jax", "bfloat16"), tmp_path / "jax") == ["./model.norm.weight"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    conversion = plan(SHAPES / "text_encoder", "jax")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ClvrError, match="are free"):
        convert(conversion, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def replace_content(file):
    """Other tensors in the file, under the size, the time and the header that it has."""
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[-8:] = bytes(byte ^ 1 for byte in content[-8:])
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: replace_content(folder / "model.safetensors"),
        lambda folder: os.utime(folder / "model.safetensors", ns=(1, 1)),
        lambda folder: change(folder, rope_theta=1.0),
    ],
)
def test_a_source_that_changed_is_not_mixed_into_what_was_begun(tmp_path, spoil):
    source, out = shutil.copytree(SHAPES / "text_encoder", tmp_path / "model"), tmp_path / "out"

    class Killed(BaseException):
        pass

    def kill(name):
        raise Killed

    with pytest.raises(Killed):
        convert(plan(source, "jax"), out, on_tensor=kill)
    begun = sorted((tmp_path / ".out.conversion").rglob("*"))
    spoil(source)
    with pytest.raises(ClvrError, match="its sources have changed since; remove it"):
        convert(plan(source, "jax"), out, resume=True)
    assert sorted((tmp_path / ".out.conversion").rglob("*")) == begun


def test_many_tensors_that_fail_end_in_one_line_about_reading_or_writing(converted, tmp_path, monkeypatch):
    source = shutil.copytree(converted / "text_encoder", tmp_path / "model")
    conversion = plan(source, "torch")
    for chunk in (source / PARAMS).glob("*/[0-9]*"):
        chunk.write_bytes(b"torn")
    with pytest.raises(ClvrError, match=r"4 bytes instead of \d+"):
        convert(conversion, tmp_path / "out")
    conversion = plan(converted / "text_encoder", "torch")

    def unreadable(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "memmap", unreadable)
        with pytest.raises(ClvrError, match=r"text_encoder: \S+: cannot be read \(Input/output error\)"):
            convert(conversion, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(tensors, "put", full)
        with pytest.raises(ClvrError, match=r"out: cannot be written \(No space left on device\)"):
            convert(conversion, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_second_conversion_is_told_of_the_running_one(tmp_path):
    out, said = tmp_path / "out", []

    def second(name):
        if not said:
            for resume in (False, True):
                with pytest.raises(ClvrError, match=f"process {os.getpid()} .* has been writing") as caught:
                    convert(plan(SHAPES / "vae", "jax"), out, resume=resume)
                said.append(str(caught.value))

    convert(plan(SHAPES / "vae", "jax"), out, on_tensor=second)
    assert len(said) == 2
    assert out.is_dir()
    assert not (out / ".lock").exists()


def test_a_place_inside_the_source_and_an_address_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = shutil.copytree(SHAPES / "vae", tmp_path / "vae")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="is inside of"):
        convert(plan(source, "jax"), source / "jax")
    with pytest.raises(ClvrError, match="a URL"):
        convert(plan(source, "jax"), Path("gs://bucket/jax"))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_wrong_direction_and_an_occupied_place_are_refused(converted, tmp_path):
    with pytest.raises(UsageError, match="already"):
        plan(converted, "jax")
    with pytest.raises(UsageError, match="already"):
        plan(SHAPES, "torch")
    with pytest.raises(UsageError, match="exists already"):
        convert(plan(SHAPES, "jax"), tmp_path)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    write_tensors(folder, tensors, "model")


def pickle_only(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def change(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def index(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}})
    )
