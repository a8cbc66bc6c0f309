import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.worlds.shapes.language.grammar import DENSE_TIERS, PHRASINGS, words
from clvr_jax.worlds.shapes.language.second_grammar import NUM_STYLES
from clvr_jax.worlds.shapes.metadata import canonical_key, has_held_out_pair, parse_metadata
from clvr_jax.worlds.shapes.prompts import (
    EVAL_COUNTS,
    EVALUATION_SETS,
    TRAIN_WEIGHTS,
    evaluation_prompts,
    read_prompts,
    train_prompt,
    write_prompts,
)


def test_evaluation_sets_have_genevals_proportions_and_no_duplicates() -> None:
    assert EVALUATION_SETS == ("eval", "complex", "dense", "second")
    evaluation, hard, dense, second = map(evaluation_prompts, EVALUATION_SETS)
    assert Counter(metadata["tag"] for metadata in evaluation) == EVAL_COUNTS
    assert len(evaluation) == 553
    assert Counter(metadata["tier"] for metadata in hard) == dict.fromkeys((3, 4, 5, 6), 75)
    assert Counter(metadata["tier"] for metadata in dense) == dict.fromkeys((7, 8, 9), 100)
    assert Counter(metadata["tier"] for metadata in second) == dict.fromkeys((3, 4, 5, 6), 75)
    texts = [metadata["prompt"].lower() for metadata in evaluation + hard + dense + second]
    assert len(set(texts)) == len(texts)
    requests = [canonical_key(metadata) for metadata in hard + dense + second]
    assert len(set(requests)) == len(requests)
    for metadata in evaluation + hard + dense + second:
        assert parse_metadata(metadata) == metadata


def test_a_third_of_the_evaluation_names_held_out_pairs_in_all_phrasings() -> None:
    for name in EVALUATION_SETS:
        colored = [
            metadata for metadata in evaluation_prompts(name) if metadata["tag"] not in ("single_object", "two_object")
        ]
        for tag in {metadata["tag"] for metadata in colored}:
            mine = [metadata for metadata in colored if metadata["tag"] == tag]
            held_out = [metadata for metadata in mine if has_held_out_pair(metadata)]
            assert len(held_out) == pytest.approx(len(mine) / 3, abs=2)
            assert {metadata["phrasing"] for metadata in held_out} == set(
                range(NUM_STYLES if name == "second" else len(PHRASINGS[tag]))
            )


@pytest.mark.slow
def test_evaluation_sets_are_the_same_in_another_process() -> None:
    code = (
        "import json; from clvr_jax.worlds.shapes.prompts import evaluation_prompts as e;"
        "print(json.dumps([e('second'), e('dense'), e('complex'), e('eval')]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == [evaluation_prompts(name) for name in ("second", "dense", "complex", "eval")]


def test_returned_sets_are_copies() -> None:
    evaluation_prompts("eval")[0]["include"][0]["class"] = "changed"
    assert evaluation_prompts("eval")[0]["include"][0]["class"] != "changed"


def test_training_prompts_are_not_evaluation_prompts() -> None:
    rng = np.random.default_rng(0)
    everything = evaluation_prompts("eval") + evaluation_prompts("complex") + evaluation_prompts("second")
    texts = {" ".join(words(metadata["prompt"])) for metadata in everything}
    keys = {canonical_key(metadata) for metadata in everything if metadata["tag"] == "complex"}
    tags: Counter[str] = Counter()
    singles = set()
    for _ in range(4000):
        metadata = train_prompt(rng)
        tags[metadata["tag"]] += 1
        assert " ".join(words(metadata["prompt"])) not in texts
        assert metadata["tag"] != "complex" or canonical_key(metadata) not in keys
        assert not has_held_out_pair(metadata)
        if metadata["tag"] == "single_object":
            singles.add(metadata["prompt"])
    for tag, weight in TRAIN_WEIGHTS.items():
        assert tags[tag] / 4000 == pytest.approx(weight, abs=0.03)
    assert len(singles) > 50


def test_dense_training_prompts_are_not_evaluation_prompts() -> None:
    rng = np.random.default_rng(1)
    keys = {canonical_key(metadata) for metadata in evaluation_prompts("dense")}
    tiers: Counter[int] = Counter()
    for _ in range(600):
        metadata = train_prompt(rng, {"complex": 1.0}, (5, *DENSE_TIERS))
        tiers[metadata["tier"]] += 1
        assert canonical_key(metadata) not in keys
        assert not has_held_out_pair(metadata)
    assert set(tiers) == {5, 7, 8, 9}
    assert min(tiers.values()) > 110


def test_training_weights_are_respected_and_validated() -> None:
    rng = np.random.default_rng(0)
    assert {train_prompt(rng, {"colors": 2.0, "complex": 0})["tag"] for _ in range(20)} == {"colors"}
    with pytest.raises(ClvrError, match="tag 'colour'"):
        train_prompt(rng, {"colour": 1.0})
    with pytest.raises(ClvrError, match="weight -1"):
        train_prompt(rng, {"colors": -1.0})
    with pytest.raises(ClvrError, match="above 0"):
        train_prompt(rng, {"colors": 0.0})


def test_unknown_sets_are_errors() -> None:
    with pytest.raises(ClvrError, match="unknown set 'test'; known: eval, complex, dense, second"):
        evaluation_prompts("test")


def test_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    prompts = evaluation_prompts("complex")[:20]
    prompts[0]["prompt"] += " \u2028 ü"
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts
    assert len(path.read_text().splitlines()) == 20


def test_errors_of_invalid_files_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    good = json.dumps(evaluation_prompts("eval")[0])
    path.write_text(f"{good}\n\n{{oops\n")
    with pytest.raises(ClvrError, match=r"prompts.jsonl:3: not JSON: .* column 2"):
        read_prompts(path)
    path.write_text(f"{good}\n" + good.replace('"count": 1', '"count": 0') + "\n")
    with pytest.raises(ClvrError, match=r"prompts.jsonl:2: include\[0\].count must be a whole number"):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ClvrError, match="no prompts in this file"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ClvrError, match="not UTF-8"):
        read_prompts(path)
    with pytest.raises(ClvrError, match="no such file"):
        read_prompts(tmp_path / "missing.jsonl")
    with pytest.raises(ClvrError, match="cannot write prompts"):
        write_prompts(tmp_path / "no" / "directory.jsonl", [])
