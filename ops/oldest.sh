#!/usr/bin/env bash
# Tries the oldest packages that pyproject.toml admits: imports every module, trains on two ranks with ZeRO-2, resumes.
#   bash ops/oldest.sh [--keep DIR]   beside the tests of ops/test.sh, which keeps them in .venv/oldest
#   bash ops/oldest.sh --lock         writes ops/oldest.txt anew: after a change of a lower bound
# They, and what they need, are installed as ops/oldest.txt has it, so that a release of somebody else changes nothing: 4 GB,
# removed afterwards; --keep leaves them in DIR and uses them again while that list stays. CUDA's libraries, 3 GB more to
# fetch, are empty ones: the training is on a CPU.
# Status: 0 tried, and right; 75 not tried, the last line says why; other: wrong.
set -euo pipefail
cd "$(dirname "$0")/.."

not_tried() {
  echo "$1"
  exit 75
}
wrong_use() {
  echo "$1" >&2
  exit 2
}
usage="usage: bash ops/oldest.sh [--keep DIR] | --lock"
kept=""
case "${1:-}" in
  "" | --lock) [ $# -le 1 ] || wrong_use "$usage" ;;
  --keep) [ $# = 2 ] && kept=$(realpath -m "$2") || wrong_use "$usage" ;;
  *) wrong_use "$usage" ;;
esac
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || python=python3.11
"$python" -c '' 2>/dev/null || not_tried "they are listed for Python 3.11, which is not here"
[ "$(uname -sm)" = "Linux x86_64" ] || not_tried "they are listed for Linux on x86_64, this is $(uname -sm)"
command -v cc >/dev/null && command -v readelf >/dev/null || not_tried "a C compiler or readelf is missing"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
environment="${kept:-$folder/environment}"
list=ops/oldest.txt
pip=("$environment/bin/python" -m pip --disable-pip-version-check)

make_environment() {
  [ -z "$(ls -A "$environment" 2>/dev/null)" ] || [ -f "$environment/pyvenv.cfg" ] || wrong_use "--keep $environment: holds other files"
  mkdir -p "$environment"
  "$python" -m venv --clear "$environment" || not_tried "$python -m venv failed"
}

if [ "${1:-}" = --lock ]; then
  make_environment
  "${pip[@]}" install --quiet --upgrade pip  # that of Python 3.11 takes minutes to resolve these packages
  "$python" ops/oldest_versions.py >"$folder/bounds.txt"
  "${pip[@]}" install --quiet --dry-run --report "$folder/report.json" --requirement "$folder/bounds.txt"
  "$python" ops/oldest_versions.py --lock "$folder/report.json" >"$folder/list.txt"
  mv "$folder/list.txt" "$list"
  exit
fi

if [ -n "$kept" ]; then  # one at a time
  mkdir -p "$(dirname "$kept")"
  exec 9>"$kept.lock"
  flock --nonblock 9 || not_tried "another check uses $kept"
fi
if ! cmp --silent "$list" "$environment/installed"; then
  needed_gb=10  # 7 with the archives, and what the tests beside take
  mkdir -p "$environment"
  free_gb=$(($(df --output=avail -k "$environment" | tail -1) / 1024 / 1024))
  [ "$free_gb" -ge "$needed_gb" ] || not_tried "$needed_gb GB are needed, and $environment has $free_gb free"
  make_environment
  # Several at once, as most of the time goes into waiting for answers of the index. Not into pip's cache: pip 23 puts a whole
  # archive into memory for that, twice.
  mkdir "$environment/tmp"  # where a new start removes what a killed one leaves
  TMPDIR="$environment/tmp" xargs -a "$list" -n 34 -P 4 "${pip[@]}" install --quiet --no-deps --no-compile --no-cache-dir >"$folder/pip.log" 2>&1 || {
    cat "$folder/pip.log"
    not_tried "pip: $(grep ERROR "$folder/pip.log" | tail -1 || echo "ended by a signal")"
  }
  site=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$environment/bin/python" ops/oldest_libraries.py "$site" || not_tried "no empty libraries could be made in place of CUDA's"
  rm -rf "$environment/tmp"
  cp "$list" "$environment/installed"
fi
export PATH="$environment/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONPATH="$PWD" CUDA_VISIBLE_DEVICES=""
python ops/oldest_run.py "$folder" 9>&-
