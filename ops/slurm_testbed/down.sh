#!/usr/bin/env bash
# Stops the testbed of TESTBED_DIR (or of SLURM_CONF): its jobs, then its daemons. Removes its folder unless KEEP=1.
set -uo pipefail
dir="${TESTBED_DIR:-$(dirname "${SLURM_CONF:-/}")}"
[ -f "$dir/slurm.conf" ] && [ -d "$dir/log" ] || { echo "slurm_testbed: no testbed in '$dir'; set TESTBED_DIR" >&2; exit 2; }
export SLURM_CONF="$dir/slurm.conf"

if [ -f "$dir/slurmctld.pid" ] && kill -0 "$(cat "$dir/slurmctld.pid")" 2>/dev/null; then
  timeout 10 scancel --state=PENDING --user=root 2>/dev/null
  timeout 10 scancel --signal=KILL --full --user=root 2>/dev/null
  timeout 10 scancel --user=root 2>/dev/null
  for _ in $(seq 50); do
    [ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ] && break
    sleep 0.2
  done
fi
own="$(readlink /proc/self/ns/mnt)"
namespaces=""
for file in "$dir"/slurmd-node*.pid; do
  namespace="$(readlink "/proc/$(cat "$file" 2>/dev/null)/ns/mnt" 2>/dev/null)" || continue
  [ "$namespace" = "$own" ] || namespaces+=" $namespace"
done
for name in "$dir"/slurmd-node*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
  [ "${name%.own.pid}" = "$name" ] && [ -f "$name" ] || continue
  pid="$(cat "$name")"
  kill -TERM "$pid" 2>/dev/null
  for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  kill -KILL "$pid" 2>/dev/null
  rm -f "$name"
done
# Only processes that the nodes' steps left behind are in the mount namespaces that up.sh made.
for link in /proc/[0-9]*/ns/mnt; do
  namespace="$(readlink "$link" 2>/dev/null)" || continue
  [[ " $namespaces " == *" $namespace "* ]] || continue
  pid="${link#/proc/}"
  kill -KILL "${pid%/ns/mnt}" 2>/dev/null
done
[ "${KEEP:-0}" = 1 ] || rm -rf "$dir"
exit 0
