#!/usr/bin/env bash
# Sets up the environment and trains the demonstration: about twelve minutes on two cores.
# Takes flags of ism_jax.train, such as --config.train.steps=500 or --workdir=runs/other.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
echo "training: python -m ism_jax.train --config configs/quickstart.py $*"
exec .venv/bin/python -m ism_jax.train --config configs/quickstart.py "$@"
