#!/usr/bin/env bash
# Sets up the environment and runs the tests. Arguments are passed on to pytest, such as
# -m slow for the long ones or tests/test_sit.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
echo "tests: python -m pytest $*"
exec .venv/bin/python -m pytest "$@"
