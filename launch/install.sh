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

# One line for each file that pip gets, with its size, and one for the installation.
show_progress() {
  local line name words
  while IFS= read -r line; do
    case "$line" in
      *.metadata*) ;;
      *' Downloading '* | *' Using cached '*)
        line="${line#*Downloading }"
        line="${line#*Using cached }"
        name="${line%% (*}"
        line="${line#"$name"}"
        name="${name##*/}"
        echo "  ${name%%-*}$line"
        ;;
      'Installing collected packages: '*)
        read -ra words <<<"${line#*: }"
        echo "  installing ${#words[@]} packages"
        ;;
    esac
  done
}

list="$(mktemp)"
trap 'rm -f "$list"' EXIT
sed "s/^jax>/$jax>/" "$(dirname "${BASH_SOURCE[0]}")/../requirements.txt" >"$list"
printf '%s\n' "$@" >>"$list"
if [ -n "${PRINT:-}" ]; then
  cat "$list"
else
  # pip warns of every package that one of several local indices does not have.
  "$python" -m pip install --disable-pip-version-check --root-user-action=ignore \
    --progress-bar=off -r "$list" 2> >(grep -v '^WARNING: Location' >&2) | show_progress
fi
