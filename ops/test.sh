#!/usr/bin/env bash
# Runs all checks: set-up, lint, types, import contracts, tests.
#   bash ops/test.sh            everything but the slow tests, at most 20 minutes on two processors
#   bash ops/test.sh --quick    lint, types, contracts and unit tests, at most 4 minutes after the first set-up
#   bash ops/test.sh --all      the slow tests too, at most 75 minutes
# Without --quick the oldest packages are installed and tried beside the tests (ops/oldest.sh); where that can't be done, or
# not in time, a line at the end says that they were NOT TESTED, and why.
# Other arguments go to pytest in place of the chosen tests: `bash ops/test.sh tests/io -k lock`.
set -euo pipefail
cd "$(dirname "$0")/.."

extent=normal
arguments=()
for argument in "$@"; do
  case "$argument" in
    --quick) extent=quick ;;
    --all) extent=all ;;
    *) arguments+=("$argument") ;;
  esac
done

# What has packages of its own is installed beside the set-up, which leaves a processor idle: Slurm and a browser, where that
# is possible (elsewhere their tests are skipped, with the reason), and the oldest packages, which are tried at once.
unset PYTHONDONTWRITEBYTECODE # as ops/setup.sh does
mkdir -p .venv
source ops/beside.sh
apt=""
trap 'beside_stop; [ -z "$apt" ] || wait "$apt" || true' EXIT # half an installation would keep the next start from its own
if [ "$extent" != quick ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && grep -q '^ID=debian' /etc/os-release; then
  wanted=(slurmctld slurmd slurm-client munge chromium iproute2)
  if ! dpkg -s "${wanted[@]}" >/dev/null 2>&1; then
    echo "installing ${wanted[*]}"
    {
      export DEBIAN_FRONTEND=noninteractive
      apt-get update -qq && apt-get install -y -qq --no-install-recommends "${wanted[@]}"
    } >.venv/apt.log 2>&1 </dev/null &
    apt=$!
  fi
fi
oldest=""
[ "$extent" = quick ] || [ ${#arguments[@]} -gt 0 ] || oldest=later
if [ "$oldest" ] && [ "$(df --output=avail -k . | tail -1)" -gt $((30 * 1024 * 1024)) ]; then # room for both at once
  oldest=now
  beside_start .venv/oldest.log bash ops/oldest.sh --keep .venv/oldest
fi
source ops/setup.sh test
[ "$oldest" != later ] || beside_start .venv/oldest.log bash ops/oldest.sh --keep .venv/oldest

processors=$(env -u OMP_NUM_THREADS nproc)  # nproc gives OMP_NUM_THREADS if that is set
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
step() {
  local began=$SECONDS status=0
  printf '\n== %s\n' "$*"
  "$@" || status=$?
  printf -- '-- %s s\n' $((SECONDS - began))
  return "$status"
}
# The same damaged files each time, so that a green run stays green, on every machine and whatever else has changed.
# `--all`, and pytest by hand, draw others.
if [ "$extent" != all ]; then
  export CMSCALE_MUTATION_SEED="${CMSCALE_MUTATION_SEED:-1}"
fi
step ruff check .
step ruff format --check .
step pyright
step lint-imports
[ -z "$apt" ] || wait "$apt" || echo "apt-get failed (.venv/apt.log); tests that need Slurm or chromium are skipped"

if [ ${#arguments[@]} -gt 0 ]; then
  step python -m pytest "${arguments[@]}"
  exit
fi
# Unit tests run in one process more than there are processors, as some of them wait. Then those that start ranks, a Slurm or
# a browser run in two, a file at a time: they wait more, but two at once are as many as ranks' timeouts allow.
several=(tests/cluster tests/distributed tests/browser)
ignored=()
for folder in "${several[@]}"; do ignored+=(--ignore "$folder"); done
marks="not slow"
case "$extent" in
  quick) marks="not slow and not long" ;;
  all) marks="" ;;
esac
step python -m pytest -n $((processors + 1)) --dist worksteal -m "$marks" "${ignored[@]}" tests
[ "$extent" = quick ] && exit
status=0
step python -m pytest -n 2 --dist loadfile -m "$marks" "${several[@]}" || status=$?
# A package index that lacks old releases is no fault of this project, so only a trial that went wrong is red.
latest=$((18 * 60))
[ "$extent" = all ] && latest=$((70 * 60))
beside_finish "the oldest packages" "$latest" || status=$?
exit "$status"
