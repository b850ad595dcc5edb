import pytest

from kd_lightning.callbacks.bottleneck import Advice, Speed, describe_bottleneck

ADVICE = Advice(waiting=["read more"], preparing=["augment less"], steps=["compile", "cache"])


@pytest.mark.parametrize(
    ("waiting", "preparing", "named"),
    [
        (0.61, 0.1, "61% of the time spent waiting for images; to train faster, read more."),
        (0.25, 0.24, "25% of the time spent waiting for images; to train faster, read more."),
        (0.1, 0.5, "10% of the time spent waiting for images and 50% augmenting them on the CPU; to train faster, aug"),
        (0.24, 0.2, "24% of the time spent waiting for images and the rest on training steps; to train faster, compi"),
        (0.0, 0.0, "0% of the time spent waiting for images and the rest on training steps; to train faster, compile, "
                   "or cache."),
    ],
)  # fmt: skip
def test_the_part_that_settings_shorten_most_is_named(waiting: float, preparing: float, named: str) -> None:
    sentence = describe_bottleneck(Speed(1234.5, 60.0, waiting, preparing), ADVICE, epoch=2)
    assert sentence.startswith(f"1,234 images/s in epoch 2, with {named}")


@pytest.mark.parametrize(("waiting", "preparing"), [(0.9, 0.0), (0.0, 0.9), (0.0, 0.0)])
def test_without_a_setting_there_is_no_advice(waiting: float, preparing: float) -> None:
    assert "faster" not in describe_bottleneck(Speed(10.0, 60.0, waiting, preparing), Advice(), epoch=0)
