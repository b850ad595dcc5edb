"""Options with which tests run commands."""

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
QUICK = [
    *QUIET,
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=5",
    "--trainer.enable_model_summary=false",
]
"""Two epochs of training."""
