"""common/augment.py against torchvision's operations on single images, and the distribution of its parameters."""

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
all_random_operations = pytest.mark.parametrize("operation", RANDOM.values(), ids=RANDOM.keys())


def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) * (high - low) + low


def noise_images(count: int = 24, height: int = 32, width: int = 32) -> torch.Tensor:
    """Noise images with ties between channels, grey, black and white pixels: (count, 3, height, width) in [0, 1]."""
    images = uniform(0, 1, count, 3, height, width)
    images[0::4] = (images[0::4] * 2).round() / 2
    images[1, :, : height // 2] = images[1, :1, : height // 2]
    images[2, :, 0], images[2, :, 1] = 0, 1
    return images


def apply_each(operation, images: torch.Tensor, *parameters) -> torch.Tensor:
    """Reference implementation: call operation(image, *its parameters) for one image at a time."""
    return torch.stack([operation(image, *values) for image, *values in zip(images, *parameters, strict=True)])


def assert_close(result: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("shape", "size", "antialias"),
    [((32, 32), (32, 32), False), ((32, 32), (32, 32), True), ((40, 56), (16, 24), False), ((20, 33), (48, 48), True)],
)
def test_resized_crop_equals_torchvision(shape, size, antialias):
    images = noise_images(24, *shape)
    boxes = augment.random_boxes(SampleRNG(0, "boxes", 0, 24), *shape, (0.1, 1.0), (3 / 4, 4 / 3))
    boxes[:3] = torch.tensor([[0, 0, *shape], [5, 7, 1, 1], [shape[0] - 2, shape[1] - 3, 2, 3]])
    flip = torch.arange(24) % 2 == 1

    def reference(image, box, flipped):
        image = TF.resized_crop(image, *box.int().tolist(), size, antialias=antialias)
        return TF.hflip(image) if flipped else image

    expected = apply_each(reference, images, boxes, flip)
    assert_close(augment.resized_crop(images, boxes, size, flip), expected, 1e-5)
    assert_close(
        augment.resized_crop(images, boxes.int(), size), apply_each(reference, images, boxes, flip & False), 1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(augment.resized_crop(images, boxes, size, flip), expected, 1e-5)


def test_uint8_images_are_scaled_to_0_1():
    images = (noise_images() * 255).byte()
    boxes = augment.random_boxes(SampleRNG(0, "boxes", 0, 24), 32, 32, (0.1, 1.0), (3 / 4, 4 / 3))
    expected = augment.resized_crop(images.float() / 255, boxes, (32, 32))
    assert_close(augment.resized_crop(images, boxes, (32, 32)), expected, 1e-6)


def test_flip_of_a_full_image_is_exact():
    images, flip = noise_images(), torch.arange(24) % 3 == 0
    boxes = torch.tensor([[0, 0, 32, 32]]).expand(24, 4)
    expected = apply_each(lambda image, flipped: TF.hflip(image) if flipped else image, images, flip)
    assert_close(augment.resized_crop(images, boxes, (32, 32), flip), expected, 0)


def adjust(image, factors, order):
    """torchvision's colour jitter with explicit parameters."""
    operations = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    for number in order:
        image = operations[number](image, factors[number].item())
    return image


@pytest.mark.parametrize("operation", [0, 1, 2])
def test_brightness_contrast_and_saturation_equal_torchvision(operation):
    images, factors = noise_images(), uniform(0, 2, 24, 4)
    rest = (1 - factors[:, operation])[:, None, None, None]
    weights = [rest * (operation == 1), rest * (operation == 2)]
    result = images.clone()
    augment._blend_(result, factors[:, operation, None, None, None], *weights)
    assert_close(result, apply_each(lambda image, values: adjust(image, values, [operation]), images, factors), 1e-6)


def test_hue_equals_torchvision():
    images, turns = noise_images(), uniform(-0.5, 0.5, 24)
    turns[:3] = torch.tensor([-0.5, 0.0, 0.5])
    result = images.clone()
    augment._shift_hue_(result, turns[:, None, None, None])
    assert_close(result, apply_each(lambda image, turn: TF.adjust_hue(image, turn.item()), images, turns), 1e-5)
    assert result.min() >= 0 and result.max() <= 1


def test_color_jitter_equals_torchvision_in_all_orders():
    orders = np.array(list(itertools.permutations(range(4))))
    images, factors = noise_images(), torch.cat([uniform(0.5, 1.5, 24, 3), uniform(-0.5, 0.5, 24, 1)], 1)
    expected = apply_each(adjust, images, factors, orders)
    assert (expected[1:] - apply_each(adjust, images, factors, orders[::-1])[1:]).abs().amax((1, 2, 3)).min() > 1e-3
    assert_close(augment.color_jitter(images, factors, orders), expected, 1e-5)

    mask = np.arange(24) % 3 > 0
    result = augment.color_jitter(images, factors, orders, mask)
    assert_close(result[mask], expected[mask], 1e-5)
    assert_close(result[~mask], images[~mask], 0)
    assert_close(augment.color_jitter(images, factors, orders, np.zeros(24, bool)), images, 0)


def where_mask(operation):
    return lambda image, masked, *values: operation(image, *values) if masked else image


def test_grayscale_equals_torchvision():
    images, mask = noise_images(), torch.arange(24) % 3 > 0
    expected = apply_each(where_mask(lambda image: TF.rgb_to_grayscale(image, 3)), images, mask)
    assert_close(augment.grayscale(images, mask), expected, 1e-6)


@pytest.mark.parametrize(
    ("height", "width", "kernel_size", "used"),
    [(32, 32, None, 3), (32, 48, 7, 7), (16, 16, None, 3), (64, 80, None, 7), (24, 24, 23, 23)],
)
def test_gaussian_blur_equals_torchvision(height, width, kernel_size, used):
    images, mask, sigmas = noise_images(24, height, width), torch.arange(24) % 3 > 0, uniform(0.1, 2.0, 24)
    blur = where_mask(lambda image, sigma: TF.gaussian_blur(image, [used, used], [sigma.item()] * 2))
    expected = apply_each(blur, images, mask, sigmas)
    assert_close(augment.gaussian_blur(images, sigmas, mask, kernel_size), expected, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(augment.gaussian_blur(images, sigmas, mask, kernel_size), expected, 1e-6)


def test_random_boxes_have_the_distribution_of_torchvision():
    """Moments of area, log aspect ratio and position agree within five standard errors of their difference."""
    shape, settings = (32, 40), ((0.2, 1.0), (0.6, 1.4))
    boxes = augment.random_boxes(SampleRNG(0, "boxes", 0, 40_000), *shape, *settings).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, *shape)
        reference = [T.RandomResizedCrop.get_params(image, *map(list, settings)) for _ in range(8_000)]

    def statistics(boxes):
        top, left, height, width = boxes.double().unbind(1)
        centres = (top + height / 2) / shape[0], (left + width / 2) / shape[1]
        values = torch.stack([height * width / math.prod(shape), (width / height).log(), *centres])
        return torch.cat([values, values**2, (values[:1] * values[1:2])])

    drawn, expected = statistics(boxes), statistics(torch.tensor(reference))
    error = (drawn.var(1) / drawn.shape[1] + expected.var(1) / expected.shape[1]).sqrt()
    assert ((drawn.mean(1) - expected.mean(1)).abs() < 5 * error).all()

    top, left, height, width = boxes.unbind(1)
    assert boxes.equal(boxes.round()) and top.min() == 0 and left.min() == 0 and height.min() > 0 and width.min() > 0
    assert (top + height).max() == shape[0] and (left + width).max() == shape[1]


@pytest.mark.parametrize(
    ("shape", "scale", "ratio"),
    [((34, 32), (1, 1), (3, 4)), ((32, 34), (1, 1), (1 / 4, 1 / 3)), ((20, 24), (2, 2), (3 / 4, 4 / 3))],
)
def test_if_no_box_fits_the_fallback_is_torchvisions_central_box(shape, scale, ratio):
    expected = T.RandomResizedCrop.get_params(torch.empty(3, *shape), list(scale), list(ratio))
    boxes = augment.random_boxes(SampleRNG(0, "boxes", 0, 8), *shape, scale, ratio)
    assert boxes.tolist() == [list(expected)] * 8


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_strength_controls_its_operation(name):
    """With one non-zero strength, the factor computed back from the image is uniform in its range."""
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
def test_random_operations_change_the_expected_share_of_images(operation, share):
    images = uniform(0, 1, 1, 3, 20, 20).expand(2000, 3, 20, 20)
    changed = (operation(images, SampleRNG(0, "view", 0, 2000)) != images).any((1, 2, 3))
    assert abs(changed.float().mean() - share) < 5 * math.sqrt(share * (1 - share) / 2000)
    for probability in 0.0, 1.0:
        result = operation(images[:50], SampleRNG(0, "view", 0, 50), probability=probability)
        assert (result != images[:50]).any((1, 2, 3)).float().mean() == probability


def test_half_of_the_images_are_flipped():
    image = torch.linspace(0, 1, 32).expand(2000, 3, 32, 32)
    result = augment.random_resized_crop(image, SampleRNG(0, "view", 0, 2000))[:, 0, 16]
    flipped = result[:, 8] > result[:, 24]
    assert abs(flipped.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(2000)


@all_random_operations
def test_each_image_gets_separate_random_parameters(operation):
    images = uniform(0, 1, 1, 3, 32, 32).expand(32, 3, 32, 32)
    different = len(operation(images, SampleRNG(0, "view", 0, 32)).flatten(1).unique(dim=0))
    assert different == 2 if operation is RANDOM["gray"] else different > 10


@all_random_operations
def test_result_depends_only_on_seed_purpose_and_step_and_the_input_is_unchanged(operation):
    images = noise_images()
    before = images.clone()
    first = operation(images, SampleRNG(0, "view", 7, 24))
    assert_close(operation(images, SampleRNG(0, "view", 7, 24)), first, 0)
    assert images.equal(before) and first.data_ptr() != images.data_ptr()
    for other in (SampleRNG(0, "view", 8, 24), SampleRNG(0, "second view", 7, 24), SampleRNG(1, "view", 7, 24)):
        assert not operation(images, other).equal(first)


@all_random_operations
def test_two_half_batches_equal_the_full_batch(operation):
    images = noise_images()
    full = operation(images, SampleRNG(0, "view", 7, 24))
    halves = [operation(images[rows], SampleRNG(0, "view", 7, 24, rows)) for rows in (slice(0, 12), slice(12, 24))]
    assert_close(torch.cat(halves), full, 1e-6)


@all_random_operations
def test_runs_on_cuda_without_host_device_synchronisation(fake_gpu, operation):
    images = torch.empty(6, 3, 32, 32, device="cuda")
    result = operation(images, SampleRNG(0, "view", 0, 6))
    assert result.device.type == "cuda" and result.dtype == torch.float32 and result.shape[:2] == (6, 3)


def test_crop_of_uint8_images_runs_on_cuda(fake_gpu):
    images = torch.empty(6, 3, 32, 32, dtype=torch.uint8, device="cuda")
    assert RANDOM["crop"](images, SampleRNG(0, "view", 0, 6)).dtype == torch.float32


def test_fake_gpu_detects_a_boolean_mask_that_synchronises(fake_gpu):
    images = torch.empty(6, 3, 32, 32, device="cuda")
    with pytest.raises(DynamicOutputShapeException):
        images[torch.empty(6, device="cuda") < 0.5]
