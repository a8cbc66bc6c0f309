"""The server under load: images per second of 1 and 8 clients, lost answers, and images in and out of batches.

python benchmarks/bench_serving.py --requests 40 --equality-requests 8

Starts `clvr serve` as a process of its own, on loopback. `--requests` are sent 50 at a time, a tenth of them canceled
and a twentieth malformed; each must be answered once. Then more loops than the queue holds are sent, and the process is
killed and started again. `--equality-requests` are made alone and then all at once, and must give the same bytes.
`--batch-clients` run loops at the same time, for the mean number of works in a batch.
"""

import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import tyro
from serving_bound import device_bound

from clvr_jax.serving.jobs import LoopSpec, Mode
from clvr_jax.worlds.shapes.prompts import train_prompt

MAX_QUEUE = 64
MODES: tuple[Mode, ...] = ("one-shot", "loop")
_TIMEOUT = 600
"""Seconds for one answer; a server that loads or compiles on a busy machine is silent for a while."""
_MALFORMED = [{}, {"prompt": ""}, {"prompt": "x", "n": 99}, {"prompt": "x", "unknown": 1}, {"prompt": "x", "size": "a"}]


@contextmanager
def serving(model: str, image_rows: int, out: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Starts a server; yields its address and its process."""
    began = time.monotonic()
    command = [sys.executable, "-m", "clvr_jax.cli", "serve", "--model", model, "--port", "0", "--out", out]
    command += ["--image-rows", str(image_rows), "--max-queue", str(MAX_QUEUE)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.search(r"http://[\d.]+:\d+", line)
        assert found is not None, line + process.stderr.read()
        threading.Thread(target=process.stderr.read, daemon=True).start()
        while httpx2.get(f"{found[0]}/health", timeout=_TIMEOUT).status_code != 200:
            time.sleep(0.1)
        used = sum(map(int, Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]))
        cpu = used / os.sysconf("SC_CLK_TCK")
        print(f"ready after {time.monotonic() - began:.1f} s, {cpu:.1f} CPU s", flush=True)
        yield found[0], process
    finally:
        process.terminate()
        process.wait(120)


def prompt_of(number: int) -> str:
    """A prompt of the world of shapes."""
    return str(train_prompt(np.random.default_rng((11, number)))["prompt"])


def generate(client: httpx2.Client, number: int, mode: str, user: str = "bench") -> httpx2.Response:
    """Requests one image."""
    body = {"prompt": prompt_of(number), "seed": number, "mode": mode, "user": user}
    return client.post("/v1/images/generations", json=body)


def throughput(url: str, clients: int, count: int, mode: str) -> float:
    """Images per second of some clients, each of which sends its next request when the one before is answered."""
    with httpx2.Client(base_url=url, timeout=_TIMEOUT) as client, ThreadPoolExecutor(clients) as pool:
        began = time.monotonic()
        answers = list(pool.map(lambda number: generate(client, number, mode), range(count)))
        seconds = time.monotonic() - began
    assert all(answer.status_code == 200 for answer in answers), Counter(answer.status_code for answer in answers)
    return count / seconds


def equality(url: str, count: int) -> int:
    """How many of the images have other bytes in a crowd than alone."""
    order = list(range(count))
    with httpx2.Client(base_url=url, timeout=_TIMEOUT) as client:
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
                body = {"prompt": prompt_of(number % 32), "user": f"request {number}"}
                while (answer := client.post("/v1/loops", json=body)).status_code == 429:
                    refused.append(number)
                    time.sleep(float(answer.headers["retry-after"]))
                loop_id = answer.json()["id"]
                client.post(f"/v1/loops/{loop_id}/cancel")
                events = client.get(f"/v1/loops/{loop_id}/events").text
                return f"canceled: {events.count('event: done')} end"
            while (answer := generate(client, number % 32, "one-shot", f"request {number}")).status_code == 429:
                refused.append(number)
                time.sleep(float(answer.headers["retry-after"]))
            return f"image: {answer.status_code}"
        except httpx2.HTTPError as error:
            return f"lost: {type(error).__name__}"

    refused: list[int] = []
    with httpx2.Client(base_url=url, timeout=_TIMEOUT, limits=limits) as client, ThreadPoolExecutor(50) as pool:
        ended = Counter(pool.map(one, range(count)))
        users = Counter(entry["user"] for entry in history(client))
    twice = sum(number > 1 for user, number in users.items() if user.startswith("request "))
    expected = sum(number for kind, number in ended.items() if not kind.startswith("malformed"))
    listed = sum(user.startswith("request ") for user in users)
    ended |= {"stored once": listed - twice, "stored twice": twice, "not stored": expected - listed}
    return Counter(ended) + Counter({"429 and tried again": len(refused)})


def history(client: httpx2.Client) -> Iterator[dict[str, str]]:
    """All stored loops, newest first: id, status, user."""
    page = client.get("/v1/loops", params={"limit": 100}).json()
    while True:
        for entry in page["data"]:
            yield {"id": entry["id"], "status": entry["status"], "user": entry["request"].get("user", "")}
        if not page["has_more"]:
            return
        page = client.get("/v1/loops", params={"limit": 100, "before": page["data"][-1]["id"]}).json()


def overload(url: str) -> tuple[Counter[int], list[str]]:
    """Statuses of more loops than run and wait at the same time, and the ids of those that were accepted."""
    with httpx2.Client(base_url=url, timeout=_TIMEOUT) as client:
        answers = [client.post("/v1/loops", json={"prompt": prompt_of(number)}) for number in range(MAX_QUEUE + 64)]
    accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
    return Counter(answer.status_code for answer in answers), accepted


def resident_mib(process: int) -> float:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def batches(url: str) -> dict[str, tuple[float, float]]:
    """Number of works and of batches so far, by stage."""
    text = httpx2.get(f"{url}/metrics", timeout=_TIMEOUT).text
    sums = dict(re.findall(r'^clvr_batch_size_sum{stage="([\w-]+)"} ([\d.]+)', text, re.MULTILINE))
    counts = dict(re.findall(r'^clvr_batch_size_count{stage="([\w-]+)"} ([\d.]+)', text, re.MULTILINE))
    return {stage: (float(sums[stage]), float(counts[stage])) for stage in sums}


def mean_batches(url: str, clients: int, count: int) -> dict[str, float]:
    """Mean number of works in a batch, by stage and of all, while every client has a loop.

    What is performed after the last request was sent does not count: there are fewer loops than clients then.
    """
    before, at_last = batches(url), dict[str, tuple[float, float]]()

    def one(number: int) -> int:
        if number == count - 1:
            at_last.update(batches(url))
        return generate(client, number, "loop").status_code

    with httpx2.Client(base_url=url, timeout=3600) as client, ThreadPoolExecutor(clients) as pool:
        statuses = Counter(pool.map(one, range(count)))
    assert set(statuses) == {200}, statuses
    new = {stage: (works - before.get(stage, (0, 0))[0], number - before.get(stage, (0, 0))[1])
           for stage, (works, number) in at_last.items()}  # fmt: skip
    new = {stage: (works, number) for stage, (works, number) in new.items() if number}
    new["all"] = (sum(works for works, _ in new.values()), sum(number for _, number in new.values()))
    return {stage: round(works / number, 2) for stage, (works, number) in new.items()}


def shares(url: str, before: dict[str, float], seconds: float) -> str:
    """What the device thread did since `before`: its share of the time, filled rows, and works in a batch by stage."""
    new = {name: value - before.get(name, 0.0) for name, value in device_counters(url).items()}

    def total(name: str) -> float:
        return sum(value for key, value in new.items() if key.startswith(f"clvr_{name}{{"))

    sizes = {
        stage: round(new[f'clvr_batch_size_sum{{stage="{stage}"}}'] / count, 1)
        for key, count in new.items()
        if count and (stage := key.partition('"')[2][:-2]) and key.startswith("clvr_batch_size_count")
    }
    return (
        f"device thread computes {total('stage_seconds_sum') / seconds:.0%} of the time, "
        f"{total('padding_rows_total') / total('rows_total'):.0%} of rows are padding, works in a batch {sizes}"
    )


def device_counters(url: str) -> dict[str, float]:
    """The counters of the device thread so far, by name and stage."""
    text = httpx2.get(f"{url}/metrics", timeout=_TIMEOUT).text
    names = "batch_size_sum|batch_size_count|stage_seconds_sum|rows_total|padding_rows_total"
    found = re.findall(rf'^(clvr_(?:{names}){{stage="[\w-]+"}}) ([\d.e+-]+)', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def after_restart(url: str, before: dict[str, str]) -> Counter[str]:
    """How many loops have which status after the process was killed, by their status before."""
    with httpx2.Client(base_url=url, timeout=_TIMEOUT) as client:
        now = {entry["id"]: entry["status"] for entry in history(client)}
    return Counter(f"{status} -> {now.get(loop, 'lost')}" for loop, status in before.items())


def print_bound(model: str, images: int) -> None:
    """Prints what the models alone reach in full batches: the bound of the server's images per second."""
    for mode in MODES if images else ():
        print(f"{mode}, the works of {images} prompts without a server:", flush=True)
        device_bound(model, [LoopSpec(prompt_of(number), number, mode) for number in range(images)])


def step_cost(model: str, repeats: int = 20) -> None:
    """Prints processor seconds of an image with all denoising steps in one call, and with a call for each step."""
    from clvr_jax.pipelines.flux2 import Flux2Pipeline

    pipe = Flux2Pipeline.from_pretrained(model, None)
    ways: dict[str, Callable[[int, int, int], bool] | None] = {"one call": None, "a call each": lambda *_: True}
    for steps in (4, 28):
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        images = []
        for repeat in range(repeats + 1):  # the first time compiles
            for way, on_step in ways.items():
                began = time.process_time()
                output = pipe.generate_each(
                    [prompt_of(0)], [[]], [0], num_inference_steps=steps, rows_per_call=1, on_step=on_step
                )
                if repeat:
                    seconds[way].append(time.process_time() - began)
                images.append(np.asarray(output.images[0]))
        means = ", ".join(f"{way} {1000 * np.mean(taken):.1f} ms" for way, taken in seconds.items())
        equal = all(np.array_equal(image, images[0]) for image in images)
        print(f"{steps} denoising steps: {means}, {'equal' if equal else 'OTHER'} bytes", flush=True)


def main(
    model: str = "shapes-tiny",
    images: int = 16,
    requests: int = 40,
    equality_requests: int = 8,
    batch_clients: int = 0,
    batch_loops: int = 4,
    image_rows: int = 1,
    bound: bool = False,
) -> None:
    """Measures a server.

    Args:
      model: to serve.
      images: per measurement of throughput, and of the bound that the models alone set; 0 leaves both out.
      requests: of the endurance test; 0 leaves it out, and the restart.
      equality_requests: made alone and in a crowd; 0 leaves them out.
      batch_clients: loops that run at the same time, for the mean number of works in a batch; 0 leaves them out.
      batch_loops: loops of each of these clients, one after the other.
      image_rows: of the server.
      bound: call the models directly instead, for the works of `--images` prompts, in batches of 1 and of 8: what
        batches can gain. Then with the denoising steps of an image in one call and in a call each.
    """
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"load of the machine before: {load}, {os.cpu_count()} CPUs", flush=True)
    if bound:
        print_bound(model, images)
        step_cost(model)
        return
    with tempfile.TemporaryDirectory() as out:
        before: dict[str, str] = {}
        with serving(model, image_rows, out) as (url, process):
            for mode in MODES if images else ():
                throughput(url, 8, min(images, 8), mode)  # compiles
                single, before_eight = throughput(url, 1, images, mode), device_counters(url)
                eight = throughput(url, 8, images, mode)
                print(f"{mode}: 1 client {single:.2f} images/s, 8 clients {eight:.2f}, {eight / single:.2f}x")
                print(f"{mode}, 8 clients: {shares(url, before_eight, images / eight)}", flush=True)
            if batch_clients:
                found = mean_batches(url, batch_clients, batch_loops * batch_clients)
                print(f"mean batch, {batch_clients} clients:", found, flush=True)
            if equality_requests:
                differ = equality(url, equality_requests)
                print(f"equality: {differ} of {equality_requests} images differ in a crowd", flush=True)
            if requests:
                memory = resident_mib(process.pid)
                print(f"endurance, {requests} requests:", dict(endurance(url, requests)))
                print(f"resident memory {memory:.0f} -> {resident_mib(process.pid):.0f} MiB")
                statuses, accepted = overload(url)
                print(f"{sum(statuses.values())} loops above the queue: {dict(statuses)}", flush=True)
                with httpx2.Client(base_url=url, timeout=_TIMEOUT) as client:
                    before = {entry["id"]: entry["status"] for entry in history(client)}
                assert set(accepted) <= set(before)
                process.kill()
        if requests:
            with serving(model, image_rows, out) as (url, _):
                print("killed and started again:", dict(after_restart(url, before)))
    print_bound(model, images)


if __name__ == "__main__":
    tyro.cli(main)
