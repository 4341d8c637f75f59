#!/usr/bin/env bash
# All checks: set-up, lint, types, import contracts, tests. `--all` adds the slow tests; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

marks=(-m "not slow")
arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then marks=(); else arguments+=("$argument"); fi
done

source ops/setup.sh test

# Slurm and a browser where this machine may have them: elsewhere their tests skip and say why.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && grep -q '^ID=debian' /etc/os-release; then
  wanted=(slurmctld slurmd slurm-client munge chromium iproute2)
  if ! dpkg -s "${wanted[@]}" >/dev/null 2>&1; then
    echo "installing ${wanted[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${wanted[@]}"; } >.venv/apt.log 2>&1 ||
      echo "apt-get failed (.venv/apt.log); tests that need Slurm or chromium will skip"
  fi
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
step() { printf '\n== %s\n' "$*"; "$@"; }
step ruff check .
step ruff format --check .
step pyright
step lint-imports
step python -m pytest "${marks[@]}" ${arguments[@]+"${arguments[@]}"}
