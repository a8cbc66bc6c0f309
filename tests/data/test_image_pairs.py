"""Directories of image-caption and edit pairs: what is read, at which size, and what is refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from clvr_jax.data.image_pairs import PairExamples, read_pairs, training_size
from clvr_jax.data.preprocessing.text import load_tokenizer
from clvr_jax.errors import ClvrError, UsageError
from clvr_jax.pipelines.registry import SHIPPED


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED / "shapes-tiny" / "tokenizer")


def image(path, width=64, height=64, color=(200, 30, 30), **options):
    Image.new("RGB", (width, height), color).save(path, **options)


def captioned(directory, **sizes):
    for name, (width, height) in sizes.items():
        image(directory / f"{name}.png", width, height)
        (directory / f"{name}.txt").write_text(f" a {name}\n")
    return directory


def examples(directory, tokenizer, **options):
    settings = {"side": 64, "token_pixels": 16, "text_buckets": (32, 64), "dropout": 0.0, **options}
    return PairExamples(directory, tokenizer, **settings)


def batch_of(made, number, count=1):
    return made.batch([made.samples[number]] * count, [np.random.default_rng(i) for i in range(count)])


def test_images_keep_their_aspect_ratio_within_the_area():
    assert training_size(512, 512, 1024, 64) == (1024, 1024)
    assert training_size(900, 1600, 1024, 64) == (768, 1344)
    assert training_size(1600, 900, 1024, 64) == (1344, 768)
    assert training_size(100, 1000, 1024, 64) == (704, 1408)  # cropped to 2:1
    assert training_size(30, 30, 64, 16) == (64, 64)
    assert training_size(80, 40, 64, 16) == (64, 32)
    for height, width in ((480, 640), (333, 1000), (768, 1152)):
        rows, columns = training_size(height, width, 1024, 64)
        assert rows % 64 == columns % 64 == 0
        assert rows * columns <= 1024**2
        assert 0.5 <= rows / columns <= 2


def test_captions_beside_their_images_are_read(tmp_path, tokenizer):
    made = examples(captioned(tmp_path, dog=(64, 64), wide=(300, 160)), tokenizer)
    assert [pair.text for pair in read_pairs(tmp_path)] == ["a dog", "a wide"]
    assert [sample.shape for sample in made.samples] == [(0, 64, 64), (0, 32, 64)]
    batch = batch_of(made, 1, count=2)
    assert batch["target"].shape == (2, 32, 64, 3)
    assert batch["target"].dtype == np.uint8
    assert batch["references"].shape == (2, 0, 32, 64, 3)
    assert (batch["target"] == (200, 30, 30)).all()
    assert batch["ids"].shape == (2, 32)


def test_a_list_has_captions_and_edits(tmp_path, tokenizer):
    image(tmp_path / "a.png", 100, 100)
    (tmp_path / "after").mkdir()
    image(tmp_path / "after" / "b.webp", 64, 64, (0, 0, 255), lossless=True)
    lines = [
        {"file_name": "a.png", "text": "a red square", "license": "mine"},
        {"source": "a.png", "instruction": "make it blue", "target": "after/b.webp"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = examples(tmp_path, tokenizer)
    assert [sample.shape for sample in made.samples] == [(0, 64, 64), (1, 64, 64)]
    edit = batch_of(made, 1)
    assert (edit["references"][0, 0] == (200, 30, 30)).all()
    assert (edit["target"][0] == (0, 0, 255)).all()


def test_images_are_read_as_the_one_reader_does(tmp_path, tokenizer):
    captioned(tmp_path, a=(8, 8), b=(8, 8))
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(tmp_path / "a.png")  # transparent: white
    turned = Image.new("RGB", (40, 80), (9, 9, 9))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "b.png", exif=exif)
    made = examples(tmp_path, tokenizer)
    assert (batch_of(made, 0)["target"] == 255).all()
    assert made.samples[1].shape == (0, 32, 64)


def test_a_fraction_of_texts_is_left_out(tmp_path, tokenizer):
    captioned(tmp_path, a=(64, 64))
    empty = batch_of(examples(tmp_path, tokenizer, dropout=1.0), 0)["ids"]
    assert (empty != batch_of(examples(tmp_path, tokenizer), 0)["ids"]).any()


def test_other_texts_and_other_files_have_another_fingerprint(tmp_path, tokenizer):
    captioned(tmp_path, a=(64, 64))
    before = examples(tmp_path, tokenizer).samples
    assert before == examples(tmp_path, tokenizer).samples
    (tmp_path / "a.txt").write_text("a dog")
    assert before != examples(tmp_path, tokenizer).samples


def edited(directory, **fields):
    captioned(directory, a=(64, 64))
    line = {"source": "a.png", "instruction": "x", "target": "a.png", **fields}
    line = {key: value for key, value in line.items() if value is not None}
    (directory / "metadata.jsonl").write_text(json.dumps(line))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "a.txt").unlink(), r"a\.png: has no caption; write it to a\.txt"),
        (lambda d: (d / "a.txt").write_text(" \n"), r"a\.txt: the text is empty"),
        (lambda d: (d / "a.txt").write_text("word " * 9000), r"a\.txt: the prompt has"),
        (lambda d: (d / "a.txt").write_text("word " * 200), r"a\.txt: the text takes .* tokens"),
        (lambda d: (d / "a.txt").write_bytes(b"\xff\xfe\xff"), r"a\.txt: cannot be read: not UTF-8"),
        (lambda d: (d / "a.png").write_bytes(b"%!PS-Adobe"), r"a\.png: not a readable image"),
        (lambda d: (d / "a.png").write_bytes((d / "a.png").read_bytes()[:60]), r"a\.png: not a readable image"),
        (lambda d: ((d / "a.png").unlink(), (d / "a.png").symlink_to("/etc/passwd")), "link to outside"),
        (lambda d: ((d / "a.txt").unlink(), (d / "a.txt").symlink_to("/etc/passwd")), "link to outside"),
        (lambda d: [(d / name).unlink() for name in ("a.png", "a.txt")], "contains neither metadata.jsonl nor images"),
        (lambda d: edited(d, target="../x.png"), r"metadata\.jsonl:1: '../x.png' is outside"),
        (lambda d: edited(d, target="/etc/passwd"), "is outside the directory"),
        (lambda d: edited(d, source="b.png"), r"metadata\.jsonl:1: no such image, 'b.png'"),
        (lambda d: edited(d, source="a.txt"), r"metadata\.jsonl:1: .*a\.txt: not a readable image"),
        (lambda d: edited(d, source=None), r"metadata\.jsonl:1: .*source"),
        (lambda d: edited(d, instruction=None), r"metadata\.jsonl:1: .*instruction"),
        (lambda d: edited(d, instruction=3), r"metadata\.jsonl:1: .*instruction"),
        (lambda d: edited(d, instruction=""), r"metadata\.jsonl:1: the text is empty"),
        (lambda d: (d / "metadata.jsonl").write_text("[1]"), r"metadata\.jsonl:1: expected a JSON object"),
        (lambda d: (d / "metadata.jsonl").symlink_to("nowhere"), r"metadata\.jsonl: no such file"),
        (lambda d: (d / "metadata.jsonl").write_text("{"), r"metadata\.jsonl:1: not JSON"),
        (lambda d: (d / "metadata.jsonl").write_text('{"text": "x"}'), r"metadata\.jsonl:1: .*file_name"),
        (lambda d: (d / "metadata.jsonl").write_text(""), "contains neither metadata.jsonl nor images"),
    ],
)
def test_a_bad_pair_is_one_line_that_names_it(tmp_path, tokenizer, damage, message):
    damage(captioned(tmp_path, a=(64, 64)))
    with pytest.raises(ClvrError, match=message) as caught:
        examples(tmp_path, tokenizer)
    assert "\n" not in str(caught.value)


def test_options_that_are_not_possible_are_refused(tmp_path, tokenizer):
    captioned(tmp_path, a=(64, 64))
    with pytest.raises(UsageError, match="dropout must be in"):
        examples(tmp_path, tokenizer, dropout=2.0)
    with pytest.raises(UsageError, match="multiple of 16 pixels, got 40"):
        examples(tmp_path, tokenizer, side=40)
    with pytest.raises(ClvrError, match="no such directory"):
        examples(tmp_path / "absent", tokenizer)
