"""Records how a data module was built."""

import lightning.pytorch as pl

from kd_lightning.checkpoints.trust import unserializable


def save_arguments(data: pl.LightningDataModule, **arguments: object) -> None:
    """Record constructor arguments in ``data.hparams``, which Lightning puts into checkpoints.

    Args:
        data: The data module under construction.
        **arguments: Its arguments as plain data. On the command line, the plain text of all arguments is recorded.
    """
    if unserializable(*arguments):
        data.save_hyperparameters(arguments)
    else:
        data.save_hyperparameters()
