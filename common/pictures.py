"""Open one picture file as 8-bit RGB without losing content, or refuse it by name."""

import re
from pathlib import Path

from PIL import Image

BACKGROUND = (255, 255, 255)  # behind transparent pixels: white, as a browser shows them
DEEP = re.compile(r"(RGB|RGBA|RGBX|CMYK|L|LA|P|I|F);(16|32)[A-Z]*")  # Pillow's raw modes with more than 8 bits


class UnreadableImage(Exception):
    """A picture file that cannot be used. The message names the file and the reason."""


def open_rgb(path: str | Path) -> Image.Image:
    """Return the picture in mode RGB. Transparent pixels are laid over BACKGROUND.

    Raises UnreadableImage for files that cannot be decoded, and for pixels of more than 8 bits per channel: Pillow
    would clip a grey one to white, and which range of values counts is not known here.
    """
    try:
        with Image.open(path) as picture:
            raw_modes = " ".join(str(tile[3]) for tile in picture.tile)
            if picture.mode.startswith(("I", "F")) or DEEP.search(raw_modes):
                raise UnreadableImage(
                    f"{path} has more than 8 bits per channel (mode {picture.mode}): convert it to 8 bits first, "
                    "over the range of values that you need"
                )
            if "A" in picture.getbands() or "a" in picture.getbands() or "transparency" in picture.info:
                layer = picture.convert("RGBA")
                return Image.alpha_composite(Image.new("RGBA", layer.size, (*BACKGROUND, 255)), layer).convert("RGB")
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableImage(f"{path} cannot be decoded ({reason})") from None
