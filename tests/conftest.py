"""Eight virtual devices for every test, so that meshes are real; what names no device runs on the first."""

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from clvr_jax.training.distributed import virtual_devices

if TYPE_CHECKING:
    from clvr_jax.providers.endpoint import Endpoint
    from tests.helpers.bucket_server import BucketServer
    from tests.providers.server import LoopbackServer

pytest_plugins = ["tests.helpers.cpu_time"]

# Collection imports libraries with millions of objects, of which none is garbage: `pytest_collection_finish`.
gc.disable()

# A program for a TPU may be compiled, but none is here to be looked for.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Most of the time goes into compiling small programs, which run once or twice; `optimized` is for the others. XLA's
# older emitters of code for CPUs compile in about a third of the time, if the program is one LLVM module. For programs
# that are optimized, level 1 takes two thirds of the time of level 3, and the shipped models run as fast.
FAST_COMPILATION = (
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 --xla_backend_optimization_level=1"
)
os.environ["XLA_FLAGS"] = FAST_COMPILATION
os.environ.update(virtual_devices(8))
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# PyTorch's threads wait for one another in a loop; its models are too small to gain from a second one.
os.environ["OMP_NUM_THREADS"] = "1"
# Many files, both workers and the commands in subprocesses compile the same programs, most of them small: operations of
# models that are made and called outside of jit. Reading one from the cache takes a fraction of compiling it.
PROGRAMS = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"clvr-jax-test-programs-{os.getuid()}")
)
# Tests say what a jitted function compiles; a store of programs would answer in its place.
os.environ.setdefault("CLVR_PROGRAMS", "off")
MIN_COMPILE_SECONDS = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

ONE_WORKER = (
    "tests/serving/api/",
    "tests/serving/page/",
    "tests/serving/test_concurrent_calls.py",
    "tests/serving/test_denoising_steps.py",
)
"""Beginnings of the paths of the tests with the server of `tests/serving/conftest.py`, which share one worker."""

DISABLE_OPTIMIZATIONS = "jax_disable_most_optimizations"
OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}
"""Options of the compiler for a program that runs often: what users have."""


@contextmanager
def optimized() -> Iterator[None]:
    """Compiles with LLVM's optimizations; for models that decode or sample for more than some seconds.

    The emitters stay those of the tests: no option changes them for all programs once JAX has begun.
    """
    import jax

    jax.config.update(DISABLE_OPTIMIZATIONS, False)
    try:
        yield
    finally:
        jax.config.update(DISABLE_OPTIMIZATIONS, True)


def pytest_configure(config: pytest.Config) -> None:
    """Turns on the cache of compiled programs that all tests share, and Ctrl-C for tests that send it to a child.

    A shell starts background jobs with SIGINT ignored, the suite may be one, and its children would ignore it as well.
    """
    import jax
    from jax.experimental import topologies

    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    topologies.get_topology_desc = _hide_flags_from_libtpu(topologies.get_topology_desc)
    jax.config.update(DISABLE_OPTIMIZATIONS, True)  # importing JAX may have preceded the environment variables
    jax.config.update("jax_compilation_cache_dir", PROGRAMS)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(MIN_COMPILE_SECONDS))


def _hide_flags_from_libtpu(describe: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function that describes a TPU topology, which first hides the flags that libtpu does not know.

    libtpu reads the environment when it first compiles, and ends the process at such a flag. JAX has read it by then.
    """

    def described(*args: Any, **options: Any) -> Any:
        import jax

        jax.devices()
        os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(FAST_COMPILATION, "").strip()
        return describe(*args, **options)

    return described


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, the tests of `ONE_WORKER` share a worker: two would trace the server's programs twice."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ONE_WORKER[0] if nodeid.startswith(ONE_WORKER) else str(super()._split_scope(nodeid))

    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Turns the garbage collector on; it never reads what was imported, and seldom what the tests make.

    While a model is traced, hundreds of thousands of objects live, and each collection reads many of them in vain.
    """
    gc.freeze()
    gc.set_threshold(100_000)
    gc.enable()


@pytest.fixture
def own_directories(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are in tmp_path, and the user's cache stays as it is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def drawing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory with random weights that generates images of 64 x 64 pixels; tests only read it."""
    from clvr_jax.data.preprocessing.text import load_tokenizer, train_tokenizer
    from clvr_jax.models.flux2 import (
        AutoencoderKLFlux2,
        AutoencoderKLFlux2Config,
        Flux2Transformer,
        Flux2TransformerConfig,
    )
    from clvr_jax.models.qwen3 import Qwen3, Qwen3Config
    from clvr_jax.pipelines.flux2 import Flux2Pipeline, Flux2Settings
    from tests.commands.command_line import PROMPT
    from tests.helpers.models import random_module

    folder = tmp_path_factory.mktemp("drawing")
    train_tokenizer([PROMPT], 320, folder / "words")
    vae = AutoencoderKLFlux2Config(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64
    )
    encoder = Qwen3Config(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        rope_theta=10_000.0,
        max_position_embeddings=640,
        tie_word_embeddings=True,
    )
    transformer = Flux2TransformerConfig(
        in_channels=vae.token_channels,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    Flux2Pipeline(
        random_module(lambda rngs: Flux2Transformer(transformer, rngs=rngs)),
        random_module(lambda rngs: AutoencoderKLFlux2(vae, rngs=rngs)),
        random_module(lambda rngs: Qwen3(encoder, rngs=rngs)),
        load_tokenizer(folder / "words"),
        Flux2Settings(text_encoder_out_layers=(1,), text_buckets=(128, 640), sample_size=64, num_inference_steps=2),
    ).save_pretrained(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def small_qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small Qwen3-VL with random weights; tests only read it."""
    from tests.helpers.models import save_small_qwen3_vl

    return save_small_qwen3_vl(tmp_path_factory.mktemp("qwen3_vl") / "model")


@pytest.fixture(scope="session")
def small_flux2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a FLUX.2 pipeline with a small transformer of random weights; tests only read it."""
    from tests.helpers.models import small_flux2

    directory = tmp_path_factory.mktemp("flux2") / "model"
    small_flux2("shapes-tiny-sft", num_single_layers=2).save_pretrained(str(directory))
    return directory


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator["LoopbackServer"]:
    """An HTTP server on loopback that answers as the test says."""
    from tests.providers.server import KEY, LoopbackServer

    monkeypatch.setenv("LOOPBACK_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = LoopbackServer()
    yield running
    running.close()


@pytest.fixture
def endpoint(server: "LoopbackServer") -> Callable[..., "Endpoint"]:
    """A function that makes an endpoint of that server from other fields of `Endpoint`."""
    from clvr_jax.providers.endpoint import Endpoint

    def make(**fields: Any) -> Endpoint:
        values = {"base_url": server.url + "/v1", "key_variable": "LOOPBACK_KEY", "backoff": 0.001, "max_retries": 2}
        return Endpoint("tiny", **{**values, **fields})

    return make


@pytest.fixture(scope="module")
def bucket_server() -> Iterator["BucketServer"]:
    """A server on loopback that gs:// leads to, with the bucket `runs`, which is empty at first."""
    from tests.helpers.bucket_server import BucketServer, forget_clients

    running = BucketServer()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running.environment.items():
            patch.setenv(name, value)
        forget_clients()
        yield running
    forget_clients()
    running.close()


@pytest.fixture
def bucket(bucket_server: "BucketServer") -> Iterator["BucketServer"]:
    """The same server with an empty bucket and no faults."""
    bucket_server.empty()
    yield bucket_server
    bucket_server.faults.clear()
