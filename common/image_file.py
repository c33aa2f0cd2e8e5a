"""Load image files as 8-bit RGB; errors name the file and the remedy."""

import re
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common.files import error_reason

BACKGROUND = (255, 255, 255)  # transparent pixels are composited on white
# Pillow's raw modes with more than 8 bits per channel.
HIGH_BIT_DEPTH = re.compile(r"(RGB|RGBA|RGBX|CMYK|L|LA|P|I|F);(16|32)[A-Z]*")


class UnreadableImage(Exception):
    """An image file cannot be used. The message names the file, the reason and the remedy."""


def open_rgb(path: str | Path) -> Image.Image:
    """Load an image file as 8-bit RGB.

    Raises UnreadableImage if it cannot be decoded or has more than 8 bits per channel, because Pillow clips 16-bit
    grayscale to 255 and the right intensity range is unknown. Transparent pixels are composited on BACKGROUND.
    """
    try:
        with Image.open(path) as image:
            raw_modes = " ".join(str(tile[3]) for tile in image.tile)
            if image.mode.startswith(("I", "F")) or HIGH_BIT_DEPTH.search(raw_modes):
                raise UnreadableImage(
                    f"{path} has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits, with the "
                    "intensity range that you need"
                )
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # an MPO file is a JPEG photo with a preview
                raise UnreadableImage(f"{path} has {frames} frames: save each frame as a separate image")
            if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError:  # its text only repeats the path
        raise UnreadableImage(f"{path} cannot be decoded (unknown image format): replace or delete it") from None
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow raises many types of exception for a damaged file
        too_much_text = "text_chunk" in str(error).lower().replace(" ", "_")
        remedy = "save it without its metadata" if too_much_text else "replace or delete it"
        raise UnreadableImage(f"{path} cannot be decoded ({error_reason(error)}): {remedy}") from None
