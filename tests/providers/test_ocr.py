"""Tests of text in images with real OCR, whose weights are in the package of RapidOCR."""

import json
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from clvr_jax.cli import main
from clvr_jax.data.trajectories.record import ProxyPrompts
from clvr_jax.errors import ClvrError
from clvr_jax.providers.ocr import RapidTextReader
from clvr_jax.reasoning.verification.text_in_images import find_text
from clvr_jax.rewards import LastTextReward, RewardInput, Score, TextJudge, TextReward


def sign(*lines, size=320):
    """A photo-like image with a blue sign: one text below the other."""
    image = Image.fromarray(np.random.default_rng(0).integers(200, 230, (size, size, 3), np.uint8))
    draw = ImageDraw.Draw(image)
    draw.rectangle((10, 60, size - 10, 80 + 60 * len(lines)), fill=(30, 60, 120))
    for row, text in enumerate(lines):
        draw.text((30, 70 + 60 * row), text, font=ImageFont.load_default(36), fill="white")
    return image


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr", reason="pip install 'clvr-jax[ocr]'")
    return RapidTextReader(threads=1)


def test_text_is_read_from_top_to_bottom(reader):
    lines = reader.read_text(sign("Grand Opening", "24 HOURS"))
    assert [line.text for line in lines] == ["Grand Opening", "24 HOURS"]
    assert min(line.confidence for line in lines) > 0.9
    assert find_text("grand opening 24 hours", lines) > 0.9
    assert reader.read_text(np.full((64, 64, 3), 200, np.uint8)) == ()


def test_the_reward_is_the_share_of_letters(reader):
    judge = TextJudge(reader)
    prompt = 'a blue sign that says "Grand Opening" and "24 hours"'
    assert judge.score_image(sign("Grand Opening", "24 HOURS"), prompt) == Score(1.0, {"exact": 1.0})
    half = judge.score_image(sign("Grand Opening"), prompt)
    assert half.parts == {"exact": 0.5}
    assert 0.5 <= half.value < 0.75
    wrong = judge.score_image(sign("Grand Opering", "24 HOURS"), prompt)
    assert wrong.value == pytest.approx(1 - 1 / 12 / 2)
    assert np.isnan(judge.score_image(sign("Grand Opening"), "a blue sign").value)


def test_a_share_of_the_reward_is_read_where_the_prompt_quotes_a_text(reader):
    class Judge:
        def score_image(self, image, text):
            return Score(0.5, {"style": 3.0})

    inputs = [
        RewardInput(np.asarray(sign("OPEN")), ProxyPrompts('a sign "Open"'), last_text="x"),
        RewardInput(np.asarray(sign("OPEN")), ProxyPrompts('a sign "Sale"'), last_text="x"),
        RewardInput(np.asarray(sign("OPEN")), ProxyPrompts("a sign"), last_text="x"),
    ]
    scores = TextReward(LastTextReward(Judge()), reader, weight=0.4).scores(inputs)
    exact = scores.parts["text/exact"]
    np.testing.assert_allclose(exact, [1, 0, np.nan])
    np.testing.assert_allclose(scores.values, [0.7, 0.3 + 0.4 * scores.parts["text"][1], 0.5])
    np.testing.assert_allclose(scores.parts["t2i/style"], 3.0)


def test_clvr_verify_reads_the_text_of_a_sign(reader, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sign("OPEN", size=256).save("open.png")
    sign("OPFN", size=256).save("wrong.png")
    requirement = 'the image says "open"'
    main(["verify", "a sign", "open.png", "wrong.png", "--requirement", requirement, "--read-text", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert [image["accepted"] for image in data["images"]] == [True, False]
    assert data["images"][1]["requirements"][0]["evidence"] == 'read: "OPFN"'
    assert "rapidocr" in data["verifier"]


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_one_line(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ClvrError, match=rf"text in images needs {package}: pip install 'clvr-jax\[ocr\]'"):
        RapidTextReader()
