"""Batched image augmentation with parameters of their own for every image, one code path for CPU and CUDA.

Images are (N, 3, H, W) float32 in [0, 1] on any device; the crop also takes uint8 and scales it. Every operation
equals torchvision's on one tensor image. First those with explicit parameters, then `random_*`, which draw them.
Parameters are CPU tensors and are copied to the device from pinned memory: no host-device synchronisation.
"""

import math

import numpy as np
import torch
from torch import Tensor

from common.devices import upload
from common.seeding import SampleRNG

HUE = 3  # of the jitter's operations 0 brightness, 1 contrast, 2 saturation, 3 hue


def resized_crop(images: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    """Boxes (N, 4) = top, left, height, width in pixels, resized to (N, 3, *size), mirrored where `flip` (N,).

    Bilinear between neighbours inside the crop, without antialias also where a crop shrinks (where it
    grows, as from 32 to 32 always, there is none to apply).
    """
    top, left, height, width = upload(boxes.float(), images.device).unbind(1)
    flip = None if flip is None else upload(flip, images.device)
    vertical = _resizing(top, height, images.shape[2], size[0])
    horizontal = _resizing(left, width, images.shape[3], size[1], flip)
    if images.dtype == torch.uint8:
        horizontal = horizontal / 255
    return _both_axes(vertical, images.float(), horizontal)


def color_jitter(images: Tensor, factors: Tensor, orders: np.ndarray, applied: np.ndarray | None = None) -> Tensor:
    """Brightness, contrast, saturation and hue, in each image's own order, on the images `applied` (N,) bool.

    factors (N, 4): three multipliers and a hue shift in turns; orders (N, 4) int64: the operations 0..3 of
    an image, first to last. Images not applied to come back bit for bit.
    """
    slot = (orders == HUE).argmax(1)
    if applied is not None:
        slot = np.where(applied, slot, -1)
    # In this order "is applied to" and "has blend j before hue" each hold for the first so many rows.
    rows = np.argsort(-slot, kind="stable")
    blends = orders[orders != HUE].reshape(-1, 3)[rows]
    count, *before = [int((slot >= least).sum()) for least in range(4)]
    row, blend = torch.as_tensor(rows), torch.as_tensor(blends)
    factors = factors.index_select(0, row)
    own = factors.gather(1, blend)
    weights = torch.stack([own, (1 - own) * (blend == 1), (1 - own) * (blend == 2)])
    turns = upload(factors[:, HUE].contiguous(), images.device)
    weights = upload(weights, images.device)[..., None, None, None]
    row, back = upload(torch.stack([row, row.argsort()]), images.device)

    in_order = images.index_select(0, row)
    jittered = in_order[:count]
    for j, end in enumerate(before):
        _blend_(jittered[:end], *weights[:, :end, j])
    _shift_hue_(jittered, _per_image(turns[:count]))
    for j, start in enumerate(before):
        _blend_(jittered[start:], *weights[:, start:count, j])
    return in_order.index_select(0, back)


def grayscale(images: Tensor, chosen: Tensor) -> Tensor:
    """The images `chosen` (N,) bool as their luma in all three channels."""
    return _choose(chosen, _luma(images), images)


def gaussian_blur(images: Tensor, sigmas: Tensor, chosen: Tensor, kernel_size: int | None = None) -> Tensor:
    """Blur the images `chosen` (N,) bool by a Gaussian of sigmas (N,) pixels, reflected at the border.

    kernel_size is odd; by default the odd number next to a tenth of the shorter side, 23 at 224 and 3 at 32
    (SimCLR, appendix A: a tenth of the side).
    """
    radius = max(1, min(images.shape[2:]) // 20) if kernel_size is None else kernel_size // 2
    sigmas = upload(sigmas, images.device)
    vertical, horizontal = (_gaussian_band(side, sigmas, radius) for side in images.shape[2:])
    return _choose(chosen, _both_axes(vertical, images, horizontal), images)


def random_resized_crop(
    images: Tensor,
    draws: SampleRNG,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    size: int | None = None,
    flip: float = 0.5,
) -> Tensor:
    """Crop as RandomResizedCrop does, resize to `size` (None: the old one), mirror with probability `flip`."""
    boxes = random_boxes(draws, images.shape[2], images.shape[3], scale, ratio)
    target = (images.shape[2], images.shape[3]) if size is None else (size, size)
    return resized_crop(images, boxes, target, draws.uniform() < flip)


def random_boxes(
    draws: SampleRNG, height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Tensor:
    """Top, left, height, width (rows, 4): the first of ten tries that fits the image, else its centre.

    A try has a uniform share of the area and a log-uniform aspect width/height (torchvision's RandomResizedCrop).
    """
    tries = 10
    side = draws.uniform(*scale, shape=(tries + 1,)).mul_(height * width).sqrt_()
    stretch = draws.uniform(math.log(ratio[0]) / 2, math.log(ratio[1]) / 2, shape=(tries + 1,)).exp_()
    heights, widths = (side / stretch).round_(), (side * stretch).round_()
    # The fallback stands last and always fits, so that a first one that fits exists.
    heights[:, tries] = min(height, round(width / ratio[0]))
    widths[:, tries] = min(width, round(height * ratio[1]))
    fits = (heights.clamp(1, height) == heights) & (widths.clamp(1, width) == widths)
    first = fits.byte().argmax(1, keepdim=True)
    extent = heights.gather(1, first), widths.gather(1, first)
    room = torch.cat([height - extent[0], width - extent[1]], 1)
    corner = (draws.uniform(shape=(2,)) * (room + 1)).floor_()
    return torch.cat([torch.where(first == tries, (room / 2).floor_(), corner), *extent], 1)


def random_color_jitter(
    images: Tensor,
    draws: SampleRNG,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    probability: float = 0.8,
) -> Tensor:
    """Jitter with `probability`: multipliers of 1 +- strength, not below 0, and a hue shift of +- `hue` turns."""
    multipliers = [draws.uniform(max(0.0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)]
    factors = torch.stack([*multipliers, draws.uniform(-hue, hue)], 1)
    orders = draws.numpy_uniform((4,)).argsort(axis=1)
    return color_jitter(images, factors, orders, draws.numpy_uniform() < probability)


def random_grayscale(images: Tensor, draws: SampleRNG, probability: float = 0.2) -> Tensor:
    """Take the colour from an image with `probability`."""
    return grayscale(images, draws.uniform() < probability)


def random_gaussian_blur(
    images: Tensor, draws: SampleRNG, sigmas: tuple[float, float] = (0.1, 2.0), probability: float = 0.5
) -> Tensor:
    """Blur an image with `probability` by a sigma uniform in `sigmas`, in pixels."""
    return gaussian_blur(images, draws.uniform(*sigmas), draws.uniform() < probability)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _choose(chosen: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where `chosen` (N,), else `old`. Exact, and on a CPU ten times as fast as torch.where."""
    return torch.lerp(old, new, _per_image(upload(chosen.float(), old.device)))


def _places(count: int, flip: Tensor | None, like: Tensor) -> Tensor:
    """0..count-1, (1, count), or (N, count) with the flipped images' reversed; on the device of `like`."""
    places = torch.arange(count, dtype=like.dtype, device=like.device)[None]
    return places if flip is None else torch.where(flip[:, None], count - 1 - places, places)


def _resizing(start: Tensor, length: Tensor, source: int, target: int, flip: Tensor | None = None) -> Tensor:
    """The matrices (N, target, source) that cut `length` pixels from `start` and resize them to `target`."""
    inside = (_places(target, flip, start) + 0.5) * (length / target)[:, None] - 0.5
    inside = inside.clamp_(min=0).minimum(length[:, None] - 1)
    pixel = torch.arange(source, dtype=start.dtype, device=start.device) - start[:, None]
    distance = (inside[:, :, None] - pixel[:, None, :]).abs_()
    return torch.rsub(distance, 1).clamp_(min=0)


def _gaussian_band(side: int, sigmas: Tensor, radius: int) -> Tensor:
    """The matrices (N, side, side) of a Gaussian blur, reflections at the border folded in."""
    place, last = torch.arange(side, device=sigmas.device), side - 1
    offset = torch.arange(-radius, radius + 1, device=sigmas.device)
    seen = last - (last - (offset[:, None] + place).abs()).abs()
    fold = (seen[:, :, None] == place).float()
    kernel = (-0.5 * (offset / sigmas[:, None]) ** 2).softmax(1)
    with torch.autocast(sigmas.device.type, enabled=False):
        return (kernel @ fold.flatten(1)).unflatten(1, (side, side))


def _both_axes(vertical: Tensor, images: Tensor, horizontal: Tensor) -> Tensor:
    """vertical (N, h, H) @ images (N, 3, H, W) @ horizontal (N, w, W) transposed, in float32: (N, 3, h, w)."""
    with torch.autocast(images.device.type, enabled=False):
        return vertical[:, None] @ (images.flatten(1, 2) @ horizontal.mT).unflatten(1, images.shape[1:3])


def _luma(images: Tensor) -> Tensor:
    """0.2989 R + 0.587 G + 0.114 B (ITU-R 601-2), (N, 1, H, W)."""
    red, green, blue = images.split(1, 1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _blend_(images: Tensor, own: Tensor, mean: Tensor, luma: Tensor) -> None:
    """In place: own * images + mean * their mean luma + luma * their luma, cut to [0, 1]; weights (N, 1, 1, 1)."""
    gray = _luma(images)
    constant = gray.mean((2, 3), keepdim=True) * mean
    gray.mul_(luma).add_(constant)
    torch.addcmul(gray, images, own, out=images).clamp_(0, 1)


def _shift_hue_(images: Tensor, turns: Tensor) -> None:
    """In place: add turns (N, 1, 1, 1) to the hue in HSV.

    With the channels stretched to 0..1 the hue lies 1 + G + B - R sextants from red, on green's or blue's side.
    A channel is highest up to a sixth of a turn from its own hue, lowest from a third on, linear between.
    """
    red, green, blue = images.split(1, 1)
    high = torch.maximum(red, green).maximum(blue)
    low = torch.minimum(red, green).minimum(blue)
    chroma = (high - low).clamp_(min=torch.finfo(images.dtype).tiny)  # of grey: 0 / 0 is to be 0
    from_red = (green + blue).sub_(red).sub_(low).div_(chroma).add_(1)
    hue = from_red.copysign_(green - blue).div_(6).add_(turns)
    away = hue + torch.arange(0, -3, -1, device=images.device).div(3)[:, None, None]
    away.sub_(away.round()).abs_()
    torch.lerp(low, high, torch.rsub(away, 2, alpha=6).clamp_(0, 1), out=images)
