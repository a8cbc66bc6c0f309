"""The server under load: images per second of 1 and 8 clients, lost answers, and images in and out of batches.

python benchmarks/bench_serving.py --requests 40 --equality-requests 8

Starts `clvr serve` as a process of its own, on loopback. `--requests` are sent 50 at a time, a tenth of them canceled
and a twentieth malformed; `--equality-requests` are made alone and then all at once, and must give the same bytes.
"""

import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import tyro

from clvr_jax.worlds.shapes.prompts import train_prompt

_MALFORMED = [{}, {"prompt": ""}, {"prompt": "x", "n": 99}, {"prompt": "x", "unknown": 1}, {"prompt": "x", "size": "a"}]


@contextmanager
def serving(model: str, image_rows: int, max_queue: int) -> Iterator[tuple[str, int]]:
    """Starts a server; yields its address and its process id."""
    with tempfile.TemporaryDirectory() as out:
        began = time.monotonic()
        command = [sys.executable, "-m", "clvr_jax.cli", "serve", "--model", model, "--port", "0", "--out", out]
        command += ["--image-rows", str(image_rows), "--max-queue", str(max_queue)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.search(r"http://[\d.]+:\d+", line)
            assert found is not None, line + process.stderr.read()
            threading.Thread(target=process.stderr.read, daemon=True).start()
            while httpx2.get(f"{found[0]}/health").status_code != 200:
                time.sleep(0.1)
            print(f"ready after {time.monotonic() - began:.1f} s")
            yield found[0], process.pid
        finally:
            process.terminate()
            process.wait(120)


def prompt_of(number: int) -> str:
    """A prompt of the world of shapes."""
    return str(train_prompt(np.random.default_rng((11, number)))["prompt"])


def generate(client: httpx2.Client, number: int, mode: str) -> httpx2.Response:
    """Requests one image."""
    body = {"prompt": prompt_of(number), "seed": number, "mode": mode}
    return client.post("/v1/images/generations", json=body)


def throughput(url: str, clients: int, count: int, mode: str) -> float:
    """Images per second of some clients, each of which sends its next request when the one before is answered."""
    with httpx2.Client(base_url=url, timeout=600) as client, ThreadPoolExecutor(clients) as pool:
        began = time.monotonic()
        answers = list(pool.map(lambda number: generate(client, number, mode), range(count)))
        seconds = time.monotonic() - began
    assert all(answer.status_code == 200 for answer in answers), Counter(answer.status_code for answer in answers)
    return count / seconds


def equality(url: str, count: int) -> int:
    """How many of the images have other bytes in a crowd than alone."""
    order = list(range(count))
    with httpx2.Client(base_url=url, timeout=600) as client:
        alone = [generate(client, number, "one-shot").json()["data"][0]["b64_json"] for number in order]
        random.Random(0).shuffle(order)
        with ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda number: (number, generate(client, number, "one-shot").json()), order)
            return sum(alone[number] != answer["data"][0]["b64_json"] for number, answer in answers)


def endurance(url: str, count: int) -> Counter[str]:
    """How many requests ended in which way, 50 at a time, with cancels and malformed ones among them."""
    limits = httpx2.Limits(max_connections=60, max_keepalive_connections=60)

    def one(number: int) -> str:
        kind = random.Random(number).random()
        try:
            if kind < 0.05:
                answer = client.post("/v1/images/generations", json=_MALFORMED[number % len(_MALFORMED)])
                return "malformed: refused" if answer.status_code == 422 else f"malformed: {answer.status_code}"
            if kind < 0.15:
                answer = client.post("/v1/loops", json={"prompt": prompt_of(number % 32)})
                if answer.status_code != 202:
                    return f"canceled: {answer.status_code}"
                loop_id = answer.json()["id"]
                client.post(f"/v1/loops/{loop_id}/cancel")
                events = client.get(f"/v1/loops/{loop_id}/events").text
                return f"canceled: {events.count('event: done')} end"
            while (answer := generate(client, number % 32, "one-shot")).status_code == 429:
                refused.append(number)
                time.sleep(float(answer.headers["retry-after"]))
            return f"image: {answer.status_code}"
        except httpx2.HTTPError as error:
            return f"lost: {type(error).__name__}"

    refused: list[int] = []
    with httpx2.Client(base_url=url, timeout=600, limits=limits) as client, ThreadPoolExecutor(50) as pool:
        ended = Counter(pool.map(one, range(count)))
    return ended + Counter({"429 and tried again": len(refused)})


def resident_mib(process: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def mean_batches(url: str) -> dict[str, float]:
    """Mean number of works in a batch, by stage."""
    text = httpx2.get(f"{url}/metrics").text
    sums = dict(re.findall(r'^clvr_batch_size_sum{stage="([\w-]+)"} ([\d.]+)', text, re.MULTILINE))
    counts = dict(re.findall(r'^clvr_batch_size_count{stage="([\w-]+)"} ([\d.]+)', text, re.MULTILINE))
    return {stage: round(float(sums[stage]) / float(counts[stage]), 2) for stage in sums}


def main(
    model: str = "shapes-tiny", images: int = 16, requests: int = 40, equality_requests: int = 8, image_rows: int = 1
) -> None:
    """Measures a server.

    Args:
      model: to serve.
      images: per measurement of throughput.
      requests: of the endurance test; 0 leaves it out.
      equality_requests: made alone and in a crowd; 0 leaves them out.
      image_rows: of the server.
    """
    with serving(model, image_rows, max_queue=32) as (url, process):
        for mode in ("one-shot", "loop"):
            throughput(url, 8, min(images, 8), mode)  # compiles
            single, eight = throughput(url, 1, images, mode), throughput(url, 8, images, mode)
            print(f"{mode}: 1 client {single:.2f} images/s, 8 clients {eight:.2f}, {eight / single:.2f}x")
        print("mean batch:", mean_batches(url))
        if equality_requests:
            print(f"equality: {equality(url, equality_requests)} of {equality_requests} images differ in a crowd")
        if requests:
            before = resident_mib(process)
            print(f"endurance, {requests} requests:", dict(endurance(url, requests)))
            print(f"resident memory {before:.0f} -> {resident_mib(process):.0f} MiB")


if __name__ == "__main__":
    tyro.cli(main)
