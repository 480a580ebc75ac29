# shellcheck shell=bash
# Source this file: it creates or reuses .venv and installs requirements.txt, with JAX for
# the accelerator if there is one. PYTHON=python3.12 chooses the interpreter of a new .venv.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

if [ ! -x .venv/bin/python ]; then
  python="${PYTHON:-}"
  if [ -z "$python" ]; then
    for candidate in python3 python3.12 python3.13 python3.11 python; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python="$candidate"
        break
      fi
    done
  fi
  if [ -z "$python" ]; then
    echo "error: no Python 3.11 or newer on the PATH; install one or set PYTHON" >&2
    exit 2
  fi
  echo "environment: creating .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

# A copy of the installed list: if it has not changed, the next run starts at once.
if ! cmp -s requirements.txt .venv/installed-requirements.txt; then
  echo "environment: installing requirements.txt into .venv (a minute or two)"
  bash launch/install.sh .venv/bin/python
  cp requirements.txt .venv/installed-requirements.txt
fi
echo "environment: $(.venv/bin/python --version), JAX $(.venv/bin/python -c \
  'import importlib.metadata; print(importlib.metadata.version("jax"))')"
