"""Which data modules are taken for this package's own."""

import lightning.pytorch as pl
import pytest

from kd_lightning import DigitsDataModule, DomainPairDataModule, ImageFolderDataModule
from kd_lightning.data.protocol import ImageData, ViewData, has_fixed_views, is_image_data


def test_both_kinds_of_data_modules_fulfil_the_protocol() -> None:
    digits: ViewData = DigitsDataModule(views=2)
    pair: ImageData = DomainPairDataModule(DigitsDataModule(), DigitsDataModule())
    assert is_image_data(digits)
    assert is_image_data(pair)
    assert has_fixed_views(digits)
    assert not has_fixed_views(pair)


@pytest.mark.parametrize("data", [None, pl.LightningDataModule()])
def test_other_data_are_not_this_packages(data: object) -> None:
    assert not is_image_data(data)
    assert not has_fixed_views(data)


def test_the_check_reads_no_image() -> None:
    assert is_image_data(ImageFolderDataModule("nowhere"))
