"""Folders of pictures as the official scorers want them."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.evaluation.benchmarks.dpg import DPG
from clvr_jax.evaluation.benchmarks.geneval import GenEval
from clvr_jax.evaluation.benchmarks.genevalpp import GenEvalPP
from clvr_jax.evaluation.benchmarks.imaginebench import ImagineBench
from clvr_jax.evaluation.benchmarks.prism import Prism
from clvr_jax.evaluation.benchmarks.wise import WiseLegacy, WiseVerified
from clvr_jax.evaluation.harness.images import generate_images, load_external, load_generated
from clvr_jax.evaluation.systems.system import System, SystemOutput
from clvr_jax.files.image_io import as_pil
from tests.evaluation.benchmarks.samples import DPG as DPG_CSV
from tests.evaluation.benchmarks.samples import GENEVAL, GENEVALPP, IMAGINE, WISE, ColorGenerator, write_lines


@pytest.fixture
def items(tmp_path):
    """Name of the benchmark -> its items."""
    (tmp_path / "w.json").write_text(json.dumps(WISE))
    (tmp_path / "d.csv").write_text(DPG_CSV.format(dependency="2"))
    return {
        "geneval": GenEval().read(write_lines(tmp_path / "g.jsonl", GENEVAL)),
        "genevalpp": GenEvalPP().read(write_lines(tmp_path / "gpp.jsonl", GENEVALPP)),
        "imaginebench": ImagineBench().read(write_lines(tmp_path / "i.jsonl", IMAGINE)),
        "wise-legacy": WiseLegacy().read(tmp_path / "w.json"),
        "prism": Prism().read(write_lines(tmp_path / "style.jsonl", [{"prompt": "p"}, {"prompt": "q"}])),
        "dpg": DPG().read(tmp_path / "d.csv"),
    }


def generate(benchmark, items, out, generator=None, **changes):
    values = {"settings": {"limit": None}, "samples": benchmark.samples, **changes}
    generate_images(benchmark, items, (generator or ColorGenerator()).system, out, **values)


def files(root):
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in (".png", ".jpg"))


def test_geneval_is_what_the_official_scorer_reads(tmp_path, items):
    generate(GenEval(), items["geneval"], tmp_path / "out")
    seen = 0
    # As evaluate_images.py walks through a folder.
    for subfolder in os.listdir(tmp_path / "out"):
        folder = tmp_path / "out" / subfolder
        if not folder.is_dir() or not subfolder.isdigit():
            continue
        metadata = json.loads((folder / "metadata.jsonl").read_text())
        assert metadata == GENEVAL[int(subfolder)]
        for name in os.listdir(folder / "samples"):
            assert re.match(r"\d+\.png", name)
            assert Image.open(folder / "samples" / name).size == (8, 8)
            seen += 1
    assert seen == 3 * 4


@pytest.mark.parametrize(
    ("benchmark", "expected"),
    [
        (GenEvalPP(), ["1.jpg", "2.jpg"]),
        (ImagineBench(), ["1.png", "2.png", "3.png", "4.png"]),
        (WiseLegacy(), ["1.png", "500.png", "530.png", "650.png", "750.png", "850.png", "950.png"]),
        (Prism(), ["style/0.png", "style/1.png"]),
        (DPG(), ["a.png", "b.png"]),
    ],
)
def test_flat_layouts_are_the_official_ones(benchmark, expected, tmp_path, items):
    generate(benchmark, items[benchmark.name], tmp_path)
    assert files(tmp_path / "images") == expected
    pictures = load_generated(benchmark, tmp_path)
    assert pictures.items == items[benchmark.name]
    assert all(path.is_relative_to(tmp_path / "images") for path in pictures.files.values())
    # What we wrote can be scored as if somebody else had made it.
    again = load_external(
        benchmark, items[benchmark.name], tmp_path / "images", benchmark.samples, tmp_path / "elsewhere"
    )
    assert again.files == pictures.files


def test_more_samples_are_more_official_folders(tmp_path, items):
    generator = ColorGenerator()
    generate(ImagineBench(), items["imaginebench"][:1], tmp_path, generator, samples=2)
    assert files(tmp_path) == ["images/1.png", "images_1/1.png"]
    assert len({seed for _, seed in generator.asked}) == 2


def test_a_grid_has_its_samples_row_by_row(tmp_path, items):
    benchmark, generator = DPG(), ColorGenerator()
    generate(benchmark, items["dpg"][:1], tmp_path, generator)
    grid = np.asarray(Image.open(tmp_path / "images" / "a.png"))
    assert grid.shape == (16, 16, 3)
    colors = [seed % 256 for _, seed in generator.asked]
    assert [int(grid[y, x, 0]) for y, x in ((0, 0), (0, 8), (8, 0), (8, 8))] == colors
    for sample, color in enumerate(colors):
        shown = np.asarray(as_pil(benchmark.judge_image(tmp_path / "images" / "a.png", sample, 4)))
        assert shown.shape == (8, 8, 3)
        assert set(shown.ravel().tolist()) == {color}


def test_a_grid_is_black_where_a_loop_ended_without_a_picture(tmp_path, items):
    outcomes = iter([True, False, True, True])

    def draw_all(prompts, seeds):
        return [
            SystemOutput(np.full((8, 8, 3), 9, np.uint8) if next(outcomes) else None, outcome="unparseable")
            for _ in seeds
        ]

    generate_images(DPG(), items["dpg"][:1], System(draw_all, {}), tmp_path, settings={}, samples=4)
    grid = np.asarray(Image.open(tmp_path / "images" / "a.png"))
    assert [int(grid[y, x, 0]) for y, x in ((0, 0), (0, 8), (8, 0), (8, 8))] == [9, 0, 9, 9]
    pictures = load_generated(DPG(), tmp_path)
    assert [path is None for path in pictures.files.values()] == [False, True, False, False]


def test_a_killed_run_draws_no_picture_twice(tmp_path, items):
    benchmark, first, second = WiseLegacy(), ColorGenerator(fail_after=3), ColorGenerator()
    with pytest.raises(KeyboardInterrupt):
        generate(benchmark, items[benchmark.name], tmp_path, first)
    with pytest.raises(ClvrError, match=r"4 of 7 images are missing \(images/650\.png, images/750\.png, images/850"):
        load_generated(benchmark, tmp_path)
    generate(benchmark, items[benchmark.name], tmp_path, second)
    assert len(first.asked) + len(second.asked) == 7
    assert load_generated(benchmark, tmp_path).records[0, 0].device == "cpu"


def test_shares_of_several_processes_make_one_whole(tmp_path, items):
    benchmark, generators = DPG(), [ColorGenerator(), ColorGenerator(), ColorGenerator()]
    for number, generator in enumerate(generators):
        generate(benchmark, items["dpg"], tmp_path, generator, share=(number, 3))
    asked = [each for generator in generators for each in generator.asked]
    assert len(set(asked)) == len(asked) == 8
    assert [len(generator.asked) for generator in generators] == [3, 3, 2]
    assert files(tmp_path / "images") == ["a.png", "b.png"]
    load_generated(benchmark, tmp_path)


@pytest.mark.parametrize(
    ("benchmark", "digest"),
    [
        (ImagineBench(), "792fb6cea59ed7c46a91e2d605b49b1ee8afac05f1d9ac3c9a2f8ebcbdb930d7"),
        (GenEval(), "14690783144bb83a118514c46fad1f65b0a1d75b6b7d4361872ff52455632cca"),
    ],
)
def test_a_run_directory_of_version_0_1_can_be_resumed(benchmark, digest, tmp_path, items):
    generate(benchmark, items[benchmark.name], tmp_path, samples=1)
    identity = json.loads((tmp_path / "benchmark.json").read_text())
    assert identity["metadata_sha256"] == digest  # of the stored prompts, as version 0.1.0 wrote it
    assert set(identity) == {"benchmark", "settings", "seed", "samples", "prompts", "metadata_sha256"}


def test_editions_and_other_settings_never_mix(tmp_path, items):
    generate(WiseLegacy(), items["wise-legacy"], tmp_path)
    with pytest.raises(ClvrError, match="has images of wise-legacy, not of wise-verified"):
        load_generated(WiseVerified(), tmp_path)
    with pytest.raises(ClvrError, match="belongs to another run"):
        generate(WiseVerified(), items["wise-legacy"], tmp_path)
    with pytest.raises(ClvrError, match="seed: 0 on disk, 1 requested"):
        generate(WiseLegacy(), items["wise-legacy"], tmp_path, seed=1)
    (tmp_path / "other" / "images").mkdir(parents=True)
    with pytest.raises(ClvrError, match="has images but no benchmark"):
        generate(WiseLegacy(), items["wise-legacy"], tmp_path / "other")


def test_a_wrong_folder_says_which_files_are_expected(tmp_path, items):
    (tmp_path / "made").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "made" / "1.png")
    with pytest.raises(ClvrError, match=r"2 of 2 images of GenEval\+\+ are missing; expected are 1\.jpg, 2\.jpg"):
        load_external(GenEvalPP(), items["genevalpp"], tmp_path / "made", 1, tmp_path / "out")
    with pytest.raises(ClvrError, match=r"3 of 4 images .* expected are 2\.png, 3\.png, 4\.png"):
        load_external(ImagineBench(), items["imaginebench"], tmp_path / "made", 1, tmp_path / "out")
    with pytest.raises(ClvrError, match=r"expected are 00000/samples/0000\.png, 00000/samples/0001"):
        load_external(GenEval(), items["geneval"], tmp_path / "made", 4, tmp_path / "out")
    with pytest.raises(UsageError, match="no such directory"):
        load_external(GenEval(), items["geneval"], tmp_path / "none", 4, tmp_path / "out")


def test_geneval_made_elsewhere_must_be_of_the_same_prompts(tmp_path, items):
    generate(GenEval(), items["geneval"], tmp_path / "made", samples=1)
    load_external(GenEval(), items["geneval"], tmp_path / "made", 1, tmp_path / "out")
    (tmp_path / "made" / "00001" / "metadata.jsonl").write_text('{"prompt": "another"}')
    with pytest.raises(ClvrError, match="has the prompt 'another'"):
        load_external(GenEval(), items["geneval"], tmp_path / "made", 1, tmp_path / "out")


def test_a_picture_that_is_none_is_found_before_anyone_is_asked(tmp_path, items):
    generate(ImagineBench(), items["imaginebench"], tmp_path)
    (tmp_path / "images" / "2.png").write_bytes(b"<html>")
    whole = (tmp_path / "images" / "3.png").read_bytes()
    (tmp_path / "images" / "3.png").write_bytes(whole[:-20])
    reason = r"not a readable image; it must be PNG, JPEG or WebP"
    with pytest.raises(ClvrError, match=rf"not readable as images: .*2\.png \({reason}\), .*3\.png \("):
        load_generated(ImagineBench(), tmp_path)


@pytest.mark.parametrize("identifier", ["../../../evil", "/tmp/evil", "sub/evil", "..", "e" * 300, "a\0b"])
def test_ids_never_write_outside_the_directory(identifier, tmp_path):
    out = tmp_path / "deep" / "in" / "out"
    entries = [{**IMAGINE[0], "id": identifier}, {**IMAGINE[1], "id": "good"}]
    found = ImagineBench().read(write_lines(tmp_path / "prompts.jsonl", entries))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)}
    generate(ImagineBench(), found, out)
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(out)} - {
        out.parent,
        out.parent.parent,
    } == before
    names = files(out / "images")
    assert len(names) == 2
    assert "good.png" in names
    assert all(path.is_file() for path in load_generated(ImagineBench(), out).files.values())


def test_grids_of_hostile_ids_stay_in_their_directory(tmp_path):
    prompts = tmp_path / "prompts.csv"
    prompts.write_text(DPG_CSV.format(dependency="1").replace("\na,", "\n../../../evil,"))
    found = DPG().read(prompts)
    generate(DPG(), found, tmp_path / "deep" / "out", samples=4)
    assert len(files(tmp_path / "deep" / "out" / "images")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "prompts.csv"]


def test_postscript_among_the_pictures_is_refused_and_not_run(tmp_path, items, monkeypatch):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)  # a call would be a TypeError
    generate(ImagineBench(), items["imaginebench"], tmp_path)
    (tmp_path / "images" / "2.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(ClvrError, match=r"2\.png \(not a readable image; it must be PNG, JPEG or WebP\)"):
        load_generated(ImagineBench(), tmp_path)
