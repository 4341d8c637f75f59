#!/usr/bin/env bash
# Runs the tests that need a GPU, and the benchmarks on the LSUN network, on a machine with one CUDA device and no network.
#   bash ops/gpu_check.sh [--wheels DIR] [--only attention,tests,step,compile,memory,sampling] [--out DIR] [--original DIR] [--dry-run]
# The machine's own Python (PYTHON, default python3) and its PyTorch are used and left as they are: what is missing is
# installed from --wheels (made by ops/gpu_wheels.sh) into a folder of its own. At most 9 minutes.
# --dry-run does the same on a CPU with a narrowed network.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
wheels=""
arguments=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels)
      [ $# -ge 2 ] || { echo "--wheels: give a folder" >&2; exit 2; }
      wheels="$2"
      shift
      ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cmscale needs Python 3.11 or newer; set PYTHON" >&2; exit 2; }
"$python" -c 'import torch' 2>/dev/null || { echo "$python has no PyTorch; set PYTHON to one that has" >&2; exit 2; }

if [ -n "$wheels" ]; then
  [ -d "$wheels" ] || { echo "--wheels $wheels: no such folder; make it by ops/gpu_wheels.sh" >&2; exit 2; }
  packages="${CMSCALE_GPU_PACKAGES:-$PWD/.gpu-packages}"
  mkdir -p "$packages"
  export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
  missing=()
  while read -r name; do  # a wheel whose package neither this Python nor the folder has yet
    "$python" -c 'import importlib.metadata, sys; importlib.metadata.version(sys.argv[1])' "$name" 2>/dev/null || missing+=("$name")
  done < <(cd "$wheels" && ls -- *.whl | sed 's/-.*//' | tr _ - | sort -u)
  if [ ${#missing[@]} -gt 0 ]; then
    echo "installing ${missing[*]} into $packages"
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --find-links "$wheels" --target "$packages" "${missing[@]}"
  fi
fi
exec "$python" ops/gpu_check.py "${arguments[@]}"
