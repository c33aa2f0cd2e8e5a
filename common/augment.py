"""Batched image augmentation with separate random parameters for each image; the same code runs on CPU and CUDA.

Images are (N, 3, H, W) float32 in [0, 1] on any device; the crop also takes uint8 and scales it. Every operation
gives the same result as torchvision's on a single tensor image, without antialiasing. The functions with explicit
parameters come first, then the `random_*` functions, which draw the parameters. Parameters are CPU tensors, copied to
the device from pinned memory: no host-device synchronisation.
"""

import math

import numpy as np
import torch
from torch import Tensor

from common.devices import upload
from common.seeding import SampleRNG

HUE = 3  # number of the hue shift among the operations of `color_jitter`


def resized_crop(images: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    """Crop the boxes and resize them to (N, 3, *size); mirror horizontally where `flip` (N,) is true.

    boxes (N, 4): top, left, height, width in pixels. Bilinear interpolation within the crop, without antialiasing.
    Antialiasing would change only crops larger than `size`: none at 32 to 32 pixels, most at 32 to 24 (SimSiam's demo).
    """
    top, left, height, width = upload(boxes.float(), images.device).unbind(1)
    flip = None if flip is None else upload(flip, images.device)
    vertical = _resize_matrices(top, height, images.shape[2], size[0])
    horizontal = _resize_matrices(left, width, images.shape[3], size[1], flip)
    if images.dtype == torch.uint8:
        horizontal = horizontal / 255
    return _apply_separable(vertical, images.float(), horizontal)


def color_jitter(images: Tensor, factors: Tensor, orders: np.ndarray, mask: np.ndarray | None = None) -> Tensor:
    """Change brightness, contrast, saturation and hue of the images where `mask` (N,) bool is true (None: all images).

    factors (N, 4): multipliers of brightness, contrast and saturation, and a hue shift as a fraction of the colour
    circle, as in torchvision (0.5 = 180 degrees). orders (N, 4) int64: order of the operations for each image.
    Operations: 0 brightness, 1 contrast, 2 saturation, 3 hue. Images outside the mask are returned bit for bit.
    """
    # An image has 0..3 blends (brightness, contrast, saturation) before its hue shift; -1: outside the mask.
    blends_before_hue = (orders == HUE).argmax(1)
    if mask is not None:
        blends_before_hue = np.where(mask, blends_before_hue, -1)
    # Sort the images by this number, so that each operation below applies to one contiguous slice of rows.
    rows = np.argsort(-blends_before_hue, kind="stable")
    blends = orders[orders != HUE].reshape(-1, 3)[rows]
    # count: images in the mask; before[j]: images whose blend j comes before hue
    count, *before = [int((blends_before_hue >= least).sum()) for least in range(4)]
    row, blend = torch.as_tensor(rows), torch.as_tensor(blends)
    factors = factors.index_select(0, row)
    factor = factors.gather(1, blend)
    weights = torch.stack([factor, (1 - factor) * (blend == 1), (1 - factor) * (blend == 2)])
    turns = upload(factors[:, HUE].contiguous(), images.device)
    weights = upload(weights, images.device)[..., None, None, None]
    row, inverse = upload(torch.stack([row, row.argsort()]), images.device)

    images = images.index_select(0, row)
    jittered = images[:count]
    for j, end in enumerate(before):
        _blend_(jittered[:end], *weights[:, :end, j])
    _shift_hue_(jittered, _per_image(turns[:count]))
    for j, start in enumerate(before):
        _blend_(jittered[start:], *weights[:, start:count, j])
    return images.index_select(0, inverse)


def grayscale(images: Tensor, mask: Tensor) -> Tensor:
    """Convert the images where `mask` (N,) bool is true to grayscale: their luma in all three channels."""
    return _where(mask, _luma(images), images)


def gaussian_blur(images: Tensor, sigmas: Tensor, mask: Tensor, kernel_size: int | None = None) -> Tensor:
    """Blur the images where `mask` (N,) bool is true by Gaussians of standard deviation `sigmas` (N,), in pixels.

    Borders are reflected. kernel_size is odd; the default is the odd number next to a tenth of the shorter side: 23 at
    224 pixels, 3 at 32 (SimCLR, appendix A: a tenth of the side).
    """
    radius = max(1, min(images.shape[2:]) // 20) if kernel_size is None else kernel_size // 2
    sigmas = upload(sigmas, images.device)
    vertical, horizontal = (_blur_matrices(side, sigmas, radius) for side in images.shape[2:])
    return _where(mask, _apply_separable(vertical, images, horizontal), images)


def random_resized_crop(
    images: Tensor,
    rng: SampleRNG,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    size: int | None = None,
    flip: float = 0.5,
) -> Tensor:
    """Crop as RandomResizedCrop does, resize to `size` (None: the input size), mirror with probability `flip`."""
    boxes = random_boxes(rng, images.shape[2], images.shape[3], scale, ratio)
    target = (images.shape[2], images.shape[3]) if size is None else (size, size)
    return resized_crop(images, boxes, target, rng.uniform() < flip)


def random_boxes(
    rng: SampleRNG, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Draw crop boxes (rows, 4): top, left, height, width in pixels, as torchvision's RandomResizedCrop.

    A box has a uniform share of the area and a log-uniform aspect ratio width/height. The first of ten draws that
    fits into the image is taken; if none fits, the central box with the closest allowed aspect ratio.
    """
    tries = 10
    side = rng.uniform(*scale, shape=(tries + 1,)).mul_(height * width).sqrt_()
    stretch = rng.uniform(math.log(ratio[0]) / 2, math.log(ratio[1]) / 2, shape=(tries + 1,)).exp_()
    heights, widths = (side / stretch).round_(), (side * stretch).round_()
    # The last column is the fallback. It always fits, so argmax below always finds a box.
    heights[:, tries] = min(height, round(width / ratio[0]))
    widths[:, tries] = min(width, round(height * ratio[1]))
    fits = (heights.clamp(1, height) == heights) & (widths.clamp(1, width) == widths)
    first = fits.byte().argmax(1, keepdim=True)
    box_heights, box_widths = heights.gather(1, first), widths.gather(1, first)
    room = torch.cat([height - box_heights, width - box_widths], 1)
    corner = (rng.uniform(shape=(2,)) * (room + 1)).floor_()
    corner = torch.where(first == tries, (room / 2).floor_(), corner)
    return torch.cat([corner, box_heights, box_widths], 1)


def random_color_jitter(
    images: Tensor,
    rng: SampleRNG,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    probability: float = 0.8,
) -> Tensor:
    """Apply colour jitter with `probability`, in a random order of the four operations.

    Multipliers are uniform in 1 +- strength, not below 0. The hue shift is uniform in +- `hue`, in turns of the colour
    circle.
    """
    multipliers = [rng.uniform(max(0.0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
    factors = torch.stack([*multipliers, rng.uniform(-hue, hue)], 1)
    orders = rng.numpy_uniform((4,)).argsort(axis=1)
    return color_jitter(images, factors, orders, rng.numpy_uniform() < probability)


def random_grayscale(images: Tensor, rng: SampleRNG, probability: float = 0.2) -> Tensor:
    """Convert an image to grayscale with `probability`."""
    return grayscale(images, rng.uniform() < probability)


def random_gaussian_blur(
    images: Tensor, rng: SampleRNG, sigmas: tuple[float, float] = (0.1, 2.0), probability: float = 0.5
) -> Tensor:
    """Blur an image with `probability` by a Gaussian whose standard deviation is uniform in `sigmas`, in pixels."""
    return gaussian_blur(images, rng.uniform(*sigmas), rng.uniform() < probability)


def _per_image(values: Tensor) -> Tensor:
    """Reshape (N,) to (N, 1, 1, 1)."""
    return values[:, None, None, None]


def _where(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Return `new` where `mask` (N,) is true, else `old`. Bit-exact; on a CPU ten times as fast as torch.where."""
    return torch.lerp(old, new, _per_image(upload(mask.float(), old.device)))


def _pixel_indices(count: int, flip: Tensor | None, like: Tensor) -> Tensor:
    """Return 0..count-1 as (1, count), or as (N, count), reversed where `flip`; dtype and device of `like`."""
    indices = torch.arange(count, dtype=like.dtype, device=like.device)[None]
    return indices if flip is None else torch.where(flip[:, None], count - 1 - indices, indices)


def _resize_matrices(start: Tensor, length: Tensor, source: int, target: int, flip: Tensor | None = None) -> Tensor:
    """Return matrices (N, target, source) that crop `length` pixels from `start` and resize them to `target`."""
    inside = (_pixel_indices(target, flip, start) + 0.5) * (length / target)[:, None] - 0.5
    inside = inside.clamp_(min=0).minimum(length[:, None] - 1)
    pixel = torch.arange(source, dtype=start.dtype, device=start.device) - start[:, None]
    distance = (inside[:, :, None] - pixel[:, None, :]).abs_()
    return torch.rsub(distance, 1).clamp_(min=0)


def _blur_matrices(side: int, sigmas: Tensor, radius: int) -> Tensor:
    """Return matrices (N, side, side) of a one-dimensional Gaussian blur with reflected borders."""
    pixel, last = torch.arange(side, device=sigmas.device), side - 1
    offset = torch.arange(-radius, radius + 1, device=sigmas.device)
    source = last - (last - (offset[:, None] + pixel).abs()).abs()  # index after reflection at both borders
    fold = (source[:, :, None] == pixel).float()
    kernel = (-0.5 * (offset / sigmas[:, None]) ** 2).softmax(1)
    with torch.autocast(sigmas.device.type, enabled=False):
        return (kernel @ fold.flatten(1)).unflatten(1, (side, side))


def _apply_separable(vertical: Tensor, images: Tensor, horizontal: Tensor) -> Tensor:
    """Return vertical (N, h, H) @ images (N, 3, H, W) @ horizontal (N, w, W) transposed, in float32: (N, 3, h, w)."""
    with torch.autocast(images.device.type, enabled=False):
        return vertical[:, None] @ (images.flatten(1, 2) @ horizontal.mT).unflatten(1, images.shape[1:3])


def _luma(images: Tensor) -> Tensor:
    """Return 0.2989 R + 0.587 G + 0.114 B (ITU-R 601-2), (N, 1, H, W)."""
    red, green, blue = images.split(1, 1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend_(images: Tensor, factor: Tensor, mean: Tensor, luma: Tensor) -> None:
    """In place: factor * images + mean * (their mean luma) + luma * (their luma), clipped to [0, 1].

    The weights `factor`, `mean` and `luma` are (N, 1, 1, 1).
    """
    gray = _luma(images)
    constant = gray.mean((2, 3), keepdim=True) * mean
    gray.mul_(luma).add_(constant)
    torch.addcmul(gray, images, factor, out=images).clamp_(0, 1)


def _shift_hue_(images: Tensor, turns: Tensor) -> None:
    """In place: add turns (N, 1, 1, 1) to the hue in HSV.

    With the channels scaled to 0..1, the hue is 1 + G + B - R sixths of a turn away from red, on the side of the
    larger of green and blue. A channel is 1 up to a sixth of a turn from its own hue, 0 beyond a third, and linear
    between.
    """
    red, green, blue = images.split(1, 1)
    high = torch.maximum(red, green).maximum(blue)
    low = torch.minimum(red, green).minimum(blue)
    chroma = (high - low).clamp_(min=torch.finfo(images.dtype).tiny)  # grey pixels: avoids 0 / 0
    from_red = (green + blue).sub_(red).sub_(low).div_(chroma).add_(1)
    hue = from_red.copysign_(green - blue).div_(6).add_(turns)
    distance = hue + torch.arange(0, -3, -1, device=images.device).div(3)[:, None, None]  # from each channel's own hue
    distance.sub_(distance.round()).abs_()
    torch.lerp(low, high, torch.rsub(distance, 2, alpha=6).clamp_(0, 1), out=images)
