"""Endpoints that lie, and what each of them costs: prompts that are lost, scores and images that are invented.

    python -m tests.robustness.lies

tries every kind on the data engine, on a judge of a benchmark and on an image generator, and prints one JSON object:
the number of kinds, what was lost and invented, the longest time that one kind took, by the clock and of the processor,
the memory of the process when everything is imported, the most that one kind added to the memory before it, and the
largest memory of all, with the server, which is a part of the process. The largest response becomes 3 GB if it is
decompressed, and some have no end.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clvr_jax.configs import prompted_synth
from clvr_jax.data.engine.beam_pipeline import _Synthesize
from clvr_jax.data.engine.intake import item_to_json
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.recipes import SynthConfig
from clvr_jax.data.engine.roles.base import PromptItem
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.benchmarks.imaginebench import ImagineBench
from clvr_jax.evaluation.harness.images import BenchmarkImages, generate_images, load_generated
from clvr_jax.evaluation.judging.questions import JudgeModel
from clvr_jax.evaluation.systems.endpoints import endpoint_system
from clvr_jax.providers.endpoint import Endpoint
from clvr_jax.providers.openai_chat import OpenAIChatModel
from clvr_jax.providers.openai_images import OpenAIImageModel
from tests.data.engine.cooperative_server import answer
from tests.evaluation.benchmarks.samples import IMAGINE, ColorGenerator, write_lines
from tests.evaluation.runs import score_judged
from tests.providers.server import KEY, LoopbackServer, Reply, completion, failure, picture, pictures, png
from tests.robustness.corpus import large_png, png_head

ITEMS = [PromptItem(f"p-{number}", f"a light color, number {number}") for number in range(2)]
_ELSEWHERE = "http://localhost:1/x"
_HTML = b"<!doctype html><title>Log in</title>"


def bomb(block: int = 8 << 20, blocks: int = 384) -> Reply:
    """A response of 3 MB that becomes 3 GB."""
    packer = zlib.compressobj(wbits=31)
    first = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    more = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)
    return Reply(first + more * (blocks - 1), headers={"Content-Encoding": "gzip"})


def stream(start: bytes, repeated: bytes, megabytes: int | None = None, end: bytes = b"") -> Reply:
    """A response that repeats some bytes up to a size, or for as long as anyone reads it."""
    block = repeated * (65536 // len(repeated))

    def content() -> Iterator[bytes]:
        yield start
        for _ in itertools.count() if megabytes is None else range((megabytes << 20) // len(block)):
            yield block
        yield end

    return Reply(content)


def _choice(**fields: Any) -> Reply:
    return Reply({"choices": [fields]})


CHAT: dict[str, Reply] = {
    **{f"status {status}": failure(status) for status in (400, 401, 402, 403, 404, 408, 409, 413, 422, 425, 429)},
    **{f"status {status}": failure(status) for status in (500, 501, 502, 503, 504, 520, 529)},
    **{f"status {status}, a page": Reply(_HTML, status) for status in (401, 404, 429, 502)},
    "no money": failure(429, code="insufficient_quota"),
    "no billing": failure(403, type="billing_not_active"),
    "a wait of a year": failure(429, headers={"Retry-After": "31536000"}),
    "a wait until the year 10**20": failure(429, headers={"Retry-After": f"Sat, 28 Nov {10**20} 20:00:00 GMT"}),
    "a login elsewhere": Reply(status=302, headers={"Location": "http://localhost:1/login"}),
    "a circle of redirects": Reply(status=307, headers={"Location": "/v1/chat/completions"}),
    "no content": Reply(status=204),
    "an empty body": Reply(b""),
    "a page": Reply(_HTML),
    "null": Reply(b"null"),
    "a list": Reply(b"[]"),
    "a number": Reply(b"7"),
    "half a body": Reply(b"{"),
    "a stream": Reply(b'data: {"choices": []}\n\ndata: [DONE]\n'),
    "bytes": Reply(b"\x00\xff\xfe"),
    "deep": Reply(b"[" * 100_000),
    "a bomb": bomb(),
    "no end": stream(b"", b" "),
    "an error without end": dataclasses.replace(stream(b"", b"{},"), status=500),
    "an error of many values": dataclasses.replace(stream(b"[", b"{},", 60, b"0]"), status=400),
    "a long text": stream(b'{"choices": [{"message": {"content": "', b"x", 31, b'"}}], "error": 1}'),
    "long blanks": stream(b"", b" ", 31, b"{}"),
    "many values": stream(b'{"choices": [', b"{},", 31, b"0]}"),
    "many levels": stream(b"", b"[", 31),
    "many parts": stream(b'{"choices": [{"message": {"content": [', b'{"text":"","type":"text"},', 31, b"0]}}]}"),
    "another compression": Reply(b"{}", headers={"Content-Encoding": "br"}),
    "a false compression": Reply(b"{}", headers={"Content-Encoding": "gzip"}),
    "too slow": Reply(b"{}", delay=0.5),
    "no choices": Reply({}),
    "empty choices": Reply({"choices": []}),
    "null choices": Reply({"choices": None}),
    "a null choice": Reply({"choices": [None]}),
    "choices that are a text": Reply({"choices": "Score: 9"}),
    "no message": _choice(finish_reason="stop"),
    "a null message": _choice(message=None),
    "a message that is a text": _choice(message="Score: 9"),
    "content that is a number": _choice(message={"role": "assistant", "content": 9}),
    "content that is an object": _choice(message={"role": "assistant", "content": {"text": "Score: 9"}}),
    "an error with status 200": Reply({"error": {"code": 503, "message": "busy"}}),
    "null content": completion(None),
    "empty content": completion(""),
    "blank content": completion(" \n "),
    "an open thought": completion("<think>it is"),
    "a thought alone": completion("<think>Fantasy Fulfillment: 9</think>"),
    "prose": completion("Service unavailable, please log in."),
    "an error as content": completion('{"error": "busy"}'),
    "a page as content": completion(_HTML.decode()),
    "cut": completion('{"perceive": "x", "rea', finish="length"),
}
IMAGES: dict[str, Reply] = {
    **{f"status {status}": failure(status) for status in (401, 429, 503)},
    "an empty body": Reply(b""),
    "a page": Reply(_HTML),
    "no data": Reply({"data": []}),
    "null data": Reply({"data": [None]}),
    "no base64": Reply({"data": [{"b64_json": "?"}]}),
    "no image": pictures(b"no image"),
    "half an image": pictures(png(picture(8, 8))[:60]),
    "a huge image": pictures(png_head(60_000, 60_000)),
    "a large image": pictures(large_png(8000, 8000)),
    "a large transparent image": pictures(large_png(8000, 8000, "RGBA")),
    "an image of 16 bits": pictures(large_png(8000, 8000, "I;16")),
    "an image on its side": pictures(large_png(16000, 2000)),
    "no end": stream(b"", b" "),
    "long base64": stream(b'{"data": [{"b64_json": "', b"AAAA", 60, b'"}]}'),
    "long base64 with spaces": stream(b'{"data": [{"b64_json": "', b"AAA ", 60, b'"}]}'),
    "long base64, too long": stream(b'{"data": [{"b64_json": "', b"AAAA", 80, b'"}]}'),
    "a long address": stream(b'{"data": [{"url": "data:image/png;base64,', b"AAAA", 60, b'"}]}'),
    "many values": stream(b'{"data": [', b"{},", 60, b"0]}"),
    "PostScript": pictures(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"),
    "a path": pictures("/tmp/1.png"),
    "a file address": pictures("file:///etc/passwd"),
    "an address of the own network": pictures(_ELSEWHERE),
    "a bomb": bomb(),
}


def connection_to(server: LoopbackServer, seconds: float) -> Endpoint:
    """The server, with a deadline and without a second try."""
    os.environ |= {"LOOPBACK_KEY": KEY, "NO_PROXY": "127.0.0.1"}
    return Endpoint("tiny", server.url + "/v1", "LOOPBACK_KEY", max_retries=0, max_seconds=seconds)


def prompts_used_up(connection: Endpoint, out: Path) -> int:
    """How many of two prompts the data engine stores as finished."""
    config = dataclasses.replace(
        prompted_synth.CONFIG,
        **dict.fromkeys(("director", "verifier", "second_judge", "images"), connection),
        image_size=(8, 8),
    )
    function = _Synthesize(lambda: prompted_synth.worker_context(config), str(out), SynthConfig(in_flight=2))
    function.setup()
    try:
        for item in ITEMS:
            function.process(item_to_json(item))
        function.finish_bundle()
    finally:
        function.teardown()
    return len(OutcomeStore(out).ids())


def judged_images(out: Path) -> BenchmarkImages:
    """Four images that a judge has not seen yet."""
    benchmark = ImagineBench()
    items = benchmark.read(write_lines(out.with_suffix(".jsonl"), IMAGINE))
    generate_images(benchmark, items, ColorGenerator().system, out, settings={}, samples=1)
    return load_generated(benchmark, out)


def scores_invented(connection: Endpoint, images: BenchmarkImages) -> int:
    """How many scores a judge gives that said nothing."""
    judge = JudgeModel(OpenAIChatModel(connection), in_flight=4)
    try:
        results = score_judged(ImagineBench(), images, judge)
    except ClvrError:
        return int((images.directory.root / "results.json").exists())
    return len(results["pictures"])


def images_invented(connection: Endpoint, out: Path) -> int:
    """How many images, or records of none, an image generator leaves that made nothing."""
    benchmark = ImagineBench()
    items = benchmark.read(write_lines(out.with_suffix(".jsonl"), IMAGINE))
    system = endpoint_system(OpenAIImageModel(connection), in_flight=4)
    with contextlib.suppress(ClvrError):
        generate_images(benchmark, items, system, out, settings={}, samples=1)
    return len(list(out.rglob("*.png"))) + len(list(out.rglob("records/*")))


def tried(server: LoopbackServer, kind: str, name: str, lie: Reply, root: Path) -> tuple[int, int]:
    """Tries one kind; returns the prompts that it lost, and the scores and images that it invented."""
    connection = connection_to(server, 0.4 if lie.delay else 20.0)
    server.seen.clear()
    out = root / str(len(list(root.iterdir())))
    out.mkdir()
    if kind == "chat":
        server.script = [lie]
        return prompts_used_up(connection, out / "synth"), scores_invented(connection, judged_images(out / "judge"))
    server.script = [lambda seen: lie if "/images/" in seen.path else answer(seen)]
    lost = prompts_used_up(connection, out / "synth")
    return lost, images_invented(connection, out / "draw")


def kinds() -> Iterator[tuple[str, str, Reply]]:
    """All kinds: "chat" or "images", name, and reply."""
    for name, lie in CHAT.items():
        yield "chat", name, lie
    for name, lie in IMAGES.items():
        yield "images", name, lie


def _memory(field: str) -> int:
    """MiB of this process: "VmRSS" now, "VmHWM" at most since `_forget_peak`.

    Not `ru_maxrss`, which a process inherits from the one that starts it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> int:
    """Tries all kinds and prints what came of them."""
    server, longest, busiest, count, lost, invented = LoopbackServer(), 0.0, 0.0, 0, 0, 0
    start, most_added, peak = _memory("VmRSS"), 0, 0
    with tempfile.TemporaryDirectory() as root:
        for kind, name, lie in kinds():
            _forget_peak()
            before, began, busy = _memory("VmRSS"), time.monotonic(), time.process_time()
            used_up, made_up = tried(server, kind, name, lie, Path(root))
            count, lost, invented = count + 1, lost + used_up, invented + made_up
            longest, busiest = max(longest, time.monotonic() - began), max(busiest, time.process_time() - busy)
            here = _memory("VmHWM")
            most_added, peak = max(most_added, here - before), max(peak, here)
            if used_up or made_up:
                print(f"{kind}, {name}: {used_up} prompts lost, {made_up} invented", file=sys.stderr)
    server.close()
    found = {"kinds": count, "prompts_lost": lost, "invented": invented}
    times = {"longest_seconds": round(longest, 1), "longest_processor_seconds": round(busiest, 1)}
    memory = {"memory_at_start_mib": start, "most_added_by_a_kind_mib": most_added, "peak_memory_mib": peak}
    print(json.dumps({**found, **times, **memory}))
    return int(lost + invented > 0)


if __name__ == "__main__":
    sys.exit(main())
