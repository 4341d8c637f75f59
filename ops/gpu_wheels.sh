#!/usr/bin/env bash
# Gathers the wheels that ops/gpu_check.sh needs beside PyTorch, on a machine with a network, for one without.
#   bash ops/gpu_wheels.sh --out DIR [--python 3.12] [--platform manylinux_2_28_x86_64] [--dry-run]
# They are for the Python version that is named, which need not be this one. At most 60 MiB in all. PyTorch, torchvision,
# numpy and what belongs to them are the other machine's own. wandb, diffusers and xformers are not needed to train.
# --dry-run names the packages and downloads nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

limit=$((60 * 1024 * 1024))
version=3.12
platforms=(manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux_2_12_x86_64 manylinux2010_x86_64)
out=""
dry=""
while [ $# -gt 0 ]; do
  case "$1" in
    --out | --python | --platform)
      [ $# -ge 2 ] || { echo "$1: give a value" >&2; exit 2; }
      case "$1" in
        --out) out="$2" ;;
        --python) version="$2" ;;
        --platform) platforms=("$2" "${platforms[@]}") ;;
      esac
      shift
      ;;
    --dry-run) dry=1 ;;
    *) echo "$1: unknown; see the head of ops/gpu_wheels.sh" >&2; exit 2 ;;
  esac
  shift
done
[ -n "$dry" ] || [ -n "$out" ] || { echo "--out: give the folder for the wheels" >&2; exit 2; }

# What training, sampling, the benchmarks and the tests import, with what that needs.
packages=(
  deepspeed einops hjson msgpack ninja packaging psutil py-cpuinfo tqdm
  pydantic pydantic-core annotated-types typing-extensions typing-inspection pyyaml
  typer click shellingham rich markdown-it-py mdurl pygments
  safetensors lpips simplejpeg filelock pillow scipy
  pytest pluggy iniconfig pytest-timeout hypothesis sortedcontainers
)
if [ -n "$dry" ]; then
  printf '%s\n' "${packages[@]}"
  exit
fi
mkdir -p "$out"
python="${PYTHON:-python3}"
flags=()
for platform in "${platforms[@]}"; do flags+=(--platform "$platform"); done
for package in "${packages[@]}"; do
  requirement=$("$python" - "$package" <<'PYTHON'
import re, sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
named = project["dependencies"] + project["optional-dependencies"]["test"]
found = [each for each in named if re.split(r"[^A-Za-z0-9._-]", each)[0].lower() == sys.argv[1]]
print(found[0] if found else sys.argv[1])
PYTHON
)
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp "${flags[@]}" --dest "$out" "$requirement" 2>/dev/null && continue
  # published as source alone: a wheel without compiled parts serves every Python
  DS_BUILD_OPS=0 "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir "$out" "$requirement"
done
size=$(du -sb "$out" | cut -f1)
echo "$(ls "$out" | wc -l) wheels, $((size / 1024 / 1024)) MiB in $out"
[ "$size" -le "$limit" ] || { echo "$out: more than 60 MiB" >&2; exit 1; }
