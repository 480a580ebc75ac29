#!/usr/bin/env bash
# Installs requirements.txt, with JAX for this machine's accelerator, and other packages:
#   bash launch/install.sh PYTHON [PACKAGE...]
# PRINT=1 prints the list and installs nothing.
set -euo pipefail
python="$1"
shift

jax=jax
if driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null)"; then
  # CUDA 13 needs driver 580 or newer.
  if [ "${driver%%.*}" -ge 580 ]; then jax='jax[cuda13]'; else jax='jax[cuda12]'; fi
elif compgen -G '/dev/accel[0-9]*' >/dev/null || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
  jax='jax[tpu]'
fi
list="$(mktemp)"
trap 'rm -f "$list"' EXIT
sed "s/^jax>/$jax>/" "$(dirname "${BASH_SOURCE[0]}")/../requirements.txt" >"$list"
printf '%s\n' "$@" >>"$list"
if [ -n "${PRINT:-}" ]; then
  cat "$list"
else
  "$python" -m pip install --quiet --disable-pip-version-check -r "$list"
fi
