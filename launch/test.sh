#!/usr/bin/env bash
# Sets up the environment and runs the tests, two files at a time. With arguments, which
# are passed on to pytest, one after the other: tests/models/test_sit.py, or -m slow for the
# long ones. PARITY=1 installs tests/requirements.txt too: the originals that some
# networks are compared with, and what the notebook and the page need; without it their
# tests are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ -n "${PARITY:-}" ] &&
  ! cmp -s tests/requirements.txt .venv/installed-tests-requirements.txt; then
  echo "environment: installing tests/requirements.txt into .venv"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r tests/requirements.txt
  # By itself: it asks for torchvision, which would bring another PyTorch.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps 'torch-fidelity>=0.4,<0.5'
  cp tests/requirements.txt .venv/installed-tests-requirements.txt
fi
if [ $# -eq 0 ]; then
  set -- --numprocesses=2 --dist=loadfile
fi
echo "tests: python -m pytest $*"
exec .venv/bin/python -m pytest "$@"
