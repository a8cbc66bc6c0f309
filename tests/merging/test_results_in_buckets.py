"""What `clvr merge` and `clvr convert` write to a bucket is what they write to a disk, as a whole or not at all."""

import shutil

import pytest

from clvr_jax.cli import main
from clvr_jax.files import bucket_copies
from clvr_jax.files.buckets import objects
from clvr_jax.files.buckets.paths import storage_path
from tests.helpers.bucket_server import InjectedFault
from tests.merging.small_models import ROLES, before_tensor, interrupt, three_models

OUT = "gs://runs/models/merged"


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLVR_COPIES", str(tmp_path / "copies"))
    monkeypatch.setattr(bucket_copies, "copied", bucket_copies.copied.__wrapped__)
    three_models(tmp_path)
    return ["merge", *(word for role in ROLES for word in (f"--{role}", role)), "--out"]


def on_a_disk(directory):
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def without_cards(files):
    """Cards and records name the command, which names the place."""
    return {name: content for name, content in files.items() if name not in ("README.md", "merge.json")}


def left(tmp_path):
    return [path for path in (tmp_path / "copies").rglob("*") if path.is_file()]


def test_a_merged_model_in_a_bucket_is_that_on_a_disk(bucket, command, tmp_path, capsys):
    assert main([*command, "out"]) == main([*command, OUT]) == 0
    assert capsys.readouterr().out == f"out\n{OUT}\n"
    found = {name.removeprefix("models/merged/"): content for name, content in bucket.objects("models/merged/").items()}
    assert found.pop(objects.COMMIT) == b"4 files\n"
    expected = on_a_disk(tmp_path / "out")
    assert set(found) == set(expected)
    assert without_cards(found) == without_cards(expected)
    assert found["README.md"].decode().count(f"--out {OUT}") == 1
    written = [seen.name for seen in bucket.seen if seen.writes and "merged" in seen.name]
    assert written[-1] == f"models/merged/{objects.COMMIT}"
    assert not left(tmp_path)
    assert main([*command, OUT]) == 2
    assert f"{OUT}: exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_models_are_converted_from_a_bucket_into_a_bucket(bucket, command, tmp_path):
    for name, content in on_a_disk(tmp_path / "base").items():
        objects.write(storage_path("gs://runs/base") / name, content)
    assert main(["convert", "gs://runs/base", "gs://runs/jax", "--to", "jax"]) == 0
    assert main(["convert", "gs://runs/jax", "gs://runs/again", "--to", "torch"]) == 0
    again = {name.removeprefix("again/"): content for name, content in bucket.objects("again/").items()}
    assert (
        again["diffusion_pytorch_model.safetensors"]
        == (tmp_path / "base" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    card = bucket.objects("jax/")["jax/README.md"].decode()
    assert "# jax\n" in card
    assert "`clvr convert gs://runs/base gs://runs/jax --to jax`" in card


def test_a_result_that_cannot_be_uploaded_stays_on_this_machine_and_is_never_half_there(
    bucket, command, tmp_path, capsys
):
    full = InjectedFault(403, 99, lambda seen: seen.writes and seen.name.endswith(".safetensors"), "quotaExceeded")
    with bucket.with_faults(full):
        assert main([*command, OUT]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clvr: ")]
    assert "the result is complete in " in line
    assert f"models/merged/{objects.COMMIT}" not in bucket.objects("models/merged/")
    assert main([*command, OUT]) == 2
    message = capsys.readouterr().err
    assert f"an earlier result for {OUT}, never uploaded" in message
    (directory,) = {path.parent for path in left(tmp_path)}
    assert str(directory) in message
    shutil.rmtree(directory)
    bucket.empty()
    assert main([*command, OUT]) == 0
    assert f"models/merged/{objects.COMMIT}" in bucket.objects("models/merged/")


def test_what_another_process_has_written_meanwhile_is_not_replaced(bucket, command, tmp_path, capsys):
    def write():
        objects.write(storage_path(OUT) / "README.md", b"of another process")

    with before_tensor(10, write):
        assert main([*command, OUT]) == 1
    assert f"{OUT}: was written by another process meanwhile" in capsys.readouterr().err
    assert bucket.objects("models/merged/") == {"models/merged/README.md": b"of another process"}
    assert left(tmp_path)


def test_an_interrupted_merge_into_a_bucket_is_resumed(bucket, command, tmp_path):
    with before_tensor(10, interrupt):
        assert main([*command, OUT]) == 130
    assert bucket.objects("models/merged/") == {}
    assert main([*command, OUT, "--resume"]) == main([*command, "whole"]) == 0
    weights = "diffusion_pytorch_model.safetensors"
    assert bucket.objects()[f"models/merged/{weights}"] == (tmp_path / "whole" / weights).read_bytes()


def test_a_bucket_that_is_not_there_is_one_line_before_anything_is_read(bucket, command, capsys):
    given = [word if word != "base" else "no-such-model" for word in command]
    assert main([*given, "gs://no-such-bucket/out"]) == 1
    assert "there is no bucket no-such-bucket" in capsys.readouterr().err
