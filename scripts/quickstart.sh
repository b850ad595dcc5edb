#!/usr/bin/env bash
# Creates .venv and installs the package; then scripts/quickstart.py trains a teacher, a student without it and a distilled
# student on scikit-learn's handwritten digits, three times each, and prints what distillation gains.
# PYTHON names the interpreter (3.11 to 3.13). It can be run again: each time its results get a folder of their own.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "Installing into .venv (a few minutes the first time, and 6 GB where PyTorch brings CUDA along)"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip
.venv/bin/python -m pip install --quiet --disable-pip-version-check '.[prune,export]'

device=$(.venv/bin/python -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'the CPU')")
echo "Training on $device"
exec .venv/bin/python scripts/quickstart.py "$@"
