"""Glyphs: the built-in synthetic image data, characters in matplotlib's fonts as 32x32 colour images.

Each image shows one centred character, which is its class label. Font, size, rotation, shear, position, colours and
background are random. kNN on raw pixels or on an untrained network is poor because colours are random. The
presets set the difficulty: with the easiest a small trained network is nearly perfect. This module downloads and caches
nothing.
"""

import functools
import hashlib
import importlib.util
import math
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.seeding import SampleRNG, permutation


class Preset(NamedTuple):
    """Characters (classes) and strength of the random variations."""

    characters: str  # the classes, in the order of the labels
    clutter: int  # number of distracting characters at the border
    texture: float  # half-width of the smooth noise at each of three scales; colours are 0-1
    rotation: float  # maximum in degrees, in both directions
    shear: float  # maximum slope, in both directions
    only_lighter: bool = False  # the character is always lighter than the background


CAPITALS_AND_DIGITS = string.ascii_uppercase + string.digits
PRESETS = {
    "glyphs10": Preset(string.digits, clutter=0, texture=0.10, rotation=10, shear=0.10),
    "glyphs10-light": Preset(string.digits, clutter=0, texture=0.10, rotation=10, shear=0.10, only_lighter=True),
    "glyphs10-hard": Preset(string.digits, clutter=1, texture=0.20, rotation=15, shear=0.15),
    "glyphs36": Preset(CAPITALS_AND_DIGITS, clutter=0, texture=0.10, rotation=10, shear=0.10),
    "glyphs36-hard": Preset(CAPITALS_AND_DIGITS, clutter=1, texture=0.20, rotation=15, shear=0.15),
}
SCALE = (1.0, 1.35)  # at 1 the mask fills the image
SHIFT = 0.1  # maximum shift along each axis, as a fraction of the image width
CONTRAST = 0.35  # minimum difference in luma between character and background, 0-1
NOISE = 0.03  # half-width of the pixel noise
IMAGE_SIZE, MASK_SIZE = 32, 48  # pixels
FONT_SIZE = 38  # pixels: the largest at which the widest W fits into a mask
CHUNK = 250  # images composed at once; small enough for the CPU's cache
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip


def classes(name: str) -> int:
    """Return the number of classes of a preset. Raises ValueError if the preset does not exist."""
    return len(_preset(name).characters)


def generate(name: str, count: int, split: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Draw `count` images of a preset: images (count, 3, 32, 32) uint8 and labels (count,) int64, on the CPU.

    The splits "train" and "test" are independent samples, and so are the images of different seeds. Class sizes differ
    by at most one. Each full chunk of CHUNK images does not depend on `count`. Raises ValueError if the preset does not
    exist, OSError if matplotlib's fonts are missing.
    """
    preset = _preset(name)
    masks = render_masks(preset.characters)
    purpose = f"glyphs/{name}/{split}"
    images = torch.empty(count, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for chunk, start in enumerate(range(0, count, CHUNK)):
        stop = min(start + CHUNK, count)
        order = permutation(seed, f"{purpose}/labels", chunk, stop - start, "cpu")
        labels[start:stop] = (start + order) % len(preset.characters)
        rng = SampleRNG(seed, purpose, chunk, CHUNK, slice(stop - start))
        images[start:stop] = _compose(masks, labels[start:stop], preset, rng)
    return images, labels


@functools.cache
def fingerprint() -> str:
    """Return a sha256 of everything that determines the images: this file, the fonts and the library versions."""
    sha256 = hashlib.sha256(Path(__file__).read_bytes())
    sha256.update(f"Pillow {PIL.__version__}, torch {torch.__version__}, numpy {np.__version__}".encode())
    for name in FONTS:
        sha256.update((font_folder() / f"{name}.ttf").read_bytes())
    return sha256.hexdigest()


def font_folder() -> Path:
    """Return the folder of matplotlib's fonts, found without importing matplotlib, which takes a second."""
    specification = importlib.util.find_spec("matplotlib")
    if specification is None or specification.origin is None:
        raise OSError("matplotlib is not installed: install it, because the glyphs are drawn with its fonts")
    folder = Path(specification.origin).parent / "mpl-data" / "fonts" / "ttf"
    if not folder.is_dir():  # Linux distributions may install the fonts in another folder
        import matplotlib

        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return folder


def render_masks(characters: str) -> Tensor:
    """Render the characters in every font: masks (fonts, characters, 48, 48) uint8, each character centred.

    Raises OSError if a font file of matplotlib is missing.
    """
    masks = torch.zeros(len(FONTS), len(characters), MASK_SIZE, MASK_SIZE, dtype=torch.uint8)
    for row, name in enumerate(FONTS):
        font = ImageFont.truetype(str(font_folder() / f"{name}.ttf"), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for column, character in enumerate(characters):
            canvas = Image.new("L", (2 * MASK_SIZE, 2 * MASK_SIZE))
            ImageDraw.Draw(canvas).text((MASK_SIZE / 2, MASK_SIZE / 2), character, fill=255, font=font)
            cropped = canvas.crop(canvas.getbbox())
            mask = Image.new("L", (MASK_SIZE, MASK_SIZE))
            mask.paste(cropped, ((MASK_SIZE - cropped.width) // 2, (MASK_SIZE - cropped.height) // 2))
            masks[row, column] = torch.from_numpy(np.array(mask))
    return masks


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"invalid preset {name!r}: give one of {', '.join(PRESETS)}")
    return PRESETS[name]


def _compose(masks: Tensor, labels: Tensor, preset: Preset, rng: SampleRNG) -> Tensor:
    """Return images of the labels, (rows, 3, 32, 32) uint8: background, clutter, character, texture, noise."""
    background, foreground = (colour[:, :, None, None] for colour in _colours(rng, preset.only_lighter))
    images = background.expand(-1, -1, IMAGE_SIZE, IMAGE_SIZE)
    for _ in range(preset.clutter):
        distractors = rng.uniform(0, masks.shape[1]).long()
        angle = rng.uniform(0, 2 * math.pi)
        border = torch.stack([angle.cos(), angle.sin()], 1)
        colour = rng.uniform(shape=(3, 1, 1))
        images = torch.lerp(images, colour, _warp(masks, distractors, border, preset, rng))
    centre = rng.uniform(-2 * SHIFT, 2 * SHIFT, shape=(2,))
    images = torch.lerp(images, foreground, _warp(masks, labels, centre, preset, rng))
    texture = torch.zeros(len(labels), 3, 4, 4)
    for cells in (4, 8, 16):
        texture = texture + rng.uniform(-preset.texture, preset.texture, shape=(3, cells, cells))
        texture = F.interpolate(texture, scale_factor=2, mode="bilinear", align_corners=False)
    noise = rng.uniform(-NOISE, NOISE, shape=(3, IMAGE_SIZE, IMAGE_SIZE))
    images = noise.add_(images).add_(texture)
    return images.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _warp(masks: Tensor, labels: Tensor, centre: Tensor, preset: Preset, rng: SampleRNG) -> Tensor:
    """Return masks (rows, 1, 32, 32) in 0-1 of the labels in random fonts, rotated, sheared, scaled and shifted.

    `centre` (rows, 2) is the target position (x, y); the edges of the image are at -1 and 1.
    """
    font = rng.uniform(0, len(FONTS)).long()
    angle = rng.uniform(-preset.rotation, preset.rotation) * (math.pi / 180)
    shear = rng.uniform(-preset.shear, preset.shear)
    scale = rng.uniform(*SCALE)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    inverse = torch.stack([cos + shear * sin, shear * cos - sin, sin, cos], 1).view(-1, 2, 2)
    # Equals F.affine_grid, but without its matrix product, which would take a sixth of the total time.
    pixels = (torch.arange(IMAGE_SIZE) * 2 + 1) / IMAGE_SIZE - 1
    from_x = inverse[:, :, :1] * (pixels - centre[:, :1])[:, None]
    from_y = inverse[:, :, 1:] * (pixels - centre[:, 1:])[:, None]
    grid = (from_x[:, :, None, :] + from_y[:, :, :, None]).permute(0, 2, 3, 1)
    selected = masks[font, labels].unsqueeze(1).float()
    return F.grid_sample(selected, grid, align_corners=False) / 255


def _colours(rng: SampleRNG, only_lighter: bool) -> tuple[Tensor, Tensor]:
    """Draw background and foreground colours, each (rows, 3) in 0-1, whose lumas differ by at least CONTRAST.

    With `only_lighter` the two are swapped where the foreground would be darker.
    """
    background, foreground = rng.uniform(shape=(3,)), rng.uniform(shape=(3,))
    weights = torch.tensor([0.299, 0.587, 0.114])
    background_luma, luma = (background * weights).sum(1), (foreground * weights).sum(1)
    # The foreground's new luma is uniform over all values that are CONTRAST darker or CONTRAST lighter.
    darker, lighter = (background_luma - CONTRAST).clamp(min=0), (1 - CONTRAST - background_luma).clamp(min=0)
    offset = rng.uniform() * (darker + lighter)
    target = torch.where(offset < darker, offset, background_luma + CONTRAST + offset - darker)
    dimmed = foreground * (target / luma)[:, None]
    brightened = 1 - (1 - foreground) * ((1 - target) / (1 - luma))[:, None]
    foreground = torch.where((target < luma)[:, None], dimmed, brightened)
    swapped = (target < background_luma)[:, None] & only_lighter
    return torch.where(swapped, foreground, background), torch.where(swapped, background, foreground)
