import contextlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from clvr_jax.errors import ClvrError
from clvr_jax.files import image_io
from clvr_jax.files.image_io import as_pil, pixels, read_encoded, read_image, read_image_arrays

RED, WHITE = (250, 10, 10), (255, 255, 255)


def noise(height=6, width=9):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def message(path):
    with pytest.raises(ClvrError) as caught:
        read_image(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True}), ("a.jpg", {})])
def test_the_three_formats_are_read_whatever_the_name(name, options, tmp_path):
    Image.fromarray(noise()).save(tmp_path / name, **options)
    renamed = (tmp_path / name).rename(tmp_path / "image.bin")
    found = read_image(renamed)
    assert (found.dtype, found.shape) == (np.uint8, (6, 9, 3))
    if name != "a.jpg":
        assert np.array_equal(found, noise())


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_decoders_never_run(kind, tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(noise(16, 16)).save(path, format=kind)
    assert "PNG, JPEG or WebP" in message(path)


def test_files_that_are_no_images(tmp_path):
    assert "no such image" in message(tmp_path / "missing.png")
    assert "no such image" in message(tmp_path / ("x" * 300))
    assert "not a file" in message(tmp_path)
    for content in (b"", b"words", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "a.png").write_bytes(content)
        assert "not a readable image" in message(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_fail_or_are_read_but_never_crash(kind, tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 40)).save(buffer, format=kind)
    content, path, rng = buffer.getvalue(), tmp_path / "a", np.random.default_rng(0)
    path.write_bytes(content[: len(content) // 2])
    assert "not a readable image" in message(path)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(ClvrError):
            assert read_image(path).ndim == 3


def _png_head(width, height):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize("side", [8200, 10_000, 60_000])
def test_the_size_is_checked_before_pixels_are_decoded(side, tmp_path, recwarn):
    (tmp_path / "bomb.png").write_bytes(_png_head(side, side))
    assert f"{image_io.MAX_PIXELS:,}" in message(tmp_path / "bomb.png")
    assert not recwarn


def test_transparent_parts_become_white(tmp_path):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., :3] = RED
    rgba[0, 0, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png")
    assert tuple(found[0, 0]) == RED
    assert tuple(found[1, 1]) == WHITE

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([*RED, 0, 0, 0])
    palette.save(tmp_path / "p.png", transparency=1)
    assert [tuple(value) for value in read_image(tmp_path / "p.png")[0]] == [RED, WHITE]

    Image.fromarray(np.array([[RED, (0, 0, 0)]], np.uint8)).save(tmp_path / "t.png", transparency=(0, 0, 0))
    assert [tuple(value) for value in read_image(tmp_path / "t.png")[0]] == [RED, WHITE]

    Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA").save(tmp_path / "l.png")
    assert read_image(tmp_path / "l.png")[0, :, 0].tolist() == [9, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_rotated_images_are_turned_upright(orientation, kind, tmp_path):
    # A white image with a dark top left quarter, stored as a camera that was held in this way stores it.
    upright = np.full((32, 64, 3), 255, np.uint8)
    upright[:16, :32] = 0
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a", format=kind, exif=exif)
    found = read_image(tmp_path / "a")
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 8
    encoded = read_encoded(tmp_path / "a")
    with Image.open(io.BytesIO(encoded.content)) as image:
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - upright).mean() < 8


@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"\0" * 40])
def test_damaged_exif_leaves_the_image_as_it_is_stored(exif, tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), noise())


def test_other_modes_become_rgb(tmp_path):
    gray = np.array([[0, 128, 255]], np.uint8)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert read_image(tmp_path / "16.png")[0].tolist() == [[value] * 3 for value in (0, 128, 255)]
    Image.fromarray(gray).save(tmp_path / "8.png")
    assert read_image(tmp_path / "8.png")[0].tolist() == [[value] * 3 for value in (0, 128, 255)]
    Image.fromarray(gray > 100).save(tmp_path / "1.png")
    assert read_image(tmp_path / "1.png")[0, :, 1].tolist() == [0, 255, 255]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert np.abs(read_image(tmp_path / "cmyk.jpg")[0, 0].astype(int) - (255, 0, 0)).max() < 8


def test_a_file_that_need_not_be_decoded_is_passed_on_as_it_is(tmp_path):
    for name in ("a.png", "a.jpg"):
        Image.fromarray(noise()).save(tmp_path / name)
        assert read_encoded(tmp_path / name).content == (tmp_path / name).read_bytes()
    Image.fromarray(noise()).save(tmp_path / "a.webp", lossless=True)
    encoded = read_encoded(tmp_path / "a.webp")
    assert encoded.kind == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encoded.content))), noise())
    with pytest.raises(ClvrError, match="no such image"):
        read_encoded(tmp_path / "missing")


def test_postscript_never_reaches_ghostscript(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("Ghostscript is called")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", never)
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a.png").write_bytes(page)
    for read in (read_image, read_encoded, image_io.check_image, image_io.image_size):
        with pytest.raises(ClvrError, match="not a readable image; it must be PNG, JPEG or WebP"):
            read(tmp_path / "a.png")
    for decode in (image_io.decode_image, image_io.lazy_image):
        with pytest.raises(ClvrError, match=r"server: not a readable image; it must be PNG, JPEG or WebP"):
            decode(page, "server")
    with pytest.raises(ClvrError, match="it must be PNG, JPEG or WebP"):
        pixels(image_io.EncodedImage(page, "png"))


def _encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def test_encoded_images_are_read_as_files_are(tmp_path):
    rgba = Image.fromarray(np.array([[[*RED, 255], [*RED, 0]]], np.uint8), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray(np.array([[0, 128 * 257, 65535]], np.uint16))
    for content in (
        _encoded(rgba), _encoded(rgba, exif=exif), _encoded(sixteen), _encoded(sixteen, exif=exif),
        _encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), _encoded(rgba, "WEBP", lossless=True),
    ):  # fmt: skip
        (tmp_path / "a").write_bytes(content)
        assert np.array_equal(image_io.decode_image(content), read_image(tmp_path / "a"))
    assert image_io.decode_image(_encoded(rgba)).tolist() == [[list(RED), list(WHITE)]]
    assert image_io.decode_image(_encoded(rgba, exif=exif)).shape == (2, 1, 3)
    assert image_io.decode_image(_encoded(sixteen, exif=exif))[:, 0, 0].tolist() == [0, 128, 255]
    assert f"{image_io.MAX_PIXELS:,}" in _complaint_of(image_io.decode_image, _png_head(9000, 9000))
    assert f"{image_io.MAX_PIXELS:,}" in _complaint_of(image_io.lazy_image, _png_head(9000, 9000))


def _complaint_of(function, *arguments):
    with pytest.raises(ClvrError) as caught:
        function(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_pixels_of_a_pil_image_are_on_white():
    rgba = Image.fromarray(np.array([[[*RED, 255], [*RED, 0], [0, 0, 0, 128]]], np.uint8), "RGBA")
    assert pixels(rgba).tolist() == [[list(RED), list(WHITE), [127, 127, 127]]]
    assert pixels(Image.fromarray(np.array([[[9, 0]]], np.uint8), "LA")).tolist() == [[[255] * 3]]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([*RED, 0, 0, 0])
    palette.info["transparency"] = 1
    assert pixels(palette).tolist() == [[list(RED), list(WHITE)]]
    assert pixels(Image.fromarray(np.array([[0, 65535]], np.uint16)))[0, :, 0].tolist() == [0, 255]
    assert pixels(Image.fromarray(np.array([[0, 200]], np.int32)))[0, :, 0].tolist() == [0, 200]  # not of 16 bits


def test_references_stay_as_diffusers_has_them():
    # diffusers converts a transparent reference with convert("RGB"), which keeps the colors below the transparency.
    rgba = Image.fromarray(np.array([[[*RED, 0]]], np.uint8), "RGBA")
    assert as_pil(rgba) is rgba
    assert as_pil(rgba).convert("RGB").getpixel((0, 0)) == RED


def test_damage_behind_a_good_header_is_one_line(tmp_path):
    content = _encoded(Image.fromarray(noise(64, 64)))
    cut = image_io.lazy_image(content[: len(content) // 2])
    assert cut.size == (64, 64)
    assert "not a readable image" in _complaint_of(pixels, cut)
    assert "not a readable image" in _complaint_of(as_pil, image_io.EncodedImage(content[: len(content) // 2], "png"))


def test_what_is_no_regular_file_or_too_large_is_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in message(tmp_path / "pipe")  # and does not wait for a writer
    assert "no such image" in _complaint_of(read_image, tmp_path / "a\0b.png")
    Image.fromarray(noise()).save(tmp_path / "a.png")
    monkeypatch.setattr(image_io, "MAX_FILE_BYTES", 10)
    assert "MiB; at most" in message(tmp_path / "a.png")


def test_a_file_of_image_arrays_is_read_or_refused_in_one_line(tmp_path, monkeypatch):
    path, images = tmp_path / "images.npz", np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez_compressed(path, a=images, b=images[:1])
    assert {name: array.tolist() for name, array in read_image_arrays(path).items()} == {
        "a": images.tolist(), "b": images[:1].tolist(),
    }  # fmt: skip
    good = path.read_bytes()
    for damaged in (b"", b"no archive", good[:-30], good[:60] + bytes(80) + good[140:]):
        path.write_bytes(damaged)
        with pytest.raises(ClvrError, match=r"images\.npz: not a readable file of images") as caught:
            read_image_arrays(path)
        assert "\n" not in str(caught.value)
    for array, said in (
        (images[0], r"uint8 \(4, 4, 3\), not uint8 \(n, height, width, 3\)"),
        (images.astype(np.float32), "a is float32"),
        (np.array([{"a": 1}], object), "allow_pickle"),
    ):
        np.savez(path, a=array)
        with pytest.raises(ClvrError, match=said):
            read_image_arrays(path)
    path.write_bytes(good)
    monkeypatch.setattr("clvr_jax.files.image_io.MAX_ARRAY_BYTES", 200)
    with pytest.raises(ClvrError, match="at most 0 are read"):
        read_image_arrays(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ClvrError, match=r"images\.npz: no such file"):
        read_image_arrays(path)
