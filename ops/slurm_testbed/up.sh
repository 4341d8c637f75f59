#!/usr/bin/env bash
# Starts a real Slurm on this machine: up.sh [NODES]. Usage: `eval "$(ops/slurm_testbed/up.sh 2)"`; see README.md.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
nodes="${1:-2}"

fail() { echo "slurm_testbed: $*" >&2; exit 2; }
[[ "$nodes" =~ ^[1-9][0-9]?$ ]] || fail "NODES is '$nodes'; it should be a number from 1 to 99"
[ "$(id -u)" = 0 ] || fail "needs root (mount namespaces, slurmd); run it as root"
export PATH="$PATH:/usr/sbin:/sbin"
for program in slurmctld slurmd sbatch munged unshare python3; do
  command -v "$program" >/dev/null || fail "needs $program; on Debian: apt-get install slurmctld slurmd slurm-client munge"
done

dir="${TESTBED_DIR:-$(mktemp -d "${TMPDIR:-/tmp}/slurm-testbed.XXXXXX")}"
mkdir -p "$dir"
dir="$(cd "$dir" && pwd)"
export SLURM_CONF="$dir/slurm.conf"
print_environment() { echo "export SLURM_CONF=$SLURM_CONF TESTBED_DIR=$dir PATH=\"\$PATH:/usr/sbin\""; }

alive() { [ -f "$dir/$1.pid" ] && kill -0 "$(cat "$dir/$1.pid")" 2>/dev/null; }
if alive slurmctld; then print_environment; exit 0; fi # it runs already
rm -rf "$dir"/state "$dir"/spool "$dir"/*.pid
mkdir -p "$dir"/{state,log}
trap 'echo "slurm_testbed: did not come up; logs in $dir/log" >&2; TESTBED_DIR="$dir" KEEP=1 "$here/down.sh"' ERR

# Free ports, all different.
read -r -a ports < <(python3 - "$((nodes + 1))" <<'PY'
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))
PY
)

sed -e "s|@DIR@|$dir|g" -e "s|@HOST@|$(hostname -s)|g" -e "s|@CONTROL_PORT@|${ports[0]}|g" \
  -e "s|@KILL_WAIT@|${TESTBED_KILL_WAIT:-15}|g" "$here/slurm.conf.in" >"$SLURM_CONF"
if [ "${TESTBED_USER_SIGNAL:-0}" = 1 ]; then echo "SlurmctldParameters=preempt_send_user_signal" >>"$SLURM_CONF"; fi
if [ "${TESTBED_MEMORY:-0}" = 1 ]; then # without cgroups memory is polled, every second
  sed -i "s|^SelectTypeParameters=.*|SelectTypeParameters=CR_Core_Memory|" "$SLURM_CONF"
  printf '%s\n' JobAcctGatherType=jobacct_gather/linux JobAcctGatherFrequency=task=1 JobAcctGatherParams=OverMemoryKill >>"$SLURM_CONF"
fi
cp /etc/hosts "$dir/hosts"
for k in $(seq "$nodes"); do
  echo "NodeName=node$k NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=${ports[$k]} CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1000000 State=UNKNOWN" >>"$SLURM_CONF"
  echo "127.0.0.1 node$k" >>"$dir/hosts"
  mkdir -p "$dir/spool/node$k" "$dir/node$k/tmp"
  chmod 1777 "$dir/node$k/tmp"
done
cat >>"$SLURM_CONF" <<EOF
PartitionName=low Nodes=node[1-$nodes] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=${TESTBED_GRACE:-30} MaxTime=INFINITE State=UP
PartitionName=high Nodes=node[1-$nodes] PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
EOF
release="$(slurmd -V)" # such as `slurm-wlm 24.11.5`
release="${release##* }"
if [ "${release%%.*}" -ge 23 ]; then # else slurmd would not start without a hierarchy of cgroups; older ones do
  echo "CgroupPlugin=disabled" >"$dir/cgroup.conf"
fi
cat >"$dir/task_prolog.sh" <<EOF
#!/bin/sh
echo "export TMPDIR=$dir/\$SLURMD_NODENAME/tmp"
EOF
chmod 755 "$dir/task_prolog.sh"

# Starts a daemon in a session of its own; down.sh ends it by the process id that is recorded here.
start() {
  local name="$1"
  shift
  setsid "$@" >>"$dir/log/$name.out" 2>&1 </dev/null &
  echo $! >"$dir/$name.pid"
}
head -c 1024 /dev/urandom >"$dir/munge.key"
chmod 600 "$dir/munge.key"
start munged munged --foreground --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" \
  --pid-file="$dir/munged.own.pid" --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" --num-threads=2
for _ in $(seq 100); do [ -S "$dir/munge.socket" ] && break; sleep 0.1; done
start slurmctld slurmctld -D -i -f "$SLURM_CONF"
for k in $(seq "$nodes"); do
  # Its own /dev/shm and host names; /tmp stays shared (runs may be there), tasks of each node get their own TMPDIR.
  start "slurmd-node$k" unshare --mount --propagation private bash -c \
    "mount -t tmpfs tmpfs /dev/shm && mount --bind '$dir/hosts' /etc/hosts && exec slurmd -D -N node$k -f '$SLURM_CONF'"
done
for _ in $(seq 300); do
  ready="$(sinfo --noheader --Node --partition=low --states=idle --format=%N 2>/dev/null | sort -u | wc -l || true)"
  [ "$ready" = "$nodes" ] && { print_environment; exit 0; }
  sleep 0.1
done
false
