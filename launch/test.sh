#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments are passed on to pytest, such as
# -m slow for the long ones or tests/test_sit.py. PARITY=1 installs the originals too
# that some networks are compared with (tests/requirements.txt); without them these
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
echo "tests: python -m pytest $*"
exec .venv/bin/python -m pytest "$@"
