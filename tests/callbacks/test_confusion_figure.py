import pytest
import torch

from kd_lightning.callbacks.confusion_figure import confusion_figure


def test_cells_show_percentages_of_each_row() -> None:
    counts = torch.tensor([[6, 2, 0], [0, 0, 0], [1, 1, 1]])  # no image of the second class
    (axes,) = confusion_figure(counts, classes=["a", "$_{$", "c"]).axes
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    rows = [[shown[column, row] for column in range(3)] for row in range(3)]
    assert rows == [["75", "25", "0"], ["0", "0", "0"], ["33", "33", "33"]]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a", "$_{$", "c"]


@pytest.mark.parametrize(("count", "numbers"), [(2, 4), (20, 400), (21, 0), (300, 0)])
def test_above_20_classes_cells_have_no_numbers_and_the_figure_size_is_limited(count: int, numbers: int) -> None:
    figure = confusion_figure(torch.eye(count), classes=[f"{i}" for i in range(count)])
    (axes,) = figure.axes
    assert len(axes.texts) == numbers
    assert max(figure.get_size_inches()) <= 41
    assert axes.images[0].get_clim() == (0, 100)  # the same colours in every figure


def test_class_names_are_not_parsed_as_mathtext() -> None:
    confusion_figure(torch.eye(2), classes=["$_{$", r"$\frac$"]).canvas.draw()  # invalid mathtext would raise
