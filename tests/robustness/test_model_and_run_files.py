"""Configuration files of models and files of training runs that are malformed: one line that names the file.

`make test` runs every third input, `make test-robustness` all of them.
"""

import contextlib
import functools
import json
import os
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from clvr_jax.checkpoint_io.orbax_tree import open_tree
from clvr_jax.checkpoint_io.tensors import stored_tensors
from clvr_jax.cli import main
from clvr_jax.configs import shapes_synth
from clvr_jax.convert.lora.config import AdapterConfig
from clvr_jax.convert.lora.files import FILE_NAME, read_factors
from clvr_jax.convert.streaming.conversion import convert
from clvr_jax.convert.streaming.planning import plan
from clvr_jax.data.engine.intake import read_prompts
from clvr_jax.data.engine.outcomes import OutcomeStore
from clvr_jax.data.engine.recipes import identity, load_synth_recipe
from clvr_jax.data.engine.run import open_run
from clvr_jax.data.preprocessing.qwen3_vl_images import load_processor
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.data.trajectories.dataset import TrajectoryDataset, write_dataset
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.judging.questions import JudgeModel, ReplyFile
from clvr_jax.files.atomic_io import read_json
from clvr_jax.pipelines.flux2.io import load_schedule
from clvr_jax.pipelines.qwen3_vl.generation_config import GenerationConfig
from clvr_jax.pipelines.registry import SHIPPED, load_pipeline
from clvr_jax.pipelines.sdxl.io import read_scheduler
from clvr_jax.providers.endpoint import Endpoint
from clvr_jax.providers.openai_chat import OpenAIChatModel
from clvr_jax.reasoning.trajectories.trajectory import Trajectory
from clvr_jax.training.curves import curves
from tests.data.engine.test_outcomes import made
from tests.robustness.corpus import NO_FILES, Case, json_texts, json_values
from tests.robustness.test_malformed_input import NUMBER_OF_INPUTS

EVERY = 1 if os.environ.get("ALL_INPUTS") else 3
TINY = SHIPPED / "shapes-tiny"
CONTROLLER = TINY / "controller"
SDXL = {
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
METRICS = {"step": 10, "loss": 0.5, "seconds_per_step": 0.1}
GOODPUT = {"time": 1.8e9, "iteration": 10, "seconds": {"start": 5.5, "step/sampling": 20.25}, "end": "complete"}
RECIPE = {"recipe": "r.py", "config": {"train": {"seed": 0, "steps": 5}}}
SYNTH = load_synth_recipe(Path(shapes_synth.__file__))
INDEX = {"metadata": {"total_size": 16}, "weight_map": {
    "00001": "model-00001-of-00002.safetensors", "00002": "model-00002-of-00002.safetensors",
}}  # fmt: skip
ADAPTER = {
    "r": 4, "lora_alpha": 8, "rank_pattern": {"a.to_q": 4}, "alpha_pattern": {"a.to_q": 8}, "use_rslora": False,
    "peft_type": "LORA", "init_lora_weights": True, "bias": "none", "target_modules": ["to_q"], "use_dora": False,
}  # fmt: skip
LORA_HEADER = {
    "__metadata__": {"format": "pt", "lora_alpha": "8"},
    "transformer.blocks.0.to_q.lora_A.weight": {"dtype": "F32", "shape": [4, 8], "data_offsets": [0, 128]},
    "transformer.blocks.0.to_q.lora_B.weight": {"dtype": "F32", "shape": [8, 4], "data_offsets": [128, 256]},
}
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 3], "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.0}
JUDGE_REPLY = {
    "key": "k", "picture": "1", "question": "q", "reply": "Score: 3", "error": None,
    "usage": {"calls": 1, "seconds": 1.5}, "adapted": ["seed left out"],
}  # fmt: skip
FINE = "read, and found to be fine"
PROMPT = {"prompt": "a red circle", "id": "a", "metadata": {"tag": "x"}}


def _controller(root: Path, case: Case) -> None:
    """Converts a Qwen3-VL whose config.json is malformed."""
    root.mkdir()
    for path in CONTROLLER.iterdir():
        if path.name != "config.json":
            (root / path.name).symlink_to(path)
    case.write(root / "config.json")
    out = root.parent / "out"
    assert main(["convert", str(root), str(out), "--to", "jax", "--dry-run"]) in (0, 1, 2)
    assert not out.exists()


def _processor(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "preprocessor_config.json")
    load_processor(root)


def _nested_processor(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "processor_config.json")
    load_processor(root)


def _generation_config(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "generation_config.json")
    GenerationConfig.read(root, vocab_size=100)


def _tokenizer(root: Path, case: Case) -> None:
    shutil.copytree(TINY / "tokenizer", root)
    (root / "tokenizer.json").unlink()
    case.write(root / "tokenizer.json")
    load_tokenizer(root)


def _adapter(root: Path, case: Case) -> None:
    """Reads the configuration of a LoRA that PEFT saved, and the scale of two of its modules."""
    root.mkdir()
    save_file({"x": np.zeros(2, np.float32)}, root / "adapter_model.safetensors")
    case.write(root / "adapter_config.json")
    config = AdapterConfig.read(root / "adapter_model.safetensors", "transformer")
    for name in ("a.to_q", "a.to_k"):
        config.scale(name, 4, None)


def _lora_file(root: Path, case: Case) -> None:
    """Reads a LoRA of which the JSON header is malformed."""
    root.mkdir()
    case.write(root / "header")
    header = (root / "header").read_bytes() if (root / "header").is_file() else b""
    numbers = np.ones(2 * 4 * 8, np.float32).tobytes()
    (root / FILE_NAME).write_bytes(struct.pack("<Q", len(header)) + header + numbers)
    read_factors(root / FILE_NAME, {"blocks.0.to_q": (8, 8)})


def _synth_run(root: Path, case: Case) -> None:
    """Opens a run of the data engine that has an outcome."""
    root.mkdir()
    case.write(root / "synth.json")
    (root / "outcomes" / "00").mkdir(parents=True)
    (root / "outcomes" / "00" / "p.zip").write_bytes(b"")
    open_run(SYNTH, SYNTH.config, root)


def _outcome(root: Path, case: Case) -> None:
    """Reads a stored outcome and the record in it."""
    root.mkdir()
    case.write(root / "outcome.json")
    content = (root / "outcome.json").read_bytes() if (root / "outcome.json").is_file() else b""
    id, members = _made_outcome()
    store = OutcomeStore(root / "outcomes")
    Path(store.path(id)).parent.mkdir(parents=True)
    with zipfile.ZipFile(store.path(id), "w") as archive:
        for name, usual in members.items():
            archive.writestr(name, content if name == "outcome.json" else usual)
    finished = store.read(id)
    if finished.is_kept:
        store.record(finished)
        list(store.verification(finished))


def _judge_replies(root: Path, case: Case) -> None:
    ReplyFile(root, _judge()).close()
    (path,) = root.iterdir()
    path.unlink()
    case.write(path)
    ReplyFile(root, _judge()).close()


def _flux2_scheduler(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "scheduler_config.json")
    load_schedule(root)


def _sdxl_scheduler(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "scheduler_config.json")
    read_scheduler(read_json(root / "scheduler_config.json"))


def _metrics(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "metrics.jsonl")
    curves([root])


def _goodput(root: Path, case: Case) -> None:
    root.mkdir()
    (root / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    case.write(root / "goodput.jsonl")
    with contextlib.suppress(OSError), (root / "goodput.jsonl").open("ab") as file:  # as a last line it may be torn
        file.write(f"\n{json.dumps(GOODPUT)}\n".encode())
    curves([root])


def _recipe(root: Path, case: Case) -> None:
    root.mkdir()
    (root / "metrics.jsonl").write_text(json.dumps(METRICS) + "\n")
    case.write(root / "recipe.json")
    curves([root])


def _prompts(root: Path, case: Case) -> None:
    root.mkdir()
    case.write(root / "prompts.jsonl")
    list(read_prompts(root / "prompts.jsonl"))


def _pipeline(name: str) -> Callable[[Path, Case], None]:
    """Loads a pipeline of which one file is malformed; its weights are not read."""

    def read(root: Path, case: Case) -> None:
        root.mkdir()
        for path in TINY.iterdir():
            if path.name != name.split("/")[0]:
                (root / path.name).symlink_to(path)
        if "/" in name:
            shutil.copytree(TINY / name.split("/")[0], root / name.split("/")[0])
            (root / name).unlink()
        case.write(root / name)
        load_pipeline(str(root))

    return read


def _index(root: Path, case: Case) -> None:
    root.mkdir()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({name[6:11]: np.zeros(2, np.float32)}, root / name)
    case.write(root / "model.safetensors.index.json")
    stored_tensors(root)


def _tree(name: str) -> Callable[[Path, Case], None]:
    """Opens an Orbax checkpoint of which one file is malformed."""

    def read(root: Path, case: Case) -> None:
        shutil.copytree(_converted(), root)
        (root / name).unlink()
        case.write(root / name)
        open_tree(root)

    return read


@functools.cache
def _converted() -> Path:
    out = Path(tempfile.mkdtemp()) / "vae"
    convert(plan(TINY / "vae", "jax"), out)
    return next(path.parent for path in out.rglob("_METADATA"))


@functools.cache
def _dataset() -> Path:
    out = Path(tempfile.mkdtemp()) / "set"
    write_dataset(out, [Trajectory("a red circle", (), "unparseable", error="no action token")])
    return out


@functools.cache
def _judge() -> JudgeModel:
    """A judge that is never asked."""
    return JudgeModel(OpenAIChatModel(Endpoint("judge", "http://127.0.0.1:9/v1", key_variable=None)))


@functools.cache
def _made_outcome() -> tuple[str, dict[str, bytes]]:
    """Id and files of an outcome of the data engine."""
    store = OutcomeStore(tempfile.mkdtemp())
    id = made(store, 1).item.id
    with zipfile.ZipFile(store.path(id)) as archive:
        return id, {name: archive.read(name) for name in archive.namelist()}


def _dataset_file(name: str) -> Callable[[Path, Case], None]:
    """Reads a dataset of trajectories of which one file is malformed."""

    def read(root: Path, case: Case) -> None:
        shutil.copytree(_dataset(), root)
        (root / name).unlink()
        case.write(root / name)
        TrajectoryDataset(root)[0]

    return read


def _array_file() -> str:
    """Name of the description of an array in the converted tree."""
    return str(next(_converted().rglob(".zarray")).relative_to(_converted()))


@pytest.fixture(scope="module", autouse=True)
def _transformers_is_imported():
    """Importing it takes seconds, which are not those of the first malformed tokenizer."""
    from transformers import AutoTokenizer

    assert AutoTokenizer  # what reads a tokenizer that is not certainly Qwen's
    load_tokenizer(TINY / "tokenizer")


@pytest.fixture(autouse=True)
def _no_weights_are_read(monkeypatch):
    for name in ("load_transformer", "load_vae", "load_text_encoder"):
        monkeypatch.setattr(f"clvr_jax.pipelines.flux2.io.{name}", _refuse)


def _refuse(*_, **__):
    raise ClvrError(FINE)


READERS: dict[str, tuple[Callable[[Path, Case], None], Any]] = {
    "config.json of Qwen3-VL": (_controller, read_json(CONTROLLER / "config.json")),
    "preprocessor_config.json": (_processor, read_json(CONTROLLER / "preprocessor_config.json")),
    "processor_config.json": (
        _nested_processor,
        {"image_processor": read_json(CONTROLLER / "preprocessor_config.json"), "processor_class": "Qwen3VLProcessor"},
    ),
    "generation_config.json": (_generation_config, GENERATION),
    "tokenizer.json": (_tokenizer, read_json(TINY / "tokenizer" / "tokenizer.json")),
    "adapter_config.json of PEFT": (_adapter, ADAPTER),
    "header of a LoRA file": (_lora_file, LORA_HEADER),
    "synth.json": (_synth_run, identity(SYNTH, SYNTH.config)),
    "outcome.json": (_outcome, json.loads(_made_outcome()[1]["outcome.json"])),
    "replies of a judge": (_judge_replies, JUDGE_REPLY),
    "scheduler_config.json of FLUX.2": (_flux2_scheduler, read_json(TINY / "scheduler" / "scheduler_config.json")),
    "scheduler_config.json of SDXL": (_sdxl_scheduler, SDXL),
    "metrics.jsonl": (_metrics, METRICS),
    "goodput.jsonl": (_goodput, GOODPUT),
    "recipe.json of a run": (_recipe, RECIPE),
    "prompts.jsonl": (_prompts, PROMPT),
    "clvr.json": (_pipeline("clvr.json"), read_json(TINY / "clvr.json")),
    "model_index.json": (_pipeline("model_index.json"), read_json(TINY / "model_index.json")),
    "tokenizer_config.json": (
        _pipeline("tokenizer/tokenizer_config.json"),
        read_json(TINY / "tokenizer" / "tokenizer_config.json"),
    ),
    "model.safetensors.index.json": (_index, INDEX),
    "_METADATA of Orbax": (_tree("_METADATA"), read_json(_converted() / "_METADATA")),
    ".zarray of Orbax": (_tree(_array_file()), read_json(_converted() / _array_file())),
    "dataset_info.json": (_dataset_file("dataset_info.json"), read_json(_dataset() / "dataset_info.json")),
    "features.json": (_dataset_file("features.json"), read_json(_dataset() / "features.json")),
}


def _cases() -> Iterator[tuple[str, Case]]:
    for name, (_, valid) in READERS.items():
        for case in (*json_texts(json.dumps(valid).encode()), *json_values(valid, 36, seed=len(name))):
            yield name, case


ALL_CASES = list(_cases())
CASES = [pytest.param(*each, id=f"{each[0]}-{number}") for number, each in enumerate(ALL_CASES) if number % EVERY == 0]
RECIPE_CASES = [*json_texts(json.dumps(RECIPE).encode()), *json_values(RECIPE, 12, seed=1)]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_one_line_that_names_the_file(name, case, tmp_path, capsys):
    try:
        READERS[name][0](tmp_path / "input", case)
    except ClvrError as error:
        message = str(error)
    else:  # the command's own line, or nothing where a changed value is as good as the other
        message = capsys.readouterr().err
        assert "--debug prints the traceback" not in message
        message = next((line for line in message.splitlines() if line.startswith("clvr: ")), "")
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 2000
    if case.name in NO_FILES:  # nor is one of these an absent optional file
        assert message not in ("", FINE)


def _loads_a_pipeline(name: str) -> bool:
    return name in ("clvr.json", "model_index.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", READERS)
def test_what_is_well_formed_is_read(name, tmp_path, capsys):
    read, valid = READERS[name]
    case = Case("valid", lambda path: path.write_text(json.dumps(valid)))
    with pytest.raises(ClvrError, match=FINE) if _loads_a_pipeline(name) else contextlib.nullcontext():
        read(tmp_path / "input", case)
    assert "clvr: " not in capsys.readouterr().err


def test_a_run_that_is_exported_names_its_damaged_recipe_file(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for case in RECIPE_CASES:
        path = run / "recipe.json"
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        case.write(path)
        assert main(["convert", str(run), str(tmp_path / "out"), "--to", "torch"]) in (1, 2)
        said = capsys.readouterr().err
        assert said.startswith("clvr: "), (case.name, said)
        assert len(said.splitlines()) == 1, (case.name, said)
        assert "--debug prints the traceback" not in said, (case.name, said)
        assert list(tmp_path.iterdir()) == [run]


def test_the_docs_say_how_many_inputs_there_are():
    count = NUMBER_OF_INPUTS + len(ALL_CASES) + len(RECIPE_CASES)
    text = (Path(__file__).parents[2] / "docs" / "reference" / "faults.md").read_text()
    assert f"`make test-robustness` tries {count:,} malformed inputs" in " ".join(text.split())
