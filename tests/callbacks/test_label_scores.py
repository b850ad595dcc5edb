"""Scores of each class where an image may have several: average precision, F1, thresholds, and their tables."""

import pytest
import torch
from torch import Tensor

from kd_lightning.callbacks.label_figure import label_figure
from kd_lightning.callbacks.label_results import label_results
from kd_lightning.callbacks.label_scores import (
    choose_thresholds,
    describe_unchosen,
    label_scores,
    resampled_map,
    shuffled_map,
)
from kd_lightning.cli.class_table import print_label_table


def made(count: int, *, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits and labels, in which the class with the highest number is the rarest."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0.6, 0.05, classes)
    labels = (torch.rand(count, classes, generator=generator) < share).float()
    return labels + torch.randn(count, classes, generator=generator), labels


def best_f1(logits: Tensor, labels: Tensor) -> float:
    """Return the highest F1 of any threshold."""
    cuts = torch.cat([logits - 1e-6, logits + 1e-6])
    given = logits > cuts[:, None]
    right = (given & (labels == 1)).sum(1)
    return float((2 * right / (given.sum(1) + labels.sum())).max())


def test_thresholds_give_the_highest_f1() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (12, 50, 300):
        labels = (torch.rand(count, 4, generator=generator) < torch.tensor([0.5, 0.45, 0.7, 0.5])).float()
        logits = labels + torch.randn(count, 4, generator=generator) - torch.tensor([0.0, 3.0, -2.0, 8.0])
        thresholds = choose_thresholds(logits, labels)
        scores = label_scores(logits, labels, thresholds)
        for c in range(4):
            if 5 <= labels[:, c].sum() <= count - 5:
                assert scores.f1[c].item() == pytest.approx(best_f1(logits[:, c], labels[:, c]), abs=1e-6)
            else:
                assert thresholds[c] == 0.5


def test_ties_stay_near_one_half_and_rare_classes_at_it() -> None:
    labels = torch.tensor([1.0] * 5 + [0.0] * 5)[:, None]
    assert choose_thresholds(8 * (labels - 0.5), labels).item() == 0.5  # which lies between the two
    low = torch.tensor([-2.0] * 5 + [-4.0] * 5)[:, None]
    middle = torch.tensor([-2.0, -4.0]).double().sigmoid().mean()
    torch.testing.assert_close(choose_thresholds(low, labels)[0], middle)
    assert choose_thresholds(low[1:], labels[1:]).item() == 0.5  # four images have the class
    assert choose_thresholds(torch.zeros(0, 2), torch.zeros(0, 2)).tolist() == [0.5, 0.5]
    same = torch.zeros(10, 1)
    assert 0 <= choose_thresholds(same, labels).item() < 0.5  # all are given the class: F1 2/3
    assert label_scores(same, labels, choose_thresholds(same, labels)).f1.item() == pytest.approx(2 / 3)


def test_scores_are_those_of_torchmetrics_and_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score, f1_score

    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(60, 5, generator=generator) < 0.3).float()
    labels[:, 4] = 0
    logits = labels + torch.randn(60, 5, generator=generator)
    thresholds = torch.tensor([0.3, 0.5, 0.6, 0.7, 0.9])
    scores = label_scores(logits, labels, thresholds)
    given, has = (logits.sigmoid() > thresholds).numpy(), labels.bool().numpy()
    expected = average_precision_score(has[:, :4], logits[:, :4].numpy(), average=None)
    torch.testing.assert_close(scores.average_precision[:4].double(), torch.tensor(expected), rtol=1e-6, atol=0)
    assert scores.averages["map"].item() == pytest.approx(expected.mean(), rel=1e-6)
    assert scores.averages["f1_micro"].item() == pytest.approx(f1_score(has, given, average="micro"), rel=1e-6)
    assert scores.averages["f1_macro"].item() == pytest.approx(f1_score(has[:, :4], given[:, :4], average="macro"))


def test_a_sigmoid_that_is_saturated_keeps_the_order() -> None:
    logits = torch.arange(20.0, 30.0)[:, None]
    labels = (logits > 24.5).float()
    assert label_scores(logits, labels, torch.tensor([0.5])).average_precision.item() == 1


def test_random_orders_have_the_prevalence_as_mean_average_precision() -> None:
    logits, labels = made(400)
    shuffled = shuffled_map(logits, labels)
    assert shuffled.mean().item() == pytest.approx(labels.mean(0).mean().item(), abs=0.02)
    assert torch.equal(shuffled, shuffled_map(logits, labels))
    measured = label_scores(logits, labels, torch.full((5,), 0.5)).averages["map"]
    assert measured > shuffled.max()
    # as of torchmetrics where the order is that of the images themselves
    order = torch.linspace(5, -5, 400)[:, None].expand(-1, 5)
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    first = label_scores(order, labels[rows], torch.full((5,), 0.5)).averages["map"]
    torch.testing.assert_close(shuffled_map(order, labels, count=1)[0].float(), first, rtol=1e-5, atol=0)


def test_the_interval_of_the_mean_average_precision_becomes_narrow() -> None:
    widths = []
    for count in (50, 500):
        logits, labels = made(count)
        measured = label_scores(logits, labels, torch.full((5,), 0.5)).averages["map"]
        values = resampled_map(logits, labels)
        low, high = values.quantile(torch.tensor([0.025, 0.975]).double())
        assert low < measured < high
        widths.append((high - low).item())
    assert widths[1] < widths[0] / 2
    assert len(resampled_map(torch.randn(3, 1), torch.tensor([[1.0], [0.0], [0.0]]))) < 200  # some have no class


def test_classes_with_few_images_are_named() -> None:
    logits, labels = made(60, classes=3)
    labels[:, 1] = 0
    labels[:, 2] = 1
    scores = label_scores(logits, labels, torch.full((3,), 0.5))
    assert describe_unchosen(scores, ["a", "b", "c"]) == (
        "The thresholds of b, c stay 0.5: choosing one takes 5 validation images with the class and as many without it "
        "(there are 60 images)."
    )
    labels[:30, 1] = 1
    assert describe_unchosen(label_scores(logits, labels, torch.full((3,), 0.5)), None).startswith(
        "The threshold of 2 "
    )
    labels[:30, 2] = 0
    assert describe_unchosen(label_scores(logits, labels, torch.full((3,), 0.5)), None) == ""


def test_many_classes_are_shown_by_the_lowest(capsys: pytest.CaptureFixture[str]) -> None:
    logits, labels = made(200, classes=25)
    labels[:, 3] = 0
    scores = label_scores(logits, labels, torch.full((25,), 0.5))
    results = label_results(scores, [f"class {n}" for n in range(25)], [0.5] * 25)
    assert (results[3].average_precision, results[3].f1, results[3].recall) == (None, None, None)
    print_label_table(results)
    printed = capsys.readouterr().out
    assert "The 10 of 25 classes with the lowest average precision" in printed
    lowest = sorted((one for one in results if one.images), key=lambda one: one.average_precision or 0)
    assert [line.split("│")[1].strip() for line in printed.splitlines() if "│ class" in line] == [
        one.name for one in lowest[:10]
    ]
    (axes,) = label_figure(results).axes
    assert len(axes.get_yticks()) == 20
    assert axes.get_title().endswith("the 20 lowest of 24")
    assert label_figure([results[3]]).axes[0].get_legend() is None
