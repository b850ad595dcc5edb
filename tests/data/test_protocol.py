"""Which data modules fulfil the protocols."""

import lightning.pytorch as pl
import pytest

from kd_lightning import DigitsDataModule, DomainPairDataModule, ImageFolderDataModule
from kd_lightning.data.protocol import ImageData, ViewData, has_fixed_views, is_image_data


def test_single_and_paired_data_modules_fulfil_the_protocol() -> None:
    digits: ImageData = DigitsDataModule(views=2)
    pair: ImageData = DomainPairDataModule(DigitsDataModule(), DigitsDataModule())
    assert is_image_data(digits)
    assert is_image_data(pair)
    assert not has_fixed_views(pair)
    assert has_fixed_views(digits)
    with_views: ViewData = digits
    assert with_views.views == 2


@pytest.mark.parametrize("data", [None, pl.LightningDataModule()])
def test_other_data_modules_do_not_fulfil_the_protocol(data: object) -> None:
    assert not is_image_data(data)
    assert not has_fixed_views(data)


def test_the_check_reads_no_images() -> None:
    assert is_image_data(ImageFolderDataModule("nowhere"))
