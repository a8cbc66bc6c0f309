import importlib.util
import json

import pytest
from huggingface_hub import ModelCard

from clvr_jax.cli import main
from clvr_jax.commands.checkpoints.merging import parse_weight
from clvr_jax.display import plots
from clvr_jax.errors import UsageError
from clvr_jax.merging import report as module
from tests.merging.small_models import KEY, ROLES, before_tensor, bits, edit, interrupt, tensors_of, three_models


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    three_models(tmp_path)
    return ["merge", *(word for role in ROLES for word in (f"--{role}", role)), "--out", "out"]


def test_a_merge_tells_where_it_is_and_what_it_is_made_of(command, tmp_path, capsys):
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out == "out\n"
    assert "49/49" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "diffusion_pytorch_model.safetensors", "merge.json",
    ]  # fmt: skip
    recipe = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert recipe["weights"] == {"distill": 1.0, "align": 1.0}
    assert {role: made["source"] for role, made in recipe["inputs"].items()} == {role: role for role in ROLES}
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "diffusers"
    assert " ".join(["clvr", *command]) in card.text


def test_options_reach_the_numbers_and_the_recipe(command, tmp_path, capsys):
    options = ["--method", "dare", "--density", "0.5", "--seed", "3", "--align-weight", "attn=0.5", "0", "--json"]
    assert main([*command, *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["method"], result["tensors"], result["out"]) == ("dare", 49, "out")
    recipe = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (recipe["density"], recipe["seed"]) == (0.5, 3)
    assert recipe["weights"] == {"distill": 1.0, "align": {"attn": 0.5, "": 0.0}}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--align-weight attn=0.5 0 --method dare --density 0.5 --seed 3" in card


def test_a_lora_with_a_text_encoder_is_merged_with_the_option_that_the_error_names(command, tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    key = KEY.removesuffix(".weight")
    rows, columns = tensors_of(tmp_path / "base")[KEY].shape
    tensors = {
        f"transformer.{key}.lora_A.weight": torch.ones(2, columns) / 100,
        f"transformer.{key}.lora_B.weight": torch.ones(rows, 2) / 100,
        "text_encoder.q_proj.lora_A.weight": torch.ones(2, 2),
    }
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    given = [word if word != "align" else "lora" for word in command]
    assert main(given) == 1
    assert "--ignore-text-encoder" in capsys.readouterr().err
    assert main([*given, "--ignore-text-encoder"]) == 0
    assert "--ignore-text-encoder" in (tmp_path / "out" / "README.md").read_text()


def test_a_place_inside_an_input_and_an_address_are_refused(command, tmp_path, capsys):
    for place, code, said in (("base/out", 2, "is inside of base"), ("s3://bucket/out", 2, "s3://bucket/out: a URL")):
        before = sorted(tmp_path.rglob("*"))
        assert main([*command[:-1], place]) == code
        assert said in capsys.readouterr().err
        assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == [
            path for path in before if "cache" not in path.parts
        ]


def test_a_dry_run_lists_the_tensors_and_writes_nothing(command, tmp_path, capsys):
    before = sorted(path.name for path in tmp_path.iterdir() if path.name != "cache")
    assert main([*command, "--dry-run", "--json", "--distill-weight", "to_out=2"]) == 0
    plan = {row["key"]: row for row in json.loads(capsys.readouterr().out)["plan"]}
    assert plan.keys() == tensors_of(tmp_path / "base").keys()
    assert plan[KEY] == {"key": KEY, "shape": [32, 128], "dtype": "float32", "weights": [2.0, 1.0]}
    assert main([*command, "--dry-run"]) == 0
    assert KEY in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == before


def test_a_report_without_matplotlib_says_so_and_has_the_numbers(command, tmp_path, capsys, monkeypatch):
    for where in (module, plots):
        monkeypatch.setattr(where, "can_plot", lambda: False)
    assert main([*command, "--report"]) == 0
    captured = capsys.readouterr()
    assert "matplotlib is not installed (pip install matplotlib)" in captured.err
    assert "single_transformer_blocks.1" in captured.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["tensors"].keys() == tensors_of(tmp_path / "base").keys()
    assert set(report["tensors"][KEY]) == {"base_norm", "distill", "align", "cosine"}
    assert report["whole"] == json.loads((tmp_path / "out" / "merge.json").read_text())["norms"]
    assert report["layers"]["single_transformer_blocks.1"]["distill"] == pytest.approx(1 / 30, rel=0.1)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_report_with_matplotlib_has_two_plots(command, tmp_path):
    assert main([*command, "--report"]) == 0
    for name in ("report_norms.png", "report_cosines.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_is_one_line_and_leaves_nothing(command, tmp_path, capsys):
    def said(code, *options):
        assert main([*command, *options]) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        *_, line = captured.err.splitlines()
        assert line.startswith("clvr: ")
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))
        return line

    assert "neither a number nor PATTERN=NUMBER" in said(2, "--distill-weight", "much")
    assert "no parameter is matched first by 'atn'" in said(1, "--distill-weight", "atn=1")
    assert "keeps all entries of the deltas" in said(2, "--density", "0.5")
    assert "exists already" in main_error(["merge", *command[1:-1], "base"], capsys)
    assert "--align" in main_error(command[:5] + command[7:], capsys)
    edit(tmp_path / "align", lambda tensors: tensors[KEY].fill(float("nan")))
    assert f"align: {KEY} contains NaN" in said(1)


def main_error(arguments, capsys):
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_a_stopped_merge_is_resumed(command, tmp_path, capsys):
    with before_tensor(10, interrupt):
        assert main(command) == 130
    assert (tmp_path / ".out.merge").is_dir()
    assert main(command) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert main([*command[:-1], "whole"]) == 0
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("0.5",), 0.5),
        (("attn=0.5",), {"attn": 0.5}),
        (("0", "attn=0.5", "norm=-1"), {"attn": 0.5, "norm": -1.0, "": 0.0}),
        ((r"(?=x)y=2",), {"(?=x)y": 2.0}),
    ],
)
def test_weights_are_read(given, expected):
    found = parse_weight("--align-weight", given)
    assert found == expected
    if isinstance(expected, dict):
        assert list(found) == list(expected)


@pytest.mark.parametrize("given", [(), ("1", "2"), ("a=1", "a=2"), ("(=1",), ("attn=",), ("attn",)])
def test_weights_that_make_no_sense_are_usage_errors(given):
    with pytest.raises(UsageError, match="--align-weight"):
        parse_weight("--align-weight", given)
