"""`clvr serve` as a process: its options, kill -9 and restart, SIGTERM."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx2
import pytest

from clvr_jax.cli import main
from clvr_jax.serving.index.store import LoopStore
from tests.conftest import DISABLE_OPTIMIZATIONS
from tests.serving.conftest import PROMPT, wait_until

LOOP = {"prompt": PROMPT, "seed": 1, "max_steps": 2}


@contextmanager
def serving(out, *options):
    """Starts the command; yields the process and a client once it is healthy."""
    command = [sys.executable, "-m", "clvr_jax.cli", "serve", "--port", "0", "--out", str(out), "--warm-up", *options]
    # What a loop saves by optimized programs is more than what it costs to compile them.
    environment = {**os.environ, DISABLE_OPTIMIZATIONS.upper(): "0"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found is not None, line + process.stderr.read()
        with httpx2.Client(base_url=found[0], timeout=300) as client:
            wait_until(lambda: client.get("/health").status_code == 200)
            yield process, client
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_nothing_that_was_finished_is_lost(tmp_path):
    with serving(tmp_path) as (process, client):
        body = {"prompt": PROMPT, "mode": "one-shot", "seed": 5}
        finished = client.post("/v1/images/generations", json=body).json()["data"][0]["loop_id"]
        image = client.get(f"/v1/images/{finished}_0/content").content
        running = client.post("/v1/loops", json=LOOP).json()["id"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    with serving(tmp_path, "--drain-seconds", "600") as (process, client):
        states = {each["id"]: each["status"] for each in client.get("/v1/loops").json()["data"]}
        assert states == {finished: "finished", running: "interrupted"}
        assert client.get(f"/v1/images/{finished}_0/content").content == image
        another = subprocess.run(
            [sys.executable, "-m", "clvr_jax.cli", "serve", "--port", "0", "--out", str(tmp_path)],
            capture_output=True,
            text=True,
        )
        assert (another.returncode, another.stderr.count("\n")) == (1, 1)
        assert f"process {process.pid}" in another.stderr
        drained = client.post("/v1/loops", json=LOOP).json()["id"]
        # What still waits is stopped at once.
        wait_until(lambda: client.get(f"/v1/loops/{drained}").json()["queue_position"] is None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0
    assert LoopStore(tmp_path, 3600, 1 << 30).entry(drained)["status"] == "finished"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "set a key in CLVR_TEST_KEY"),
        (["--port", "70000"], "--port must be from 0"),
        (["--image-rows", "3"], "image_rows must be 1, 2, 4, 8 or 16"),
        (["--concurrent-calls", "17"], "concurrent_calls must be from 1 to 16"),
        (["--window-ms", "30"], "window must be from 0 to 0.02"),
        (["--keep-gb", "inf"], "keep_bytes must be from 0 to 1e+15"),
        (["--keep-days", "nan"], "keep_days must be from 0 to 1e+15"),
        (["--drain-seconds", "1e300"], "drain_seconds must be from 0 to 1e+08"),
        (["--max-loop-seconds", "inf"], "max_seconds must be above 0 and at most 1e+08"),
        (["--warm-up", "0"], "--warm-up must be at least 1"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(options, message, capsys, tmp_path):
    assert "CLVR_TEST_KEY" not in os.environ
    assert main(["serve", "--key-variable", "CLVR_TEST_KEY", "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 1
    assert "clvr serve needs uvicorn: pip install 'clvr-jax[serve]'" in capsys.readouterr().err
