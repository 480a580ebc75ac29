#!/usr/bin/env bash
# Sets up the environment and runs the tests, three files at a time, because some wait:
#
#   bash launch/test.sh                                # all, without slow tests
#   bash launch/test.sh --fast                         # without files that train networks
#   bash launch/test.sh tests/models/test_sit.py       # one file; any arguments of pytest
#   bash launch/test.sh -m slow                        # the slow tests
#   PARITY=1 bash launch/test.sh                       # all, with tests/parity.txt
#   bash launch/test.sh -m tpu_compile                 # compiles for TPUs, without any
#
# Tests mirror the package: tests/models/ is for ism_jax/models/. tests/parity.txt has the
# original networks that ours are compared with, and what the notebook and the web page
# need; without it those tests are skipped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install() { # Installs a list of packages once.
  if ! cmp -s "tests/$1" ".venv/installed-tests-$1"; then
    echo "environment: installing tests/$1 into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "tests/$1"
    cp "tests/$1" ".venv/installed-tests-$1"
  fi
}

install requirements.txt
if [ -n "${PARITY:-}" ]; then
  # Without its dependencies: torchvision would install another PyTorch.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --no-deps 'torch-fidelity>=0.4,<0.5'
  install parity.txt
fi
if [[ " $* " == *" tpu_compile "* ]]; then # libtpu of this JAX: 640 MB.
  jax="$(.venv/bin/python -c 'import jax; print(jax.__version__)')"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "jax[tpu]==$jax"
fi
parallel=(--numprocesses=3 --dist=loadfile --no-loadscope-reorder --durations=20)
if [ $# -eq 0 ]; then
  set -- "${parallel[@]}"
elif [ "$1" = --fast ]; then
  set -- "${parallel[@]}" -m 'not slow and not tpu_compile and not long' "${@:2}"
fi
echo "tests: python -m pytest $*"
exec .venv/bin/python -m pytest "$@"
