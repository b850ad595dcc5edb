"""Runs the command line: ``python -m kd_lightning``."""

from kd_lightning.cli.main import main

if __name__ == "__main__":
    main()
