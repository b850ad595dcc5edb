#!/usr/bin/env bash
# Creates .venv and installs the package; then trains a teacher, a student without it and a distilled student on
# scikit-learn's handwritten digits, tests all three, prints a table, exports the student and writes an HTML report.
# PYTHON names the interpreter (3.11 to 3.13). It can be run again: each training run has its own folder.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "== Installing into .venv (a few minutes the first time)"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --upgrade pip
.venv/bin/python -m pip install --quiet '.[export]'

device=$(.venv/bin/python -c "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'the CPU')")
echo "== Training on $device"
for recipe in digits/teacher digits/student digits/distill; do
    echo "== kd-lightning fit -c $recipe"
    .venv/bin/kd-lightning fit -c "$recipe" --trainer.enable_model_summary false
done
for recipe in digits/teacher digits/student digits/distill; do
    echo "== kd-lightning test -c $recipe"
    .venv/bin/kd-lightning test -c "$recipe"
done
echo "== kd-lightning compare"
.venv/bin/kd-lightning compare digits/teacher digits/student digits/distill --output lightning_logs/quickstart.md
echo "== kd-lightning export and report"
.venv/bin/kd-lightning export digits/distill -o lightning_logs/student.onnx
.venv/bin/kd-lightning report digits/teacher digits/student digits/distill lightning_logs/student.onnx -o lightning_logs/report
echo "Watch the curves with: .venv/bin/tensorboard --logdir lightning_logs"
