import pytest
import torch

from kd_lightning.callbacks.class_accuracy_figure import class_accuracies, class_accuracy_figure


def test_the_lowest_class_comes_first_with_its_most_frequent_mistake() -> None:
    counts = torch.tensor([[6, 2, 0], [0, 3, 0], [1, 2, 1]])
    assert class_accuracies(counts) == [(2, 0.25, 4, 1), (0, 0.75, 8, 1), (1, 1.0, 3, None)]


def test_the_mean_over_images_is_the_accuracy() -> None:
    counts = torch.randint(0, 9, (7, 7), generator=torch.Generator().manual_seed(0))
    rows = class_accuracies(counts)
    correct = sum(accuracy * count for _, accuracy, count, _ in rows)
    assert correct / counts.sum() == pytest.approx(float(counts.trace() / counts.sum()))


def test_bars_have_the_names_counts_and_mistakes_and_names_are_not_parsed_as_mathtext() -> None:
    counts = torch.tensor([[6, 2, 0], [0, 3, 0], [0, 0, 0]])  # no image of the third class
    figure = class_accuracy_figure(counts, classes=["$_{$", "a class with a very long name", "c"])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["$_{$ (8)", "a class with a ve… (3)"]
    assert [text.get_text() for text in axes.texts] == ["75.0%, most often taken for a class with a ve…", "100.0%"]
    figure.canvas.draw()


def test_of_many_classes_the_lowest_are_drawn() -> None:
    counts = torch.eye(100, dtype=torch.int64) * 4
    counts[57, 3] = 4
    figure = class_accuracy_figure(counts, classes=list(map(str, range(100))))
    (axes,) = figure.axes
    assert len(axes.patches) == 20
    assert axes.get_yticklabels()[0].get_text() == "57 (8)"
    assert "the 20 lowest of 100" in figure.get_suptitle()
