"""Glyphs: the embedded picture data, characters in the text faces that matplotlib ships, 32x32 colour.

A picture shows one character in the middle (its class) with its face, size, slant, place, colours and
background drawn at random. Random colours make raw pixels and a random network poor at it, a trained
small network reads it nearly perfectly; the presets say how hard it is. Nothing is downloaded or cached.
"""

import math
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from common.seeding import DATA_SEED, SampleRNG, permutation


class Preset(NamedTuple):
    """One difficulty: what is drawn, and how much it is disturbed."""

    characters: str  # a class each, in the order of the labels
    clutter: int  # other characters that reach in from the rim
    texture: float  # half-width of each of three scales of smooth noise, colours being 0-1
    rotation: float  # at most so many degrees either way
    shear: float  # at most this slope either way


CAPITALS = string.ascii_uppercase + string.digits
PRESETS = {
    "glyphs10": Preset(string.digits, clutter=0, texture=0.10, rotation=10, shear=0.10),
    "glyphs10-hard": Preset(string.digits, clutter=1, texture=0.20, rotation=15, shear=0.15),
    "glyphs36": Preset(CAPITALS, clutter=0, texture=0.10, rotation=10, shear=0.10),
    "glyphs36-hard": Preset(CAPITALS, clutter=1, texture=0.20, rotation=15, shear=0.15),
}
SCALE = (1.0, 1.35)  # 1: the mask's box fills the picture
SHIFT = 0.1  # of the picture's width, either way along each axis
CONTRAST = 0.35  # least difference in luma between character and background, 0-1
NOISE = 0.03  # half-width of the pixel noise
SIZE, MASK = 32, 48  # pixels, of a picture and of a mask
FONT = 38  # pixels: the largest at which the widest W fits into a mask
CHUNK = 250  # pictures composed at once: few enough to stay in the cache
FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10"),
)


def classes(preset: str) -> int:
    """Number of classes of a preset. Raises ValueError for an unknown one."""
    return len(_known(preset).characters)


def glyphs(preset: str, count: int, part: str) -> tuple[Tensor, Tensor]:
    """Draw `count` pictures of a preset: images (count, 3, 32, 32) uint8 and labels (count,) int64, CPU.

    `part` ("train", "test") names an independent sample. Class sizes differ by at most one. The result
    depends on nothing but the arguments and DATA_SEED; every full chunk of CHUNK is the same whatever
    the count. Raises ValueError for an unknown preset, OSError where matplotlib's fonts are missing.
    """
    setting = _known(preset)
    masks = render(setting.characters)
    purpose = f"glyphs/{preset}/{part}"
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for chunk, start in enumerate(range(0, count, CHUNK)):
        stop = min(start + CHUNK, count)
        order = permutation(DATA_SEED, f"{purpose}/labels", chunk, stop - start, "cpu")
        labels[start:stop] = (start + order) % len(setting.characters)
        draws = SampleRNG(DATA_SEED, purpose, chunk, CHUNK, slice(stop - start))
        images[start:stop] = _compose(masks, labels[start:stop], setting, draws)
    return images, labels


def render(characters: str) -> Tensor:
    """Masks of the characters in every face, (faces, characters, 48, 48) uint8, each centred on its ink.

    Raises OSError where a font file of matplotlib is missing.
    """
    import matplotlib  # only for its fonts, and only where none are cached

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    masks = torch.zeros(len(FACES), len(characters), MASK, MASK, dtype=torch.uint8)
    for row, face in enumerate(FACES):
        font = ImageFont.truetype(str(folder / f"{face}.ttf"), FONT, layout_engine=ImageFont.Layout.BASIC)
        for column, character in enumerate(characters):
            canvas = Image.new("L", (2 * MASK, 2 * MASK))
            ImageDraw.Draw(canvas).text((MASK / 2, MASK / 2), character, fill=255, font=font)
            ink = canvas.crop(canvas.getbbox())
            picture = Image.new("L", (MASK, MASK))
            picture.paste(ink, ((MASK - ink.width) // 2, (MASK - ink.height) // 2))
            masks[row, column] = torch.from_numpy(np.array(picture))
    return masks


def _known(preset: str) -> Preset:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    return PRESETS[preset]


def _compose(masks: Tensor, labels: Tensor, setting: Preset, draws: SampleRNG) -> Tensor:
    """Pictures of the labels, (rows, 3, 32, 32) uint8: background, clutter, character, texture, noise."""
    background, foreground = (colour[:, :, None, None] for colour in _colours(draws))
    picture = background.expand(-1, -1, SIZE, SIZE)
    for _ in range(setting.clutter):
        other = draws.uniform(0, masks.shape[1]).long()
        angle = draws.uniform(0, 2 * math.pi)
        rim = torch.stack([angle.cos(), angle.sin()], 1)
        colour = draws.uniform(shape=(3, 1, 1))
        picture = torch.lerp(picture, colour, _warp(masks, other, rim, setting, draws))
    centre = draws.uniform(-2 * SHIFT, 2 * SHIFT, shape=(2,))
    picture = torch.lerp(picture, foreground, _warp(masks, labels, centre, setting, draws))
    texture = torch.zeros(len(labels), 3, 4, 4)
    for cells in (4, 8, 16):
        texture = texture + draws.uniform(-setting.texture, setting.texture, shape=(3, cells, cells))
        texture = F.interpolate(texture, scale_factor=2, mode="bilinear", align_corners=False)
    noise = draws.uniform(-NOISE, NOISE, shape=(3, SIZE, SIZE))
    picture = noise.add_(picture).add_(texture)
    return picture.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


def _warp(masks: Tensor, labels: Tensor, centre: Tensor, setting: Preset, draws: SampleRNG) -> Tensor:
    """Masks of the labels in random faces, turned, sheared, scaled and moved: (rows, 1, 32, 32), 0-1.

    `centre` (rows, 2) says where to, across and down, the picture's edges being -1 and 1.
    """
    face = draws.uniform(0, len(FACES)).long()
    angle = draws.uniform(-setting.rotation, setting.rotation) * (math.pi / 180)
    shear = draws.uniform(-setting.shear, setting.shear)
    scale = draws.uniform(*SCALE)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    inverse = torch.stack([cos + shear * sin, shear * cos - sin, sin, cos], 1).view(-1, 2, 2)
    # as F.affine_grid, whose product of matrices would take a sixth of the whole time
    pixels = (torch.arange(SIZE) * 2 + 1) / SIZE - 1
    along = inverse[:, :, :1] * (pixels - centre[:, :1])[:, None]
    down = inverse[:, :, 1:] * (pixels - centre[:, 1:])[:, None]
    grid = (along[:, :, None, :] + down[:, :, :, None]).permute(0, 2, 3, 1)
    chosen = masks[face, labels].unsqueeze(1).float()
    return F.grid_sample(chosen, grid, align_corners=False) / 255


def _colours(draws: SampleRNG) -> tuple[Tensor, Tensor]:
    """Background and foreground, each (rows, 3) in 0-1, whose lumas differ by CONTRAST or more."""
    background, foreground = draws.uniform(shape=(3,)), draws.uniform(shape=(3,))
    weights = torch.tensor([0.299, 0.587, 0.114])
    paper, ink = (background * weights).sum(1), (foreground * weights).sum(1)
    darker, lighter = (paper - CONTRAST).clamp(min=0), (1 - CONTRAST - paper).clamp(min=0)
    place = draws.uniform() * (darker + lighter)
    target = torch.where(place < darker, place, paper + CONTRAST + place - darker)
    dimmed = foreground * (target / ink)[:, None]
    lit = 1 - (1 - foreground) * ((1 - target) / (1 - ink))[:, None]
    return background, torch.where((target < ink)[:, None], dimmed, lit)
