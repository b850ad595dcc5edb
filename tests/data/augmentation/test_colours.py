"""Operations on pixels: those of torchvision to the bit, in any batch, in the drawn frequencies."""

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
import torchvision.transforms.v2 as v2
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from on_other_device import on_other_device
from torch import Tensor

from kd_lightning.data.augmentation.colours import ColourPlan, Stages, apply_colours, draw_colours, plan_calls
from kd_lightning.data.augmentation.settings import Augmentation

few = settings(max_examples=10, deadline=None, derandomize=True, database=None)
EVERYTHING: dict[str, Any] = {
    "rand_augment": 2,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "grey": 0.3,
    "blur": 0.5,
}


def pictures(count: int, *, channels: int = 3, height: int = 24, width: int = 30) -> Tensor:
    """Return smooth images with noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, channels, 4, 4, generator=generator) * 230
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return (smooth + 25 * torch.rand(smooth.shape, generator=generator)).to(torch.uint8)


def draw(samples: Tensor, *, seed: int = 0, view: int = 3, **given: Any) -> ColourPlan:
    plan = draw_colours(samples, augmentation=Augmentation.resolve(given, Augmentation()), seed=seed, view=view)
    assert plan is not None
    return plan


def operations_of(plan: ColourPlan) -> list[dict[int, tuple[str, float]]]:
    """Return the operation on each row, for each stage."""
    stages, layout = [], torch.arange(plan.orders.shape[1])
    for order, calls in zip(plan.orders[:-1], plan.stages.calls, strict=True):
        layout = layout[order]
        stages.append(
            {row: (call.name, call.strength) for call in calls for row in layout[call.start : call.end].tolist()}
        )
    assert torch.equal(layout[plan.orders[-1]], torch.arange(len(layout)))
    return stages


# --- pixels


@pytest.mark.parametrize("preset", ["standard", "strong"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_changed_alike_in_every_batch(preset: str, channels: int) -> None:
    images, samples = pictures(40, channels=channels), torch.arange(40) + 100
    whole = apply_colours(images, draw(samples, preset=preset))
    assert (whole != images).flatten(1).any(1).float().mean() > 0.5
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(apply_colours(images[order], draw(samples[order], preset=preset)), whole[order])
    for row in range(0, 40, 7):
        alone = apply_colours(images[row : row + 1], draw(samples[row : row + 1], preset=preset))
        assert torch.equal(alone[0], whole[row])


@few
@given(rows=st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True), channels=st.sampled_from([1, 3]))
def test_all_operations_together_do_not_depend_on_the_batch(rows: list[int], channels: int) -> None:
    images = pictures(12, channels=channels)
    whole = apply_colours(images, draw(torch.arange(12), **EVERYTHING))
    assert torch.equal(apply_colours(images[rows], draw(torch.tensor(rows), **EVERYTHING)), whole[rows])


def test_images_are_not_changed_in_place() -> None:
    images = pictures(8)
    before = images.clone()
    apply_colours(images, draw(torch.arange(8), preset="strong"))
    assert torch.equal(images, before)


def test_the_mean_level_of_a_large_image_is_exact() -> None:
    """With torchvision's float32 sum one or none of these is at 199, by the number of threads and the batch."""
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([torch.randperm(520 * 520, generator=generator) for _ in range(24)])
    images = (199 + 2 * (shuffled % 2)).to(torch.uint8).view(24, 1, 520, 520)
    assert (apply_colours(images, plan_calls([[("contrast", 0.0)] * 24], 24)) == 200).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (6, 1), (2, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_few_pixels_pass_through_all_operations(size: tuple[int, int], channels: int) -> None:
    images, samples = (
        pictures(8, channels=channels, height=size[0], width=size[1]).repeat(40, 1, 1, 1),
        torch.arange(320),
    )
    for policy in ({"trivial_augment": True, "rand_augment": 0}, {}):
        changed = apply_colours(images, draw(samples, **EVERYTHING | policy), scale=2.0)
        assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)
    one_level = torch.full_like(images, 99)
    assert torch.equal(apply_colours(one_level, plan_calls([[("blur", 2.0)] * 320], 320)), one_level)


@pytest.mark.parametrize("default", [torch.float32, torch.float64, torch.bfloat16])
def test_pixels_do_not_depend_on_the_precision_of_the_training_around_them(default: torch.dtype) -> None:
    images, samples = pictures(60), torch.arange(60)
    expected = apply_colours(images, draw(samples, **EVERYTHING))
    try:
        torch.set_default_dtype(default)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(apply_colours(images, draw(samples, **EVERYTHING)), expected)
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)


TRIVIAL = v2.TrivialAugmentWide()
RAND = v2.RandAugment()
NAMES = {
    "ShearX": "shear x",
    "ShearY": "shear y",
    "TranslateX": "translate x",
    "TranslateY": "translate y",
    "Rotate": "rotate",
    "Brightness": "brightness",
    "Color": "saturation",
    "Contrast": "contrast",
    "Sharpness": "sharpness",
    "Posterize": "posterize",
    "Solarize": "solarize",
    "AutoContrast": "autocontrast",
    "Equalize": "equalize",
}


def torchvision_space(policy: v2.TrivialAugmentWide | v2.RandAugment, size: int) -> dict[str, list[float]]:
    """Return torchvision's strengths of each operation, as they are given to its functions."""
    found = {}
    for name, (strengths, signed) in policy._AUGMENTATION_SPACE.items():
        by_bin = strengths(31, size, size)
        values = [0.0] if by_bin is None else by_bin.tolist()
        found[name] = sorted({*values, *(-value for value in values if signed)})
    return found


@pytest.mark.parametrize("policy", [TRIVIAL, RAND])
def test_every_strength_gives_the_pixels_of_torchvision(policy: v2.TrivialAugmentWide | v2.RandAugment) -> None:
    image = pictures(1)
    relative = policy is RAND
    for name, strengths in torchvision_space(policy, size=1 if relative else 24).items():
        if name == "Identity":
            continue
        for strength in strengths[:: max(1, len(strengths) // 6)]:
            shift = relative and name.startswith("Translate")
            own = ("relative " if shift else "") + NAMES[name]
            scaled = strength * (image.shape[3] if name == "TranslateX" else image.shape[2]) if shift else strength
            expected = policy._apply_image_or_video_transform(image, name, scaled, interpolation="nearest", fill={})
            factor = 1 + strength if NAMES[name] in ("brightness", "saturation", "contrast", "sharpness") else strength
            found = apply_colours(image, plan_calls([[(own, factor)]], 1))
            assert torch.equal(found, expected), (name, strength)


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (("hue", 0.07), lambda image: F.adjust_hue(image, 0.07)),
        (("grey", 0.0), lambda image: F.rgb_to_grayscale(image, num_output_channels=3)),
        (("blur", 1.3), lambda image: F.gaussian_blur(image, [3, 3], [1.3, 1.3])),
        (("brightness", 0.8), lambda image: F.adjust_brightness(image, 0.8)),
        (("contrast", 1.2), lambda image: F.adjust_contrast(image, 1.2)),
        (("contrast", 0.0), lambda image: F.adjust_contrast(image, 0.0)),
        (("saturation", 0.6), lambda image: F.adjust_saturation(image, 0.6)),
    ],
)
def test_other_operations_have_the_pixels_of_torchvision(operation: tuple[str, float], expected: object) -> None:
    image = pictures(1)
    assert callable(expected)
    assert torch.equal(apply_colours(image, plan_calls([[operation]], 1)), expected(image))


def test_shifts_are_scaled_for_the_same_views_at_another_size() -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[:, :, 8:16, 8:16] = 255
    double = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    plan = plan_calls([[("translate x", 6.0)]], 1)
    moved, moved_double = apply_colours(image, plan), apply_colours(double, plan, scale=2.0)
    assert torch.equal(moved_double, moved.repeat_interleave(2, 2).repeat_interleave(2, 3))


# --- what is drawn


def test_trivial_augment_draws_torchvisions_distribution() -> None:
    (drawn,) = operations_of(draw(torch.arange(30_000), trivial_augment=True))
    space = torchvision_space(TRIVIAL, size=24)
    counts = Counter(name for name, _ in drawn.values())
    counts["identity"] = 30_000 - len(drawn)
    assert len(counts) == len(space) == 14
    assert all(abs(count - 30_000 / 14) < 5 * (30_000 / 14) ** 0.5 for count in counts.values())
    for theirs, ours in NAMES.items():
        strengths = torch.tensor([strength for name, strength in drawn.values() if name == ours]).double()
        shifted = ours in ("brightness", "saturation", "contrast", "sharpness")
        _, signed = TRIVIAL._AUGMENTATION_SPACE[theirs]
        by_bin = TRIVIAL._AUGMENTATION_SPACE[theirs][0](31, 24, 24)
        expected = torch.zeros(1) if by_bin is None else torch.cat([by_bin, -by_bin] if signed else [by_bin])
        expected = expected.double() + shifted
        spread = float(expected.std(unbiased=False))
        assert abs(strengths.mean() - expected.mean()) <= 5 * spread / len(strengths) ** 0.5
        assert abs(strengths.std() - spread) <= 0.06 * spread
        assert {round(value, 6) for value in strengths.tolist()} <= {round(value, 6) for value in expected.tolist()}


def test_rand_augment_draws_each_operation_independently_with_one_magnitude() -> None:
    first, second = operations_of(draw(torch.arange(20_000), rand_augment=2, magnitude=9))
    names = sorted({name for name, _ in first.values()})
    assert len(names) == 13
    pairs = Counter((first.get(row, ("",))[0], second.get(row, ("",))[0]) for row in range(20_000))
    assert len(pairs) == 14**2
    assert max(pairs.values()) < 20_000 / 14**2 + 6 * (20_000 / 14**2) ** 0.5
    assert {abs(strength) for name, strength in first.values() if name == "rotate"} == {9.0}
    assert len({strength for name, strength in first.values() if name == "rotate"}) == 2


@pytest.mark.parametrize(
    ("name", "low", "high"), [("brightness", 0.6, 1.4), ("contrast", 0.0, 2.5), ("hue", -0.4, 0.4)]
)
def test_factors_are_uniform_in_sixteen_steps(name: str, low: float, high: float) -> None:
    largest: dict[str, Any] = {name: high if name == "hue" else high - 1}
    (drawn,) = operations_of(draw(torch.arange(20_000), **largest))
    values = torch.tensor([strength for _, strength in drawn.values()]).double()
    assert len(values) == 20_000
    assert len(values.unique()) == 16
    assert low < values.min()
    assert values.max() < high
    assert abs(values.mean() - (low + high) / 2) < 0.01 * (high - low)
    assert abs(values.var() - (high - low) ** 2 / 12) < 0.02 * (high - low) ** 2


@pytest.mark.parametrize("name", ["grey", "blur"])
def test_probabilities_are_those_that_are_set(name: str) -> None:
    probability: dict[str, Any] = {name: 0.2}
    (drawn,) = operations_of(draw(torch.arange(20_000), **probability))
    assert abs(len(drawn) / 20_000 - 0.2) < 0.015


def test_other_seeds_and_views_draw_other_operations() -> None:
    samples = torch.arange(300)
    (first,) = operations_of(draw(samples, trivial_augment=True))
    for other in ({"seed": 1}, {"view": 4}):
        (second,) = operations_of(draw(samples, trivial_augment=True, **other))
        assert sum(first.get(row) != second.get(row) for row in range(300)) > 250


def test_nothing_is_planned_where_nothing_is_on() -> None:
    settings = Augmentation.resolve({"preset": "light"}, Augmentation())
    assert draw_colours(torch.arange(4), augmentation=settings, seed=0, view=0) is None


# --- devices


def test_equal_operations_share_a_call() -> None:
    plan = plan_calls([[("invert", 0.0), None, ("grey", 0.0), ("invert", 0.0)]], 4)
    assert [(call.name, call.end - call.start) for call in plan.stages.calls[0]] == [("invert", 2), ("grey", 1)]
    assert inspect.isclass(Stages)
    assert not isinstance(plan.stages, tuple | list | dict)  # which a transfer to a device would walk through


@on_other_device
def test_colours_are_changed_on_their_device() -> None:
    images = pictures(6)
    plan = draw(torch.arange(6), brightness=0.4, trivial_augment=True)
    there = plan._replace(orders=plan.orders.to("other"))
    found = apply_colours(images.to("other"), there)
    assert found.device.type == "other"
    assert torch.equal(found.cpu(), apply_colours(images, plan))


GREY_LEVELS_MOVE = ("brightness", "contrast", "saturation", "sharpness", "hue", "autocontrast", "blur")
ALL_OPERATIONS: list[tuple[str, float]] = [
    *((name, 1.4) for name in ("brightness", "contrast", "saturation", "sharpness")),
    *(("hue", 0.07), ("autocontrast", 0.0), ("blur", 1.3), ("equalize", 0.0), ("grey", 0.0)),
    *(("posterize", 4.0), ("solarize", 0.4), ("translate x", 5.0), ("relative translate y", -0.2)),
    *(("shear x", 0.3), ("shear y", -0.3), ("rotate", 33.0)),
]


def on_gpu(plan: ColourPlan) -> ColourPlan:
    return plan._replace(orders=plan.orders.cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("operation", ALL_OPERATIONS)
@pytest.mark.parametrize(("channels", "side"), [(3, 160), (1, 300)])
def test_a_gpu_gives_the_pixels_of_a_cpu_in_every_batch(operation: tuple[str, float], channels: int, side: int) -> None:
    images = pictures(20, channels=channels, height=side, width=side)
    there = images.cuda()
    found = apply_colours(there, on_gpu(plan_calls([[operation] * 20], 20)))
    expected = apply_colours(images, plan_calls([[operation] * 20], 20))
    name, _ = operation
    if name in ("posterize", "solarize", "equalize", "grey"):
        assert torch.equal(found.cpu(), expected)
    differs = (found.cpu().int() - expected.int()).abs()
    if name in GREY_LEVELS_MOVE:
        assert differs.max() <= 1
    assert (differs > 0).float().mean() < 1e-3
    for rows in ([3], [5, 4, 19, 0, 11]):
        part = apply_colours(there[rows], on_gpu(plan_calls([[operation] * len(rows)], len(rows))))
        assert torch.equal(part, found[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["standard", "strong"])
def test_a_gpu_gives_the_same_pixels_under_autocast_and_with_deterministic_algorithms(preset: str) -> None:
    images, plan = pictures(100).cuda(), on_gpu(draw(torch.arange(100), preset=preset))
    expected = apply_colours(images, plan)
    try:
        torch.use_deterministic_algorithms(True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.equal(apply_colours(images, plan), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("operation", ALL_OPERATIONS)
def test_no_operation_waits_for_the_gpu(operation: tuple[str, float]) -> None:
    images, plan = pictures(6).cuda(), on_gpu(plan_calls([[operation] * 6], 6))
    expected = apply_colours(images, plan)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = apply_colours(images, plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_a_gpu_differs_by_at_most_one_grey_level_whatever_the_precision_of_products() -> None:
    images = pictures(200)
    plan = draw(torch.arange(200), **EVERYTHING)
    expected = apply_colours(images, plan).int()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = apply_colours(images.cuda(), plan._replace(orders=plan.orders.cuda())).cpu().int()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert ((found - expected).abs() > 1).float().mean() < 0.01  # later operations enlarge a level of difference
