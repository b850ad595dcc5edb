#!/usr/bin/env bash
# Makes a fresh environment (.venv-test), installs the package with its test extra, and runs lint, types and tests.
# PYTHON names the interpreter (3.11 to 3.13); arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "== A fresh environment in .venv-test"
rm -rf .venv-test
"${PYTHON:-python3}" -m venv .venv-test
.venv-test/bin/python -m pip install --quiet --upgrade pip
.venv-test/bin/python -m pip install --quiet ".[test]"
# the tests run on the sources beside them, not on the installed copy
.venv-test/bin/python -m pip uninstall --quiet --yes kd-lightning
.venv-test/bin/python -m pip install --quiet --no-deps --editable .

echo "== Lint"
.venv-test/bin/ruff check .
.venv-test/bin/ruff format --check .

echo "== Types"
.venv-test/bin/mypy

echo "== Tests"
.venv-test/bin/python -m pytest -q "$@"
