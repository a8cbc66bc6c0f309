"""Whatever is in a file that somebody gives us: one line on stderr, exit 1 or 2, nothing left behind.

`make test` runs every third input, `make test-robustness` all of them. The command line runs in this process; what
would load a model is replaced by an error of its own, which an input that happens to be fine ends in.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clvr_jax.cli import main
from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.harness.run_directory import Record, RunDirectory
from clvr_jax.evaluation.systems.system import SystemOutput, image_seed
from clvr_jax.reasoning import IMAGE_GEN, TERMINATE, Step, Trajectory, Verdict
from clvr_jax.reasoning.verification.verification import Requirement, Verification
from tests.robustness.corpus import Case, images, json_texts, json_values

EVERY = 1 if os.environ.get("ALL_INPUTS") else 3
PROMPT = "a red circle"
METADATA = {"tag": "single_object", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": PROMPT}
LABEL = {"image": "a.png", "prompt": PROMPT, "label": True, "kind": "right"}
LISTED = {"file_name": "a.png", "prompt": PROMPT}
IMAGINE = {"id": 1, "instruction": "A photo.", "note": "It is changed.", "type": "COLOR"}
GENEVALPP = {"tag": "counting", "include": [{"class": "cup", "count": 5, "color": "red"}],
             "exclude": [{"class": "cup", "count": 6}], "prompt": "five cups"}  # fmt: skip
GENEVAL2 = {"prompt": "a dog", "atom_count": 3, "vqa_list": [["Are there any dogs?", "Yes"]], "skills": ["object"]}
WISE = {"Prompt": "A thing", "Explanation": "It shows it.", "prompt_id": 1}
RESULTS = {
    "benchmark": "shapes", "judge": {"name": "d", "version": "1"}, "settings": {}, "seed": 0, "unit": "0 to 1",
    "summary": {"overall": {"mean_of_tags": 0.5}},
    "pictures": [{"index": 0, "sample": 0, "prompt": PROMPT, "tag": "colors", "tier": None, "correct": True, "nfe": 4,
                  "seconds": 0.5, "steps": 1, "outcome": "accepted", "device": "cpu"}],
}  # fmt: skip


def _run_directory(root: Path) -> None:
    """A finished run of the closed loop on one prompt."""
    pixels = np.full((64, 64, 3), 200, np.uint8)
    checked = Verification((Requirement("red circle", True, 0.9, "it is red"),), "I see a circle.", "describe", "v")
    first = Step("Plan: red circle. Draw.", IMAGE_GEN, (), pixels, Verdict(("x",), "r"), 4, 0.5, seed=1)
    edit = Step("Unmet: x. Add.", IMAGE_GEN, (0,), pixels, Verdict(()), 4, 0.5, seed=2, verification=checked)
    trajectory = Trajectory(
        PROMPT, (first, edit, Step("Unmet: nothing.", TERMINATE)), "accepted", "m", 0, {"a": "1"}, 1.0
    )
    folder = RunDirectory(root)
    identity = {"benchmark": "shapes", "settings": {"mode": "x"}, "seed": 0, "samples": 1}
    folder.prepare(identity, [METADATA])
    drawn = SystemOutput.from_result(trajectory)
    folder.add(0, 0, drawn, Record.from_output(drawn, PROMPT, image_seed(0, PROMPT, 0), 1.0, "cpu"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished") / "run"
    _run_directory(root)
    return root


@pytest.fixture(autouse=True)
def _nothing_is_loaded(monkeypatch):
    def refuse(*_, **__):
        raise ClvrError("read, and found to be fine")

    monkeypatch.setattr("clvr_jax.commands.generation.verifying.Verify._verifier", refuse)
    monkeypatch.setattr("clvr_jax.commands.eval.verifier.EvalVerifier._verifier", refuse)
    monkeypatch.setattr("clvr_jax.commands.eval.system.SystemOptions.check", lambda _: None)
    monkeypatch.setattr("clvr_jax.commands.eval.system.SystemOptions.build", refuse)
    monkeypatch.setattr("clvr_jax.evaluation.harness.images.load_external", refuse)
    monkeypatch.setattr("clvr_jax.commands.eval.benchmarks.prepare_jax", lambda: None)
    for module in ("comparison", "scaling"):
        monkeypatch.setattr(f"clvr_jax.evaluation.reporting.{module}.can_plot", lambda: False)


def _lines(*entries: object) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def _with_image(root: Path) -> Path:
    root.mkdir()
    Image.new("RGB", (8, 8)).save(root / "a.png")
    return root


def _labels(root: Path, case: Case) -> list[str]:
    case.write(_with_image(root) / "labels.jsonl")
    return ["eval", "verifier", "--images", str(root), "--count", "0"]


def _labeled_image(root: Path, case: Case) -> list[str]:
    root.mkdir()
    (root / "labels.jsonl").write_bytes(_lines(LABEL))
    case.write(root / "a.png")
    return ["eval", "verifier", "--images", str(root), "--count", "0"]


def _picture_list(root: Path, case: Case) -> list[str]:
    from clvr_jax.evaluation.systems.external_images import external_images

    case.write(_with_image(root) / "metadata.jsonl")
    external_images(root, "x")  # a call, because the command asks for the prompts first
    raise ClvrError("read, and found to be fine")


def _shapes_prompts(root: Path, case: Case) -> list[str]:
    root.mkdir()
    case.write(root / "prompts.jsonl")
    return ["eval", "shapes", "--model", "shapes-tiny", "--prompts", str(root / "prompts.jsonl")]


def _benchmark(name: str, *options: str):
    def arguments(root: Path, case: Case) -> list[str]:
        _with_image(root)
        case.write(root / "prompts.jsonl")
        judge = ["--judge", "j", "--judge-url", "http://127.0.0.1:9/v1", "--judge-key-variable", ""]
        return ["eval", name, *options, "--prompts", str(root / "prompts.jsonl"), "--images", str(root), *judge]

    return arguments


def _results(root: Path, case: Case) -> list[str]:
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
    (root / "b" / "results.json").write_text(json.dumps({**RESULTS, "settings": {"other": 1}}))
    case.write(root / "a" / "results.json")
    return ["eval", "compare", f"a={root / 'a'}", f"b={root / 'b'}"]


def _image(root: Path, case: Case) -> list[str]:
    root.mkdir()
    case.write(root / "a.png")
    return ["verify", PROMPT, str(root / "a.png")]


def _part_of_a_run(name: str):
    def arguments(root: Path, case: Case, finished: Path) -> list[str]:
        shutil.copytree(finished, root)
        (root / name).unlink()
        case.write(root / name)
        return ["eval", "scaling", f"x={root}"]

    return arguments


TRAJECTORY = "00000/trajectories/0000/trajectory.json"
RUN_FILES = (TRAJECTORY, "benchmark.json", "00000/metadata.jsonl", "00000/records/0000.json")


def _cases() -> Iterator[tuple[str, object, Case]]:
    lists = {
        "labels": (_labels, LABEL), "file names": (_picture_list, LISTED),
        "shapes prompts": (_shapes_prompts, METADATA),
        "imaginebench": (_benchmark("imaginebench"), IMAGINE), "genevalpp": (_benchmark("genevalpp"), GENEVALPP),
        "geneval2": (_benchmark("geneval2"), GENEVAL2),
        "wise": (_benchmark("wise", "--edition", "verified"), WISE), "results": (_results, RESULTS),
    }  # fmt: skip
    for name, (arguments, valid) in lists.items():
        for case in (*json_texts(json.dumps(valid).encode()), *json_values(valid, 24, seed=len(name))):
            yield name, arguments, case
    for case in (*json_texts(b"item_id,text\na,b\n"),):
        yield "dpg", _benchmark("dpg"), case
    for case in images(48):
        yield "verify", _image, case
    for case in images(12, seed=1):
        yield "labeled image", _labeled_image, case
        yield "image of a step", _part_of_a_run("00000/trajectories/0000/step_00.png"), case


CASES = list(_cases())


def _run(words, root, capsys, monkeypatch) -> tuple[int, str, str]:
    """Runs the command in an empty directory; unless it ends well, nothing may be left there or in --out."""
    work, out = root.parent / "work", root.parent / "out"
    work.mkdir()
    monkeypatch.chdir(work)
    code = main([*words, *([] if words[0] == "verify" else ["--out", str(out)])])
    captured = capsys.readouterr()
    left = [str(path) for path in (*work.rglob("*"), *out.rglob("*"))]
    assert code == 0 or not left, left
    return code, captured.out, captured.err


def _check(code: int, out: str, err: str) -> None:
    lines = err.splitlines()
    assert code in (1, 2), (code, out, err)
    assert out == ""
    assert lines, "no message"
    assert lines[-1].startswith("clvr: "), err
    assert sum(line.startswith("clvr: ") for line in lines) == 1, err
    assert "--debug prints the traceback" not in err, err
    assert "Traceback" not in err, err
    assert len(lines[-1]) < 2000, len(lines[-1])


def _parameters(cases):
    return [pytest.param(*case, id=f"{case[0]}-{number}") for number, case in enumerate(cases) if number % EVERY == 0]


@pytest.mark.parametrize(("kind", "arguments", "case"), _parameters(CASES))
def test_one_line_and_nothing_left(kind, arguments, case, finished, tmp_path, capsys, monkeypatch):
    root = tmp_path / "input"
    if arguments is _picture_list:
        with pytest.raises(ClvrError) as caught:
            _picture_list(root, case)
        assert len(str(caught.value).splitlines()) == 1
        return
    words = arguments(root, case, finished) if arguments.__code__.co_argcount == 3 else arguments(root, case)
    code, out, err = _run(words, root, capsys, monkeypatch)
    if code != 0 or kind not in ("results", "image of a step"):  # where a changed value may be as good as the other
        _check(code, out, err)


_OF_A_RUN_FILE = len(list(json_texts(b""))) + 36
NUMBER_OF_INPUTS = len(CASES) + len(RUN_FILES) * _OF_A_RUN_FILE


def _run_cases(name: str) -> list[tuple[str, int]]:
    return [(name, number) for number in range(_OF_A_RUN_FILE) if number % EVERY == 0]


@pytest.mark.parametrize(("name", "number"), [each for name in RUN_FILES for each in _run_cases(name)])
def test_files_of_a_finished_run(name, number, finished, tmp_path, capsys, monkeypatch):
    content = (finished / name).read_bytes()
    cases = [*json_texts(content), *json_values(json.loads(content), 36, seed=len(name))]
    root = tmp_path / "input"
    code, out, err = _run(_part_of_a_run(name)(root, cases[number], finished), root, capsys, monkeypatch)
    if code != 0:  # a changed text or number may be a run as good as the other
        _check(code, out, err)


def test_the_corpus_is_large_enough():
    assert NUMBER_OF_INPUTS >= 600


def test_inputs_that_are_fine_are_read(finished, tmp_path, capsys, monkeypatch):
    def whole(content: bytes) -> Case:
        return Case("whole", lambda path: path.write_bytes(content))

    for number, (arguments, valid) in enumerate(
        ((_labels, LABEL), (_shapes_prompts, METADATA), (_benchmark("imaginebench"), IMAGINE),
         (_benchmark("genevalpp"), GENEVALPP), (_benchmark("geneval2"), GENEVAL2),
         (_benchmark("wise", "--edition", "verified"), WISE))
    ):  # fmt: skip
        root = tmp_path / str(number) / "input"
        root.parent.mkdir()
        code, _, err = _run(arguments(root, whole(_lines(valid))), root, capsys, monkeypatch)
        assert (code, err.splitlines()[-1]) == (1, "clvr: read, and found to be fine")
    with pytest.raises(ClvrError, match="found to be fine"):
        _picture_list(tmp_path / "list", whole(_lines(LISTED)))
