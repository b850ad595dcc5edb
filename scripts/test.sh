#!/usr/bin/env bash
# Creates a fresh environment (.venv-test), installs the package with its test extra, and runs lint, type checks and
# tests, on a GPU too if there is one. `--all` adds the slow tests. PYTHON names the interpreter (3.11 to 3.13); other
# arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

slow=" and not slow"
if [ "${1:-}" = "--all" ]; then
    slow=""
    shift
fi
python=.venv-test/bin/python

echo "== A fresh environment in .venv-test"
rm -rf .venv-test
"${PYTHON:-python3}" -m venv .venv-test
$python -m pip install --quiet --upgrade pip
$python -m pip install --quiet ".[test]"
# test the sources of this checkout, not the installed copy
$python -m pip uninstall --quiet --yes kd-lightning
$python -m pip install --quiet --no-deps --editable .

echo "== Lint"
.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .

echo "== Types"
.venv-test/bin/mypy
.venv-test/bin/mypy --config-file tests/mypy.ini

ran="lint, types, tests on the CPU"
if gpu=$($python -c "import torch; print(torch.cuda.get_device_name())" 2> /dev/null); then
    echo "== Tests on the GPU ($gpu)"
    $python -m pytest -q -m "gpu$slow" "$@" || [ $? = 5 ] # 5: none of the named tests is one of these
    ran="$ran, tests on the GPU ($gpu)"
else
    ran="$ran; not the tests of -m gpu, since there is no CUDA device"
fi
[ -n "$slow" ] && ran="$ran; not the slow tests (--all runs them)"

echo "== Tests on the CPU"
$python -m pytest -q -n 2 -m "not gpu$slow" "$@"
echo "== Ran $ran"
