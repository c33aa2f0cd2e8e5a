"""Image files of all modes are converted to 8-bit RGB, or an error names the file."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from common.image_file import UnreadableImage, open_rgb

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


def save_and_open(folder, image: Image.Image, name: str = "x.png", **settings) -> np.ndarray:
    image.save(folder / name, **settings)
    return np.asarray(open_rgb(folder / name))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes_without_alpha_are_converted_to_rgb(mode, tmp_path):
    image = Image.fromarray(RAMP).convert("RGB").convert(mode)
    rgb = save_and_open(tmp_path, image, "x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    assert rgb.shape == (8, 8, 3) and rgb.dtype == np.uint8
    assert np.array_equal(rgb, np.asarray(image.convert("RGB"))) and rgb.std() > 60


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composited_on_white(mode, tmp_path):
    """Black drawing on a transparent background: without compositing, all pixels would be black."""
    alpha = np.zeros((8, 8), np.uint8)
    alpha[2:4], alpha[4:6] = 255, 128
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 3] = alpha
    image = Image.fromarray(pixels, "RGBA")
    rgb = save_and_open(tmp_path, image.convert(mode) if mode == "LA" else image)
    assert (rgb[:2] == 255).all() and (rgb[2:4] == 0).all() and (abs(rgb[4:6].astype(int) - 127) <= 1).all()


def test_a_transparent_palette_colour_is_white(tmp_path):
    image = Image.fromarray(RAMP // 128).convert("P")
    image.putpalette([0, 0, 0, 200, 10, 10] + [0] * 762)
    rgb = save_and_open(tmp_path, image, transparency=0)
    assert (rgb[0] == 255).all() and tuple(rgb[7, 7]) == (200, 10, 10)


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint16, 257), (np.int32, 1000), (np.float32, 1 / 255)])
def test_16_bit_images_raise_an_error_with_path(dtype, scale, tmp_path):
    name = "x.png" if dtype is np.uint16 else "x.tif"
    Image.fromarray((RAMP * dtype(scale)).astype(dtype)).save(tmp_path / name)
    with pytest.raises(UnreadableImage, match=r"x\.(png|tif) has more than 8 bits"):
        open_rgb(tmp_path / name)


def test_a_16_bit_colour_png_is_an_error(tmp_path):
    """Pillow opens a 16-bit colour PNG in mode RGB; only Pillow's raw mode shows the 16 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + struct.pack(">6H", *[900 * i for i in range(6)]) for _ in range(2))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    (tmp_path / "x.png").write_bytes(content + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    assert Image.open(tmp_path / "x.png").mode == "RGB"
    with pytest.raises(UnreadableImage, match="more than 8 bits"):
        open_rgb(tmp_path / "x.png")


def test_a_bitmap_with_5_bits_per_channel_is_read(tmp_path):
    """Each pixel has 16 bits for the three channels together."""
    header = b"BM" + struct.pack("<IHHI", 62, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 2, 2, 1, 16, 0, 8, 0, 0, 0, 0)
    (tmp_path / "x.bmp").write_bytes(header + struct.pack("<4H", 0, 31, 31 << 5, 31 << 10))
    assert np.asarray(open_rgb(tmp_path / "x.bmp"))[0].tolist() == [[0, 255, 0], [255, 0, 0]]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_undecodable_file_error_contains_path(content, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(UnreadableImage, match=r"x\.png cannot be decoded"):
        open_rgb(tmp_path / "x.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "gif", "bmp", "webp"])
def test_a_damaged_file_of_any_format_is_read_or_is_an_unreadable_image(extension, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    rng, path = np.random.default_rng(0), tmp_path / f"x.{extension}"
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)
    intact, errors = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(intact)
        for position in rng.integers(0, min(len(intact), 200), 3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            open_rgb(path)
        except UnreadableImage:
            errors += 1
    assert errors


def test_a_large_text_in_a_png_is_an_error_with_a_remedy(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * 3_000_000, zip=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", pnginfo=text)
    with pytest.raises(UnreadableImage, match="save it without its metadata"):
        open_rgb(tmp_path / "x.png")


def test_truncated_and_oversized_images_are_an_error(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="exceeds limit"):
        open_rgb(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:3000])
    with pytest.raises(UnreadableImage, match="cannot be decoded"):
        open_rgb(tmp_path / "x.png")
