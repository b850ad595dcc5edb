"""A training step launches few operations beside those of the networks."""

import importlib
from typing import Any

import pytest
from mostly_slow import mostly_slow

from kd_lightning import DistillationModule, TeacherModule, networks

pytestmark = pytest.mark.usefixtures("beside_the_scripts")
IMAGES = {"batch_size": 32, "count": 320}


def module_of(name: str) -> tuple[Any, int | None]:
    if name == "student alone":
        return TeacherModule(networks.resnet20()), None
    cached = name == "cached"
    options: dict[str, Any] = {"teacher_check": "off", "teacher_cache": cached}
    return DistillationModule(networks.resnet20(), networks.resnet34(), **options), 1 if cached else None


@pytest.mark.parametrize("labelled", mostly_slow([True, False], True))
@pytest.mark.parametrize(("name", "bound"), [("student alone", 20), ("cached", 44), ("online", 132)])
def test_a_step_adds_few_operations_to_a_hand_written_one(name: str, bound: int, labelled: bool) -> None:
    counting, random_images = (importlib.import_module(module) for module in ("count_operations", "random_images"))
    module, views = module_of(name)
    data = random_images.RandomImages(views=views, **IMAGES)
    if not labelled:
        data.setup("fit")
        data.splits["train"].labels[::5] = -1
        bound += 8
    raw = counting.count_of_raw_loop(batch_size=32)
    counts = counting.count_of_fit(module, data)
    extra = counts - raw
    assert counts.total() <= raw.total() + bound, sorted(extra.items())
    assert module.all_labelled is labelled
