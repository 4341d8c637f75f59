#!/usr/bin/env bash
# Tries the oldest packages that pyproject.toml admits: imports every module, trains on two ranks with ZeRO-2, resumes.
#   bash ops/oldest.sh [--keep DIR]      part of ops/test.sh --all
# They are installed into an environment of their own, which takes 9 GB and minutes, and is removed afterwards; --keep
# leaves it in DIR and uses it again while the lower bounds stay. Skipped, with the reason, where the package index lacks that PyTorch or space is short.
set -euo pipefail
cd "$(dirname "$0")/.."

kept=""
if [ $# -gt 0 ]; then
  [ "$1" = --keep ] && [ $# = 2 ] || { echo "usage: bash ops/oldest.sh [--keep DIR]" >&2; exit 2; }
  kept="$2"
fi
python="${PYTHON:-python3}"
needed_gb=14  # the archives lie beside what is unpacked
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
environment="${kept:-$folder/environment}"
"$python" ops/oldest_versions.py >"$folder/requirements.txt"
torch=$(grep '^torch==' "$folder/requirements.txt")

if ! cmp --silent "$folder/requirements.txt" "$environment/installed"; then
  mkdir -p "$environment"
  free_gb=$(($(df --output=avail -k "$environment" | tail -1) / 1024 / 1024))
  [ "$free_gb" -ge "$needed_gb" ] || { echo "skipped: $environment has $free_gb GB free, $torch takes $needed_gb"; exit 0; }
  "$python" -m venv "$environment"
  pip=("$environment/bin/python" -m pip --disable-pip-version-check)
  "${pip[@]}" install --quiet --upgrade pip || true  # without an index no version is found below
  offered=$("${pip[@]}" index versions torch 2>/dev/null | sed -n 's/^Available versions: //p' || true)
  case ", $offered," in
    *", ${torch#torch==},"*) ;;
    *) echo "skipped: the package index has no $torch for $("$python" --version)"; exit 0 ;;
  esac
  "${pip[@]}" install --quiet --requirement "$folder/requirements.txt"
  cp "$folder/requirements.txt" "$environment/installed"
fi
export PATH="$environment/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD"
python ops/oldest_run.py "$folder"
