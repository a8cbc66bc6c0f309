"""Directories of labeled images are outside data: one clear line with a line number for each error."""

import json

import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import ClvrError
from clvr_jax.evaluation.verifier.image_directory import labeled_images, load_image
from clvr_jax.files import image_io


@pytest.fixture
def directory(tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 6), (1, 2, 3)).save(folder / "a.png")
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    return folder


def write(directory, *lines):
    (directory / "labels.jsonl").write_text(
        "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    )


GOOD = {"image": "a.png", "prompt": "a dog", "label": True}


def test_images_are_read_with_their_labels(directory):
    Image.new("L", (3, 2), 7).save(directory / "sub" / "gray.jpg")
    wrong = {"image": "sub/gray.jpg", "prompt": "two dogs", "label": False, "note": "ignored"}
    write(directory, GOOD, "", wrong, {**wrong, "kind": "counting"})
    cases = labeled_images(directory)
    assert [(case.prompt, case.label, case.kind) for case in cases] == [
        ("a dog", True, "right"),
        ("two dogs", False, "wrong"),
        ("two dogs", False, "counting"),
    ]
    assert {case.group for case in cases} == {"images"}
    assert {(case.tier, case.has_held_out, case.requirements, case.description) for case in cases} == {(None,) * 4}
    np.testing.assert_array_equal(load_image(cases[0]), np.full((6, 8, 3), (1, 2, 3)))
    assert load_image(cases[1]).shape == (2, 3, 3)


def test_transparent_images_are_on_white_and_rotated_ones_upright(directory):
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    image.save(directory / "clear.png")
    rotated = Image.new("RGB", (4, 2), (9, 9, 9))
    exif = rotated.getexif()
    exif[0x0112] = 6
    rotated.save(directory / "turned.png", exif=exif)
    write(directory, {**GOOD, "image": "clear.png"}, {**GOOD, "image": "turned.png"})
    clear, turned = map(load_image, labeled_images(directory))
    assert clear[0, 0].tolist() == [0, 0, 255]
    assert clear[1, 3].tolist() == [255, 255, 255]
    assert turned.shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "JSON with more than 64 levels"),
        ("[1]", "expected a JSON object, got a list of 1"),
        ({**GOOD, "prompt": 3}, "prompt must be a text"),
        ({**GOOD, "prompt": " "}, "prompt must be a text that is not empty"),
        ({**GOOD, "prompt": "dog " * 6000}, "24,000 characters"),
        ('{"image": "a.png", "prompt": "\\ud800", "label": true}', "Unicode"),
        ({**GOOD, "label": 1}, "label must be true or false, got 1"),
        ({**GOOD, "label": "true"}, "label must be true or false"),
        ({"image": "a.png", "prompt": "a dog"}, "label must be true or false, got None"),
        ({**GOOD, "kind": ""}, "kind must be a text"),
        ({**GOOD, "kind": 3}, "kind must be a text"),
        ({**GOOD, "kind": "k" * 65}, "65 characters"),
        ({**GOOD, "image": None}, "image must be a text"),
        ({**GOOD, "image": "../outside.png"}, "outside the directory"),
        ({**GOOD, "image": "link.png"}, "outside the directory"),
        ({**GOOD, "image": "/etc/hostname"}, "outside the directory"),
        ({**GOOD, "image": "missing.png"}, "no such image, 'missing.png'"),
        ({**GOOD, "image": "sub"}, "no such image"),
        ({**GOOD, "image": "a\0.png"}, "no such image"),
        ({**GOOD, "image": "text.png"}, "text.png: not a readable image"),
        ({**GOOD, "image": "empty.png"}, "not a readable image"),
    ],
)
def test_bad_lines_are_one_line_with_their_number(directory, line, said):
    write(directory, GOOD, line)
    with pytest.raises(ClvrError, match=r"labels.jsonl:2: ") as found:
        labeled_images(directory)
    assert said in str(found.value)
    assert len(str(found.value).splitlines()) == 1
    assert len(str(found.value)) < 600


def test_images_that_are_too_large_are_refused_by_their_header(directory, monkeypatch):
    Image.new("1", (10_000, 8_000)).save(directory / "huge.png")
    write(directory, {**GOOD, "image": "huge.png"})
    with pytest.raises(ClvrError, match=r"labels.jsonl:1: .*huge.png: has 10,000 x 8,000 pixels"):
        labeled_images(directory)
    Image.new("1", (20_000, 10_000)).save(directory / "bomb.png")
    write(directory, {**GOOD, "image": "bomb.png"})
    with pytest.raises(ClvrError, match=r"labels.jsonl:1: .*bomb.png"):
        labeled_images(directory)
    monkeypatch.setattr(image_io, "MAX_FILE_BYTES", 10)
    write(directory, GOOD)
    with pytest.raises(ClvrError, match=r"labels.jsonl:1: .*a.png: has .* MiB"):
        labeled_images(directory)


def test_a_damaged_image_is_named_when_it_is_decoded(directory):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(directory / "cut.png")
    content = (directory / "cut.png").read_bytes()
    (directory / "cut.png").write_bytes(content[: len(content) // 2])
    write(directory, {**GOOD, "image": "cut.png"})
    (case,) = labeled_images(directory)
    with pytest.raises(ClvrError, match=r"labels.jsonl:1: .*cut.png: not a readable image"):
        load_image(case)


def test_directories_without_labels_are_refused(directory):
    with pytest.raises(ClvrError, match=r"labels.jsonl: no such file"):
        labeled_images(directory)
    write(directory, "", " ")
    with pytest.raises(ClvrError, match=r"labels.jsonl: no labels"):
        labeled_images(directory)
    (directory / "labels.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ClvrError, match=r"labels.jsonl: cannot be read"):
        labeled_images(directory)
