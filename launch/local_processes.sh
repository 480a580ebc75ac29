#!/usr/bin/env bash
# Runs a command in N processes on this machine, to test what a cluster does:
#
#   bash launch/local_processes.sh 2 ism_jax.train --config configs/quickstart.py
#
# Process 0 writes to the terminal, the others to logs/ (LOGS=... chooses another folder).
# Ctrl-C and SIGTERM reach all processes, which save and exit. If one fails, all stop, and
# the exit code is that of the lowest-numbered one that failed. PYTHON chooses the
# interpreter, PORT the coordinator's port.
set -uo pipefail
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]] || [ $# -lt 2 ]; then
  echo "usage: $0 N MODULE [FLAG ...], for example $0 2 ism_jax.train --config ..." >&2
  exit 2
fi
count="$1" module="$2" logs="${LOGS:-logs}"
shift 2
port="${PORT:-$((20000 + RANDOM % 10000))}"
mkdir -p "$logs"
children=()
for ((i = 0; i < count; i++)); do
  [ "$i" -eq 0 ] && out=/dev/stdout || out="$logs/process_$i.log"
  "${PYTHON:-python}" -m "$module" "$@" --coordinator "127.0.0.1:$port" \
    --num_processes "$count" --process_id "$i" >"$out" 2>&1 &
  children+=($!)
done
# Process 0 passes the signal on to the others.
trap 'kill -TERM "${children[0]}" 2>/dev/null' TERM INT
code=0
for child in "${children[@]}"; do
  # A signal to this script interrupts `wait`.
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child" || code=$((code ? code : $?))
done
exit "$code"
