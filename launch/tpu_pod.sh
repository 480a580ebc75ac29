#!/usr/bin/env bash
# Trains on a Cloud TPU slice, one process on each of its machines:
#
#   NAME=ism ZONE=us-central2-b TYPE=v4-32 REPOSITORY=https://... BUCKET=gs://mine \
#     bash launch/tpu_pod.sh --config configs/imagenet256_ism_xl2.py \
#     --config.data.source=latents:gs://mine/imagenet256 --config.data.cache_dir=/tmp/latents
#
# Creates the slice if it does not exist, sets it up and trains. SPOT=1 requests a
# preemptible slice: when it is preempted the run saves, and this script creates a new slice
# and resumes the run. The slice remains after the run; the last line of output is the
# command that deletes it.
#
# Needs gcloud, logged in, with the project set; REPOSITORY, which the machines clone; and
# BUCKET, which their service account may read and write. The run is in $BUCKET/$NAME unless
# --workdir says otherwise. Instead of a bucket, SHARE=10.0.0.2:/share is a file server (for
# example Filestore) that all machines mount at /mnt/share. VERSION is the software version
# of the slice.
set -euo pipefail
: "${NAME:?set it, such as NAME=ism}" "${ZONE:?set it, such as ZONE=us-central2-b}"
: "${TYPE:?set it, such as TYPE=v4-32}"
: "${REPOSITORY:?set it to the address of a git repository}"
SHARE="${SHARE:-}"
WORKDIR="/mnt/share/$NAME"
[ -n "$SHARE" ] || WORKDIR="${BUCKET:?set it, such as BUCKET=gs://mine}/$NAME"
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
    *) sleep 30 && continue ;; # Starting or stopping.
  esac
  on_all "set -e
    [ -z '$SHARE' ] || mountpoint -q /mnt/share || {
      sudo apt-get -qq install -y nfs-common && sudo mkdir -p /mnt/share
      sudo mount $SHARE /mnt/share
    }
    [ -d ism_jax ] || git clone --quiet $REPOSITORY ism_jax
    cd ism_jax && rm -f exit_code && source launch/environment.sh
    .venv/bin/python -m pip install --quiet 'jax[tpu]' gcsfs" || { sleep 30 && continue; }
  # The processes find each other through the machines' metadata.
  on_all "cd ism_jax
    .venv/bin/python -m ism_jax.train --distributed=on --workdir=$WORKDIR $flags
    echo \$? >exit_code" || true
  code="$("${tpu[@]}" ssh "$NAME" --zone "$ZONE" --worker=0 \
    --command 'cat ism_jax/exit_code')" || code=gone
  # 75: stopped by a signal, with a checkpoint.
  case "$code" in
    75 | gone) sleep 60 ;;
    *) break ;;
  esac
done
echo "the slice still exists; delete it with: gcloud compute tpus tpu-vm delete $NAME --zone $ZONE"
exit "$code"
