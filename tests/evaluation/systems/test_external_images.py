import json

import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.systems.external_images import external_images
from tests.evaluation.benchmarks.test_shapes import JUDGE, METADATA, Draw, go
from tests.evaluation.runs import run_function


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(path)


def listed(folder, entries):
    folder.mkdir(exist_ok=True)
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries) + "\n")


def score(folder, out, **options):
    system = external_images(folder, "elsewhere", options.get("seed", 0))
    return run_function(METADATA, system.generate, out, JUDGE, settings=system.settings, batch_size=2, **options)


def test_pictures_are_found_by_their_prompts(tmp_path):
    entries = []
    for number, entry in enumerate(METADATA[::-1]):
        for sample in range(2):
            name = f"some/{number}_{sample}.jpg"
            write(tmp_path / "made" / name, 200 if sample else 10)
            entries.append({"file_name": name, "text": entry["prompt"]})
    listed(tmp_path / "made", entries)
    for seed in (0, 7):
        results = score(tmp_path / "made", tmp_path / str(seed), seed=seed, samples=2)
        assert [entry["correct"] for entry in results["pictures"]] == [False, True] * len(METADATA)
        assert results["settings"]["model"] == "elsewhere"
    with pytest.raises(ClvrError, match=r"lacks images of 1 prompts, for example 'p 0'"):
        score(tmp_path / "made", tmp_path / "more", samples=3)


def test_a_folder_in_genevals_layout_is_read_too(tmp_path):
    drawn = go(tmp_path / "made", Draw(), samples=2)
    again = score(tmp_path / "made", tmp_path / "again", samples=2)
    assert [entry["correct"] for entry in again["pictures"]] == [entry["correct"] for entry in drawn["pictures"]]


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(ClvrError, match=r"no images; give a directory with a metadata\.jsonl"):
        external_images(tmp_path, "x")
    listed(tmp_path, [{"file_name": "a.png"}])
    with pytest.raises(ClvrError, match=r"metadata\.jsonl:1: lacks file_name or prompt"):
        external_images(tmp_path, "x")
    listed(tmp_path, [{"file_name": "a.png", "prompt": "p 0"}])
    with pytest.raises(ClvrError, match=r"metadata\.jsonl:1: no such image, 'a\.png'"):
        external_images(tmp_path, "x")
    (tmp_path / "metadata.jsonl").write_text("[]\n")
    with pytest.raises(ClvrError, match="expected a JSON object"):
        external_images(tmp_path, "x")
    write(tmp_path / "a.png", 3)
    listed(tmp_path, [{"file_name": "a.png", "prompt": "another"}])
    with pytest.raises(ClvrError, match="lacks images of 2 prompts"):
        score(tmp_path, tmp_path / "out")


def test_a_link_to_nowhere_among_the_samples_is_named(tmp_path):
    samples = tmp_path / "00000" / "samples"
    samples.mkdir(parents=True)
    (tmp_path / "00000" / "metadata.jsonl").write_text('{"prompt": "p 0"}')
    (samples / "0000.png").symlink_to("nowhere")
    with pytest.raises(ClvrError, match=r"0000\.png: not a file"):
        external_images(tmp_path, "x")
