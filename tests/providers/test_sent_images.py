"""Images that a server sends: their size, their base64, and what is left of one that fails."""

import base64
import gc
import io
import types

import numpy as np
import pytest
from PIL import ExifTags, Image

from clvr_jax.providers import base64_text
from clvr_jax.providers.failures import Failure
from clvr_jax.providers.openai_images import OpenAIImageModel
from tests.providers.asking import IMAGE, TASK, error_of
from tests.providers.server import Reply, pictures, png
from tests.robustness.corpus import png_head


def test_an_answer_with_a_path_says_which_option_helps(server, endpoint):
    server.script = [pictures("/home/user/.xinference/image/1.png")]
    assert "response format to b64_json" in str(error_of(OpenAIImageModel(endpoint()).generate, TASK))


def test_base64_of_the_other_alphabet_is_read(server, endpoint):
    text = base64.urlsafe_b64encode(png(IMAGE)).decode().rstrip("=")
    assert "-" in text
    assert "_" in text
    server.script = [Reply({"data": [{"b64_json": text}]})]
    assert np.array_equal(OpenAIImageModel(endpoint()).generate(TASK).image, IMAGE)


@pytest.mark.parametrize(
    ("size", "shape", "message"),
    [
        (None, (8000, 8000), "no size was requested"),
        ((64, 64), (4000, 4000), "requested an image of 64 x 64"),
        ((64, 64), (64, 65), "requested an image of 64 x 64"),
    ],
)
def test_an_image_of_another_size_is_refused_before_it_is_decoded(server, endpoint, monkeypatch, size, shape, message):
    def decoded(*_):
        raise AssertionError

    monkeypatch.setattr("clvr_jax.providers.openai_images.decode_image", decoded)
    server.script = [pictures(png_head(*shape))]
    error = error_of(OpenAIImageModel(endpoint(), size=size).generate, TASK)
    assert message in str(error)
    assert error.fault == "malformed"


@pytest.mark.slow
def test_what_an_image_that_fails_consists_of_is_not_kept(server, endpoint):
    """Frames of an error that is in a cycle would hold all of it until the garbage collector runs."""
    content = b"x" * 1_000_000
    server.script = [pictures(content), pictures(f"{server.url}/1.png"), Reply(content)]
    tool = OpenAIImageModel(endpoint())
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            assert error_of(tool.generate, TASK).fault == "malformed"
        frames = [each for each in gc.get_objects() if isinstance(each, types.FrameType)]
        held = [
            each.f_code.co_name for each in frames if "clvr_jax" in each.f_code.co_filename and content in local(each)
        ]
    finally:
        gc.enable()
    assert held == []


def local(frame):
    return [value for value in frame.f_locals.values() if isinstance(value, bytes)]


@pytest.mark.parametrize(
    "text", ["QUJD", "QUI=", "QUI", " Q U\nJD", "-_-_", "data:image/png;base64,QUJD", "QUJD" * 9 + "QQ = =\n"]
)
def test_base64_is_decoded_alike_in_pieces_of_any_size(text, monkeypatch):
    standard = "".join(text.partition(",")[2] or text).translate(str.maketrans("-_", "+/", " \n="))
    expected = base64.b64decode(standard + "=" * (-len(standard) % 4))
    for piece in (1, 3, 4, 1 << 20):
        monkeypatch.setattr(base64_text, "_PIECE", piece)
        assert base64_text.decode_base64(text) == expected


@pytest.mark.parametrize("text", ["Q", "QUJDR", "QUI=QUJD", "QU=I", "QUJ?", "QUJ\u00e9", "data:QUJD"])
def test_what_is_no_base64_is_malformed_in_pieces_of_any_size(text, monkeypatch):
    for piece in (1, 3, 4, 1 << 20):
        monkeypatch.setattr(base64_text, "_PIECE", piece)
        with pytest.raises(Failure) as caught:
            base64_text.decode_base64(text)
        assert caught.value.fault == "malformed"


def test_an_image_on_its_side_has_the_size_that_was_asked_for(server, endpoint):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (48, 32)).save(buffer, "JPEG", exif=exif)
    server.script = [pictures(buffer.getvalue())]
    assert OpenAIImageModel(endpoint(), size=(48, 32)).generate(TASK).image.shape == (48, 32, 3)
    assert "got 48 x 32" in str(error_of(OpenAIImageModel(endpoint(), size=(32, 48)).generate, TASK))
