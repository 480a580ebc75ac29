#!/usr/bin/env bash
# Trains on a Cloud TPU slice, one process on each of its machines:
#
#   NAME=ism ZONE=us-central2-b TYPE=v4-32 REPOSITORY=https://... SHARE=10.0.0.2:/share \
#     bash launch/tpu_pod.sh --config configs/imagenet256_ism_xl2.py --workdir runs/a
#
# Makes the slice if it is not there, sets it up, trains. SPOT=1 asks for a preemptible
# one: when it is taken away the run saves, and this script makes a new slice and goes
# on. The slice stays when the run is over; the last line says how to delete it.
#
# Needs gcloud, logged in, with the project set; REPOSITORY, which the machines clone;
# SHARE, a file server that all of them mount at /mnt/share (a Filestore instance, say):
# give --workdir and data there. VERSION is the slice's software.
set -euo pipefail
: "${NAME:?such as NAME=ism}" "${ZONE:?such as ZONE=us-central2-b}"
: "${TYPE:?such as TYPE=v4-32}" "${REPOSITORY:?address of a git repository}"
: "${SHARE:?SERVER:/FOLDER, mounted at /mnt/share}"
VERSION="${VERSION:-tpu-ubuntu2204-base}"
tpu=(gcloud compute tpus tpu-vm)

state() {
  "${tpu[@]}" describe "$NAME" --zone "$ZONE" --format='value(state)' 2>/dev/null ||
    echo MISSING
}

on_all() { "${tpu[@]}" ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }

printf -v flags '%q ' "$@"
while true; do
  case "$(state)" in
    READY) ;;
    MISSING)
      "${tpu[@]}" create "$NAME" --zone "$ZONE" --accelerator-type "$TYPE" \
        --version "$VERSION" ${SPOT:+--spot} || { sleep 60 && continue; }
      ;;
    PREEMPTED | TERMINATED | STOPPED)
      "${tpu[@]}" delete "$NAME" --zone "$ZONE" --quiet
      continue
      ;;
    *) sleep 30 && continue ;; # On its way up or down.
  esac
  on_all "set -e
    mountpoint -q /mnt/share || {
      sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/share
      sudo mount $SHARE /mnt/share
    }
    [ -d ism_jax ] || git clone --quiet $REPOSITORY ism_jax
    cd ism_jax && rm -f exit_code && source launch/environment.sh
    .venv/bin/python -m pip install --quiet 'jax[tpu]'" || { sleep 30 && continue; }
  # Who they are is in the machines' metadata.
  on_all "cd ism_jax
    .venv/bin/python -m ism_jax.train --distributed=on $flags
    echo \$? >exit_code" || true
  code="$("${tpu[@]}" ssh "$NAME" --zone "$ZONE" --worker=0 \
    --command 'cat ism_jax/exit_code')" || code=gone
  # 75: asked to stop, and saved.
  case "$code" in
    75 | gone) sleep 60 ;;
    *) break ;;
  esac
done
echo "the slice is still there: gcloud compute tpus tpu-vm delete $NAME --zone $ZONE"
exit "$code"
