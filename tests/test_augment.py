"""common/augment.py beside torchvision's operations on one image at a time, and the laws of its random numbers."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from common import augment
from common.seeding import SampleRNG

torch.set_num_threads(1)

RANDOM = {
    "crop": augment.random_resized_crop,
    "crop-to-24": functools.partial(augment.random_resized_crop, size=24),
    "jitter": augment.random_color_jitter,
    "gray": functools.partial(augment.random_grayscale, probability=0.5),
    "blur": functools.partial(augment.random_gaussian_blur, sigmas=(0.5, 2.0)),
}
every_random = pytest.mark.parametrize("operation", RANDOM.values(), ids=RANDOM.keys())


def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * (high - low) + low


def pictures(count: int = 24, height: int = 32, width: int = 32) -> torch.Tensor:
    """Noise, with ties between channels, greys, black and white in it, (count, 3, height, width) in [0, 1]."""
    images = uniform(0, 1, count, 3, height, width)
    images[0::4] = (images[0::4] * 2).round() / 2
    images[1, :, : height // 2] = images[1, :1, : height // 2]
    images[2, :, 0], images[2, :, 1] = 0, 1
    return images


def each(operation, images: torch.Tensor, *parameters) -> torch.Tensor:
    """operation(image, its parameters) one image at a time: the naive reference."""
    return torch.stack([operation(image, *own) for image, *own in zip(images, *parameters, strict=True)])


def close(result: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(result, wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("shape", "size", "antialias"),
    [((32, 32), (32, 32), False), ((32, 32), (32, 32), True), ((40, 56), (16, 24), False), ((20, 33), (48, 48), True)],
)
def test_resized_crop_equals_torchvision(shape, size, antialias):
    images = pictures(24, *shape)
    boxes = augment.random_boxes(SampleRNG(0, "boxes", 0, 24), *shape, (0.1, 1.0), (3 / 4, 4 / 3))
    boxes[:3] = torch.tensor([[0, 0, *shape], [5, 7, 1, 1], [shape[0] - 2, shape[1] - 3, 2, 3]])
    flip = torch.arange(24) % 2 == 1

    def reference(image, box, flipped):
        image = TF.resized_crop(image, *box.int().tolist(), size, antialias=antialias)
        return TF.hflip(image) if flipped else image

    wanted = each(reference, images, boxes, flip)
    close(augment.resized_crop(images, boxes, size, flip), wanted, 1e-5)
    close(augment.resized_crop(images, boxes.int(), size), each(reference, images, boxes, flip & False), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        close(augment.resized_crop(images, boxes, size, flip), wanted, 1e-5)


def test_uint8_is_scaled():
    images = (pictures() * 255).byte()
    boxes = augment.random_boxes(SampleRNG(0, "boxes", 0, 24), 32, 32, (0.1, 1.0), (3 / 4, 4 / 3))
    wanted = augment.resized_crop(images.float() / 255, boxes, (32, 32))
    close(augment.resized_crop(images, boxes, (32, 32)), wanted, 1e-6)


def test_flip_of_the_whole_image_is_exact():
    images, flip = pictures(), torch.arange(24) % 3 == 0
    boxes = torch.tensor([[0, 0, 32, 32]]).expand(24, 4)
    wanted = each(lambda image, flipped: TF.hflip(image) if flipped else image, images, flip)
    close(augment.resized_crop(images, boxes, (32, 32), flip), wanted, 0)


def adjust(image, factors, order):
    """torchvision's jitter with its parameters given."""
    steps = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for step in order:
        image = steps[step](image, factors[step].item())
    return image


@pytest.mark.parametrize("operation", [0, 1, 2])
def test_blends_equal_torchvision(operation):
    images, factors = pictures(), uniform(0, 2, 24, 4)
    rest = (1 - factors[:, operation])[:, None, None, None]
    weights = [rest * (operation == 1), rest * (operation == 2)]
    result = images.clone()
    augment._blend_(result, factors[:, operation, None, None, None], *weights)
    close(result, each(lambda image, own: adjust(image, own, [operation]), images, factors), 1e-6)


def test_hue_equals_torchvision():
    images, turns = pictures(), uniform(-0.5, 0.5, 24)
    turns[:3] = torch.tensor([-0.5, 0.0, 0.5])
    result = images.clone()
    augment._shift_hue_(result, turns[:, None, None, None])
    close(result, each(lambda image, turn: TF.adjust_hue(image, turn.item()), images, turns), 1e-5)
    assert result.min() >= 0 and result.max() <= 1


def test_all_orders_of_the_jitter_equal_torchvision():
    orders = np.array(list(itertools.permutations(range(4))))
    images, factors = pictures(), torch.cat([uniform(0.5, 1.5, 24, 3), uniform(-0.5, 0.5, 24, 1)], 1)
    wanted = each(adjust, images, factors, orders)
    assert (wanted[1:] - each(adjust, images, factors, orders[::-1])[1:]).abs().amax((1, 2, 3)).min() > 1e-3
    close(augment.color_jitter(images, factors, orders), wanted, 1e-5)

    applied = np.arange(24) % 3 > 0
    result = augment.color_jitter(images, factors, orders, applied)
    close(result[applied], wanted[applied], 1e-5)
    close(result[~applied], images[~applied], 0)
    close(augment.color_jitter(images, factors, orders, np.zeros(24, bool)), images, 0)


def chosen_only(operation):
    return lambda image, chosen, *own: operation(image, *own) if chosen else image


def test_grayscale_equals_torchvision():
    images, chosen = pictures(), torch.arange(24) % 3 > 0
    wanted = each(chosen_only(lambda image: TF.rgb_to_grayscale(image, 3)), images, chosen)
    close(augment.grayscale(images, chosen), wanted, 1e-6)


@pytest.mark.parametrize(
    ("height", "width", "given", "used"),
    [(32, 32, None, 3), (32, 48, 7, 7), (16, 16, None, 3), (64, 80, None, 7), (24, 24, 23, 23)],
)
def test_gaussian_blur_equals_torchvision(height, width, given, used):
    images, chosen, sigmas = pictures(24, height, width), torch.arange(24) % 3 > 0, uniform(0.1, 2.0, 24)
    blur = chosen_only(lambda image, sigma: TF.gaussian_blur(image, [used, used], [sigma.item()] * 2))
    wanted = each(blur, images, chosen, sigmas)
    close(augment.gaussian_blur(images, sigmas, chosen, given), wanted, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        close(augment.gaussian_blur(images, sigmas, chosen, given), wanted, 1e-6)


def test_boxes_follow_torchvisions_distribution():
    """Means and mean squares of area, log aspect and place agree within five standard errors of their difference."""
    shape, settings = (32, 40), ((0.2, 1.0), (0.6, 1.4))
    own = augment.random_boxes(SampleRNG(0, "boxes", 0, 40_000), *shape, *settings).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, *shape)
        theirs = [T.RandomResizedCrop.get_params(image, *map(list, settings)) for _ in range(8_000)]

    def features(boxes):
        top, left, height, width = boxes.double().unbind(1)
        middles = (top + height / 2) / shape[0], (left + width / 2) / shape[1]
        values = torch.stack([height * width / math.prod(shape), (width / height).log(), *middles])
        return torch.cat([values, values**2, (values[:1] * values[1:2])])

    ours, wanted = features(own), features(torch.tensor(theirs))
    error = (ours.var(1) / ours.shape[1] + wanted.var(1) / wanted.shape[1]).sqrt()
    assert ((ours.mean(1) - wanted.mean(1)).abs() < 5 * error).all()

    top, left, height, width = own.unbind(1)
    assert own.equal(own.round()) and top.min() == 0 and left.min() == 0 and height.min() > 0 and width.min() > 0
    assert (top + height).max() == shape[0] and (left + width).max() == shape[1]


@pytest.mark.parametrize(
    ("shape", "scale", "ratio"),
    [((34, 32), (1, 1), (3, 4)), ((32, 34), (1, 1), (1 / 4, 1 / 3)), ((20, 24), (2, 2), (3 / 4, 4 / 3))],
)
def test_where_no_try_fits_the_box_is_torchvisions_centre(shape, scale, ratio):
    wanted = T.RandomResizedCrop.get_params(torch.empty(3, *shape), list(scale), list(ratio))
    boxes = augment.random_boxes(SampleRNG(0, "boxes", 0, 8), *shape, scale, ratio)
    assert boxes.tolist() == [list(wanted)] * 8


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_strengths_reach_their_operation(name):
    """One strength at a time: the factor read back from the picture is uniform in its range."""
    image = torch.tensor([0.5, 0.3, 0.3])[:, None, None].repeat(1, 2, 2)
    image[:, 0] -= 0.1
    images = image.expand(4000, 3, 2, 2)
    strengths = dict.fromkeys(["brightness", "contrast", "saturation", "hue"], 0.0) | {name: 0.15}
    result = augment.random_color_jitter(images, SampleRNG(0, "jitter", 0, 4000), **strengths, probability=1.0)
    factor = {
        "brightness": result.mean((1, 2, 3)) / image.mean() - 1,
        "contrast": (result[:, :, 1] - result[:, :, 0]).mean((1, 2)) / 0.1 - 1,
        "saturation": (result[:, 0] - result[:, 1]).mean((1, 2)) / 0.2 - 1,
        "hue": (result[:, 1] - result[:, 2]).mean((1, 2)) / 0.2 / 6,
    }[name]
    assert -0.15 - 1e-4 < factor.min() < -0.149 and 0.149 < factor.max() < 0.15 + 1e-4
    assert factor.mean().abs() < 5 * 0.15 / math.sqrt(3 * 4000)
    if name == "brightness":
        low = augment.random_color_jitter(images, SampleRNG(0, "jitter", 0, 4000), 2.0, 0, 0, 0, probability=1.0)
        assert low.amax((1, 2, 3)).min() < 1e-3 and (low == 0).all((1, 2, 3)).float().mean() < 0.01


@pytest.mark.parametrize(
    ("operation", "share"),
    [
        (augment.random_color_jitter, 0.8),
        (augment.random_grayscale, 0.2),
        (augment.random_gaussian_blur, 0.5),
    ],
)
def test_share_of_changed_images(operation, share):
    images = uniform(0, 1, 1, 3, 20, 20).expand(2000, 3, 20, 20)
    changed = (operation(images, SampleRNG(0, "view", 0, 2000)) != images).any((1, 2, 3))
    assert abs(changed.float().mean() - share) < 5 * math.sqrt(share * (1 - share) / 2000)
    for probability in 0.0, 1.0:
        result = operation(images[:50], SampleRNG(0, "view", 0, 50), probability=probability)
        assert (result != images[:50]).any((1, 2, 3)).float().mean() == probability


def test_flips_are_half_of_the_images():
    image = torch.linspace(0, 1, 32).expand(2000, 3, 32, 32)
    result = augment.random_resized_crop(image, SampleRNG(0, "view", 0, 2000))[:, 0, 16]
    flipped = result[:, 8] > result[:, 24]
    assert abs(flipped.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(2000)


@every_random
def test_every_image_gets_its_own_parameters(operation):
    images = uniform(0, 1, 1, 3, 32, 32).expand(32, 3, 32, 32)
    different = len(operation(images, SampleRNG(0, "view", 0, 32)).flatten(1).unique(dim=0))
    assert different == 2 if operation is RANDOM["gray"] else different > 10


@every_random
def test_result_is_a_function_of_the_key_and_leaves_its_input(operation):
    images = pictures()
    before = images.clone()
    first = operation(images, SampleRNG(0, "view", 7, 24))
    close(operation(images, SampleRNG(0, "view", 7, 24)), first, 0)
    assert images.equal(before) and first.data_ptr() != images.data_ptr()
    for other in (SampleRNG(0, "view", 8, 24), SampleRNG(0, "second view", 7, 24), SampleRNG(1, "view", 7, 24)):
        assert not operation(images, other).equal(first)


@every_random
def test_half_batches_by_rows_equal_the_whole(operation):
    images = pictures()
    whole = operation(images, SampleRNG(0, "view", 7, 24))
    halves = [operation(images[rows], SampleRNG(0, "view", 7, 24, rows)) for rows in (slice(0, 12), slice(12, 24))]
    close(torch.cat(halves), whole, 1e-6)


@every_random
def test_runs_on_cuda_without_asking_it(fake_gpu, operation):
    images = torch.empty(6, 3, 32, 32, device="cuda")
    result = operation(images, SampleRNG(0, "view", 0, 6))
    assert result.device.type == "cuda" and result.dtype == torch.float32 and result.shape[:2] == (6, 3)


@pytest.mark.parametrize("name", ["crop"])
def test_uint8_on_cuda(fake_gpu, name):
    images = torch.empty(6, 3, 32, 32, dtype=torch.uint8, device="cuda")
    assert RANDOM[name](images, SampleRNG(0, "view", 0, 6)).dtype == torch.float32


def test_fake_gpu_catches_a_mask_that_asks_the_device(fake_gpu):
    images = torch.empty(6, 3, 32, 32, device="cuda")
    with pytest.raises(DynamicOutputShapeException):
        images[torch.empty(6, device="cuda") < 0.5]
