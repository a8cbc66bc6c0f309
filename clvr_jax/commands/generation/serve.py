"""`clvr serve`."""

import ipaddress
import os
import secrets
import socket
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import tyro

from clvr_jax.arguments import at_least_one
from clvr_jax.commands.common import Common, Flags, Result, prepare_jax
from clvr_jax.commands.generation.model_options import Control, ControllerOptions, Loading, LoadOptions
from clvr_jax.display.console import console
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.files.file_names import local_path

if TYPE_CHECKING:
    from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline
    from clvr_jax.serving.scheduling.limits import Limits

WARM_UP_PROMPT = "a red circle left of a blue star"


@dataclass(frozen=True)
class LimitOptions:
    """Limits on what one request, and all requests together, may take."""

    max_running: int = 32
    """Run the loops of at most this many prompts at the same time."""
    max_queue: int = 64
    """Let at most this many prompts and chats wait; further ones are refused with status 429."""
    max_batch: int = 16
    """Perform at most this many works (replies, generations, verifications) in one batch, up to 16."""
    window_ms: float = 5.0
    """Let the first work of a request wait this many milliseconds, up to 20, for others that can share its batch."""
    concurrent_calls: int | None = None
    """Compute a batch as this many calls of the models at the same time, up to 16. If not given: on a CPU the number of
    its cores, at most 4, for models of at most 256 MiB together, whose programs use one core each; else 1."""
    image_rows: int = 1
    """Generate this many images in every call of the diffusion model: 1, 2, 4, 8 or 16. A call with fewer images is
    filled up, so that an image has the same bytes in any batch. With 1 it also has those of clvr generate."""
    max_body_mb: int = 64
    """Refuse requests with a larger body, in MiB, with status 413."""
    max_pixels: int = 4 << 20
    """Generate images of at most this many pixels, and read images of at most four times as many."""
    max_images: int = 16
    """Read at most this many images of a user in one request. Each adds its tokens to every generation."""
    max_inference_steps: int = 100
    """Allow at most this many steps of the solver for one image."""
    max_loop_steps: int = 16
    """Allow at most this many images in one loop."""
    max_loop_seconds: float = 600.0
    """Start no further image of a loop after this many seconds."""
    drain_seconds: float = 30.0
    """After SIGTERM let running loops continue for this many seconds; the rest is stored as interrupted."""
    keep_days: float = 30.0
    """Delete stored loops after this many days."""
    keep_gb: float = 10.0
    """Delete the oldest stored loops while all together have more than this many GiB."""

    def limits(self) -> "Limits":
        """Returns the limits as the server takes them. Raises: UsageError for invalid ones."""
        from clvr_jax.serving.scheduling.limits import Limits

        return Limits(
            max_running=self.max_running,
            max_queue=self.max_queue,
            max_batch=self.max_batch,
            window_seconds=self.window_ms / 1000,
            concurrent_calls=1 if self.concurrent_calls is None else self.concurrent_calls,
            image_rows=self.image_rows,
            max_body_bytes=self.max_body_mb << 20,
            max_pixels=self.max_pixels,
            max_images=self.max_images,
            max_inference_steps=self.max_inference_steps,
            max_loop_steps=self.max_loop_steps,
            max_seconds=self.max_loop_seconds,
            drain_seconds=self.drain_seconds,
            keep_days=self.keep_days,
            keep_bytes=self.keep_gb * 2**30,
        )


@dataclass(frozen=True)
class Serve:
    """Serves the closed loop over HTTP: a page that shows it live, and an API that clients of OpenAI's API can call."""

    EXAMPLE: ClassVar = "clvr serve --model shapes-tiny --port 8000 --out out/serve"

    model: str = "shapes-tiny"
    """Generate with this model: a shipped name, a directory in diffusers layout, or a Hugging Face id."""
    name: str | None = None
    """Name of the model in the API; that of --model if not given."""
    control: Control = field(default_factory=ControllerOptions)
    verifier: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """Verify with this model, a shipped name or a directory or Hugging Face id of a Qwen3-VL. If not given, the
    controller verifies, in a new conversation for each image."""
    loading: Loading = field(default_factory=LoadOptions)
    host: str = "127.0.0.1"
    """Listen on this address. The default is reached from this machine only; another one needs a key."""
    port: int = 8000
    """Listen on this port; 0 takes a free one."""
    key_variable: str = "CLVR_API_KEY"
    """Environment variable with the key that clients send as a bearer token. Without a value in it no key is needed,
    which is refused for an address that other machines reach; "" serves without a key in any case."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR|gs://BUCKET")] = "out/serve"
    """Store finished loops, and their index, in this directory. Replicas share one directory, or a gs:// bucket."""
    index_variable: str = "CLVR_INDEX_URL"
    """Environment variable with the URL of a PostgreSQL database, postgresql://USER:PASSWORD@HOST/NAME, in which
    replicas share the index of loops. Without a value in it the index is an SQLite file in --out, for one server."""
    lease_seconds: float = 15.0
    """Let another replica resume the loops of this one when it has been silent for this long. No effect with SQLite."""
    warm_up: tuple[int, ...] = (1,)
    """Compile programs for batches of these sizes before the server is ready, by running loops; none if it is empty."""
    warm_up_prompt: str = WARM_UP_PROMPT
    """Prompt of these loops. Programs depend on the length of texts, so choose one like those that are expected."""
    limits: Annotated[LimitOptions, tyro.conf.arg(name="")] = field(default_factory=LimitOptions)
    common: Flags = field(default_factory=Common)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise UsageError(f"--port must be from 0 to {2**16 - 1}, got {self.port}")
        for size in self.warm_up:
            at_least_one("--warm-up", size)
        self.limits.limits()
        if not 1 <= self.lease_seconds <= 3600:
            raise UsageError(f"--lease-seconds must be from 1 to 3600, got {self.lease_seconds}")

    def run(self) -> Result:
        """Serves until SIGTERM or Ctrl-C."""
        key = self._key()
        _check_packages()
        url = os.environ.get(self.index_variable, "").strip() if self.index_variable else ""
        from clvr_jax.files.locks import locked_output
        from clvr_jax.files.output_paths import check_output_directory
        from clvr_jax.serving.index.files import is_bucket

        if not url and is_bucket(self.out):
            variable = self.index_variable or "--index-variable"
            raise UsageError(f"--out {self.out}: a bucket needs an index in PostgreSQL; give its URL in {variable}")
        if not is_bucket(self.out):
            check_output_directory(local_path(self.out))
        self.control.check(self.model)
        # Replicas share the directory; what one of them may write is decided by the index.
        with nullcontext() if url else locked_output(local_path(self.out)):
            port = self._serve(url, key)
        return Result({"host": self.host, "port": port, "out": self.out}, "the server has ended")

    def _serve(self, url: str, key: str | None) -> int:
        """Serves with an index at a URL, or in SQLite if that is empty; returns the port."""
        from clvr_jax.serving.index.shared import SharedStore
        from clvr_jax.serving.index.store import LoopStore

        limits = self.limits.limits()
        keep = limits.keep_days * 86400, limits.keep_bytes
        replica = f"{socket.gethostname()}-{secrets.token_hex(4)}"  # in Kubernetes the host has the pod's name
        # Before the models, which take long to load.
        store = (
            SharedStore(url, self.out, replica, self.lease_seconds, *keep)
            if url
            else LoopStore(local_path(self.out), *keep)
        )
        with console.status(f"loading {self.model}"):
            pipeline = self._load()
        from clvr_jax.serving.jobs import LoopSpec
        from clvr_jax.serving.models import ServedModels, check_calls
        from clvr_jax.serving.run import serve
        from clvr_jax.serving.service import Service

        warm_up = [[LoopSpec(self.warm_up_prompt, number) for number in range(size)] for size in self.warm_up]
        models = ServedModels(pipeline, self.name or self.model, limits.image_rows)
        limits = replace(limits, concurrent_calls=check_calls(pipeline, self.limits.concurrent_calls))
        service = Service(models, limits, store, warm_up)
        return serve(service, self.host, self.port, key, on_start=self._show)

    def _load(self) -> "ClosedLoopPipeline":
        prepare_jax()
        from clvr_jax.commands.generation.memory_check import check_memory
        from clvr_jax.pipelines.closed_loop import ClosedLoopPipeline

        controller = None if self.control.controller_url else self.control.controller or self.model
        cache = self.control.prefix_cache
        loading = check_memory(
            self.model, self.loading, controller=controller, verifier=self.verifier, prefix_cache=cache
        )
        roles = self.control.arguments(self.verifier, is_verified=True)
        return ClosedLoopPipeline.from_pretrained(self.model, **loading.arguments(), **roles)

    def _key(self) -> str | None:
        """Returns the key that clients must send. Raises: UsageError if there must be one and there is none."""
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if not key and self.key_variable and not _is_loopback(self.host):
            raise UsageError(
                f"--host {self.host} is reached from other machines: set a key in {self.key_variable}, or pass "
                '--key-variable "" to serve everybody'
            )
        return key or None

    def _show(self, port: int) -> None:
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{host}:{port}"
        console.print(f"page at {address}/, API at {address}/v1, loops are stored in {self.out}", highlight=False)


def _check_packages() -> None:
    """Raises: ClvrError that names the extra if a package of it is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import sqlalchemy  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ClvrError(f"clvr serve needs {error.name}: pip install 'clvr-jax[serve]'") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
