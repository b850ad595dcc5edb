import pytest
import torch

from kd_lightning.callbacks.confusion_figure import confusion_figure


def test_rows_are_shown_in_per_cent_of_their_class() -> None:
    counts = torch.tensor([[6, 2, 0], [0, 0, 0], [1, 1, 1]])  # no image of the second class
    (axes,) = confusion_figure(counts, classes=["a", "$_{$", "c"]).axes
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    rows = [[shown[column, row] for column in range(3)] for row in range(3)]
    assert rows == [["75", "25", "0"], ["0", "0", "0"], ["33", "33", "33"]]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["a", "$_{$", "c"]


@pytest.mark.parametrize(("count", "numbers"), [(2, 4), (20, 400), (21, 0), (300, 0)])
def test_many_classes_have_colours_only_and_the_picture_stays_small(count: int, numbers: int) -> None:
    figure = confusion_figure(torch.eye(count), classes=[f"{i}" for i in range(count)])
    (axes,) = figure.axes
    assert len(axes.texts) == numbers
    assert max(figure.get_size_inches()) <= 41
    assert axes.images[0].get_clim() == (0, 100)  # so that pictures can be compared


def test_names_are_drawn_literally() -> None:
    confusion_figure(torch.eye(2), classes=["$_{$", r"$\frac$"]).canvas.draw()  # not mathematics, which would fail
