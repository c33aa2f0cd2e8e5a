"""Pictures of every mode become 8-bit RGB with their content, or are refused by name."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.pictures import UnreadableImage, open_rgb

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


def saved(folder, picture: Image.Image, name: str = "x.png", **settings):
    picture.save(folder / name, **settings)
    return np.asarray(open_rgb(folder / name))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_without_alpha_keep_their_content(mode, tmp_path):
    picture = Image.fromarray(RAMP).convert("RGB").convert(mode)
    found = saved(tmp_path, picture, "x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(picture.convert("RGB"))) and found.std() > 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_white_and_half_transparent_ones_a_mixture(mode, tmp_path):
    """Black ink on a transparent ground: without a background all of it would be black."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:4], alpha[4:6] = 255, 128
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 3] = alpha
    picture = Image.fromarray(pixels, "RGBA")
    found = saved(tmp_path, picture.convert(mode) if mode == "LA" else picture)
    assert (found[:2] == 255).all() and (found[2:4] == 0).all() and (abs(found[4:6].astype(int) - 127) <= 1).all()


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    picture = Image.fromarray(RAMP // 128).convert("P")
    picture.putpalette([0, 0, 0, 200, 10, 10] + [0] * 762)
    found = saved(tmp_path, picture, transparency=0)
    assert (found[0] == 255).all() and tuple(found[7, 7]) == (200, 10, 10)


@pytest.mark.parametrize("kind", ["grey", "integers", "floats"])
def test_deep_pixels_are_refused_by_name(kind, tmp_path):
    deep = {"grey": RAMP.astype(np.uint16) * 257, "integers": RAMP.astype(np.int32) * 1000, "floats": RAMP / 255}[kind]
    name = "x.png" if kind == "grey" else "x.tif"
    Image.fromarray(deep.astype(np.float32) if kind == "floats" else deep).save(tmp_path / name)
    with pytest.raises(UnreadableImage, match=r"x\.(png|tif) has more than 8 bits"):
        open_rgb(tmp_path / name)


def test_a_deep_colour_picture_is_refused(tmp_path):
    """Pillow calls a PNG of 16-bit colours RGB: only its raw mode tells."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + struct.pack(">6H", *[900 * i for i in range(6)]) for _ in range(2))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    (tmp_path / "x.png").write_bytes(content + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert Image.open(tmp_path / "x.png").mode == "RGB"
    with pytest.raises(UnreadableImage, match="more than 8 bits"):
        open_rgb(tmp_path / "x.png")


def test_packed_pixels_of_a_bitmap_are_not_deep(tmp_path):
    """A bitmap with 16 bits for the three channels together (5 each)."""
    header = b"BM" + struct.pack("<IHHI", 62, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 0, 8, 0, 0, 0, 0)
    (tmp_path / "x.bmp").write_bytes(header + struct.pack("<4H", 0, 31, 31 << 5, 31 << 10))
    assert np.asarray(open_rgb(tmp_path / "x.bmp"))[0].tolist() == [[0, 255, 0], [255, 0, 0]]


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_what_cannot_be_decoded_is_named(content, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"x\.png cannot be decoded"):
        open_rgb(tmp_path / "x.png")


def test_a_cut_picture_and_one_that_is_far_too_large_are_named(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        open_rgb(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:3000])
    with pytest.raises(UnreadableImage, match="cannot be decoded"):
        open_rgb(tmp_path / "x.png")
