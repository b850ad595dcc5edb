"""What was gained, measured and drawn."""

from kd_lightning.report.command import report

__all__ = ["report"]
