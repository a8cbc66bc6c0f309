import errno
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from clvr_jax.convert import hub_download as module
from clvr_jax.convert.hub import local_directory, model_files
from clvr_jax.errors import ClvrError, UsageError
from tests.convert.hub_server import COMMIT, Hub, serving

REPOSITORY = "tiny/model"
WANTED = {
    "model_index.json": b"{}",
    "README.md": b"# tiny",
    "transformer/config.json": b'{"a": 1}',
    "transformer/diffusion_pytorch_model.safetensors": random.Random(0).randbytes(300_000),
    "text_encoder/model-00001-of-00002.safetensors": b"one",
    "text_encoder/model-00002-of-00002.safetensors": b"two",
    "tokenizer/merges.txt": b"a b",
    "tokenizer/chat_template.jinja": b"{{ x }}",
}
UNWANTED = {
    "flux-2-tiny.safetensors": b"the same weights again",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"x",
    "transformer/diffusion_pytorch_model.bin": b"x",
    "model.ckpt": b"x",
    "onnx/model.onnx": b"x",
    "teaser.png": b"x",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(Hub(REPOSITORY, {**WANTED, **UNWANTED})) as hub:
        reach(hub.url, tmp_path, monkeypatch)
        yield hub


def reach(url, cache, monkeypatch):
    """The library reads its environment when it is imported; this is the same for a test."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failure(source, revision=None):
    with pytest.raises(ClvrError) as caught:
        local_directory(source, revision)
    message = str(caught.value)
    assert message.startswith(f"{source}: ")
    assert "\n" not in message
    return message


def test_a_path_is_returned_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert local_directory("org/name") == Path("org/name")
    assert local_directory(str(tmp_path)) == tmp_path
    with pytest.raises(UsageError, match="no revision 'v1'"):
        local_directory(str(tmp_path), "v1")


@pytest.mark.parametrize("source", ["nowhere", "./org/name", "a/b/c", "/no/where", "org/name@"])
def test_what_is_neither_path_nor_id_is_not_looked_up(source, hub):
    assert "no such directory" in failure(source)
    assert hub.requests == []


def test_a_repository_arrives_without_what_no_model_needs_and_only_once(hub, capfd):
    folder = local_directory(REPOSITORY)
    assert contents(folder) == WANTED
    assert hub.fetched() == sorted(WANTED)
    assert capfd.readouterr().err == f"{REPOSITORY}: 8 files, 0.00 GiB, from {hub.url}\n"
    hub.requests.clear()
    assert local_directory(REPOSITORY) == folder
    assert hub.fetched() == []
    assert capfd.readouterr().err == ""  # no bars where there is no terminal


def test_a_revision_is_that_of_the_id_or_of_the_argument(hub):
    folder = local_directory(f"{REPOSITORY}@v1")
    assert folder.name == COMMIT
    assert local_directory(REPOSITORY, "v1") == local_directory(f"{REPOSITORY}@v1", "v1") == folder
    assert any(path.endswith("/revision/v1") for _, path, _ in hub.requests)
    assert not any(path.endswith("/revision/main") for _, path, _ in hub.requests)
    with pytest.raises(UsageError, match="other than 'main'"):
        local_directory(f"{REPOSITORY}@v1", "main")
    assert f"{hub.url}/{REPOSITORY} has no revision 'v2'" in failure(REPOSITORY, "v2")


def test_other_files_can_be_asked_for(hub):
    assert contents(local_directory(REPOSITORY, allow_patterns=["*.png"])) == {"teaser.png": b"x"}


def test_a_variant_replaces_the_plain_tensors(hub):
    found = contents(local_directory(REPOSITORY, allow_patterns=model_files("fp16")))
    tensors = [name for name in found if name.endswith(".safetensors")]
    assert tensors == ["transformer/diffusion_pytorch_model.fp16.safetensors"]


def test_a_repository_without_a_model_is_refused(hub):
    for name in WANTED:
        del hub.files[name]
    assert "contains no file of a model" in failure(REPOSITORY)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub, monkeypatch):
    chunk = 1 << 16
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", chunk)
    name = "transformer/diffusion_pytorch_model.safetensors"
    hub.drop = name
    assert contents(local_directory(REPOSITORY)) == WANTED
    ranges = [headers.get("range") for verb, path, headers in hub.requests if verb == "GET" and path.endswith(name)]
    arrived = len(WANTED[name]) // 2 // chunk * chunk
    assert ranges == [None, f"bytes={arrived}-"]


def test_what_does_not_exist_may_have_been_meant_as_a_folder(hub):
    message = failure("tiny/modle")
    assert "no such directory here" in message
    assert f"no such repository at {hub.url}" in message


def test_a_gated_repository_says_where_to_accept_and_opens_with_a_token(hub, monkeypatch):
    hub.gated, hub.token = True, "hf_secret"
    message = failure(REPOSITORY)
    assert f"accept its license at {hub.url}/{REPOSITORY} and set HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert contents(local_directory(REPOSITORY)) == WANTED


@pytest.mark.parametrize(
    ("status", "message"),
    [(503, "answers 503; try again later"), (403, r"refuses it \(403\)"), (404, "no such repository or revision")],
)
def test_what_the_server_answers_is_said(hub, status, message):
    hub.status = status
    with pytest.raises(ClvrError, match=message):
        local_directory(REPOSITORY)


def test_without_a_network_the_way_out_is_said_and_the_cache_is_used(tmp_path, monkeypatch):
    with serving(Hub(REPOSITORY, WANTED)) as hub:
        reach(hub.url, tmp_path, monkeypatch)
        folder = local_directory(REPOSITORY)
    with socket.socket() as closed:  # a port where nobody answers
        closed.bind(("127.0.0.1", 0))
        reach(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path, monkeypatch)
        assert local_directory(REPOSITORY) == folder
        message = failure("other/model")
    assert "cannot be reached" in message
    assert "pass a directory, or fetch it elsewhere with `hf download other/model`" in message


def test_a_full_disk_is_said_before_and_while_it_fills(hub, monkeypatch):
    usage = shutil.disk_usage("/")
    with monkeypatch.context() as small:
        small.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ClvrError, match=r"0\.0 GiB are free in .*; set HF_HOME"):
            local_directory(REPOSITORY)
    assert hub.fetched() == []

    real = module.snapshot_download

    def fills(*args, dry_run=False, **options):
        if dry_run:
            return real(*args, dry_run=True, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "snapshot_download", fills)
    assert "no room left" in failure(REPOSITORY)


@pytest.mark.slow
def test_the_environment_is_that_of_the_library(tmp_path):
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a user sets them: before the process begins."""
    program = (
        "import sys; from clvr_jax.convert.hub import local_directory, model_files; print(local_directory(sys.argv[1]))"
    )

    def run(repository, **environment):
        command = [sys.executable, "-c", program, repository]
        return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)

    with serving(Hub(REPOSITORY, WANTED, gated=True, token="hf_secret")) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret"}
        fetched = run(REPOSITORY, **settings)
        assert fetched.returncode == 0, fetched.stderr
        folder = Path(fetched.stdout.strip())
        assert folder.is_relative_to(tmp_path)
        assert contents(folder) == WANTED
        hub.requests.clear()
        assert run(REPOSITORY, **settings, HF_HUB_OFFLINE="1").stdout == fetched.stdout
        offline = run("other/model", **settings, HF_HUB_OFFLINE="1")
        assert "other/model: not in" in offline.stderr
        assert "HF_HUB_OFFLINE is set; pass a directory" in offline.stderr
        assert hub.requests == []
