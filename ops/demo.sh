#!/usr/bin/env bash
# Runs the whole pipeline at 16 px: photographs, shards on S3, a teacher, its distillation, consistency training,
# evaluation, export, samples, edits, a report. `--long` trains at 32 px for 40 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."

length=short
case "${1:-}" in
  "") ;;
  --long) length=long ;;
  *) echo "usage: bash ops/demo.sh [--long]" >&2; exit 2 ;;
esac

source ops/setup.sh demo

runs=runs/demo
rm -rf "$runs"
mkdir -p "$runs"
say() { printf '\n== %s\n' "$*"; }

# An S3 server on a free loopback port; it is stopped however this script ends. What runs in the background has a session
# of its own: Ctrl-C reaches it through `finish` alone, so that trainings can save to the server first.
export AWS_ACCESS_KEY_ID=demo AWS_SECRET_ACCESS_KEY=demo AWS_DEFAULT_REGION=us-east-1
port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export AWS_ENDPOINT_URL="http://127.0.0.1:$port"
setsid moto_server -H 127.0.0.1 -p "$port" >"$runs/s3.log" 2>&1 &
server=$!
beside="" # the training in the background
finish() { # ends what runs in the background: the training first, which then saves to the server
  trap 'kill $beside $server 2>/dev/null || true' INT TERM # a second request: at once
  for process in $beside $server; do
    kill "$process" 2>/dev/null || true
    wait "$process" 2>/dev/null || true
  done
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
python - <<'PYTHON'
import time, boto3, botocore.exceptions

for _ in range(100):
    try:
        boto3.client("s3").create_bucket(Bucket="cmscale-demo")
        break
    except botocore.exceptions.EndpointConnectionError:
        time.sleep(0.1)
PYTHON

bucket=s3://cmscale-demo
export CMSCALE_CACHE="$PWD/$runs/cache"
# Keep freed memory in the process: by default glibc returns it to the kernel after every layer, which zeroes it again
# for the next layer. On a CPU that takes a third of an evaluation's time.
export MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_TOP_PAD_=268435456
export OMP_NUM_THREADS=1 # one thread per process: two trainings at once, with a thread per processor each, wait for each other
local=(--cluster local --runs-dir "$runs")
# bf16 is faster than fp32 where the processor has instructions for it; elsewhere torch emulates it, at a tenth of the speed.
precision=$(python -c 'from cmscale.distributed.compat import cpu_has_bf16; print("bf16" if cpu_has_bf16() else "fp32")')
size=16
declare -A longer=()
if [ "$length" = long ]; then
  size=32
  network="model.image_size=32 model.channel_multipliers=[1,1,2,2]"
  longer=(
    [edm]="$network train.total_steps=3000 train.sample_every=1000 checkpoint.every_steps=1000"
    [cd]="$network train.total_steps=1500 train.sample_every=500 checkpoint.every_steps=500"
    [ct]="$network train.total_steps=7000 train.sample_every=1000 checkpoint.every_steps=1000"
  )
fi

say "photographs to an LMDB in LSUN's format"
python data_prep/demo.py "$runs/demo_train_lmdb"

say "shards on S3, in both formats"
for format in mds webdataset; do
  python data_prep/prepare.py --source "lsun:$runs/demo_train_lmdb" --format $format --image-size $size --encoding png \
    --out "$bucket/$format" --workers 1
done
python data_prep/reference.py "$bucket/webdataset" --out "$runs/reference.npz" --features efficientnet --samples 150

training() { # kind format processes [key=value ...]: the command that trains, as the array `command`
  local kind=$1 format=$2 processes=$3
  shift 3
  # shellcheck disable=SC2206 # `longer` is split into words on purpose
  command=(
    python launchers/submit.py "${local[@]}" --gpus-per-node "$processes" --name "$kind" "configs/demo_$kind.yaml"
    "data.path=$bucket/$format" "checkpoint.export_to=$bucket/runs" "evaluate.reference=$runs/reference.npz"
    "engine.precision=$precision" "$@" ${longer[$kind]:-}
  )
}
evaluate() { # kind
  say "evaluation: $1, before and after training, on two processes"
  python launchers/evaluate.py "${local[@]}" --gpus-per-node 2 "$runs/$1" --checkpoint 0,latest
}

training ct webdataset 1
say "training in the background: ct, on one process (log: $runs/ct.log)"
setsid "${command[@]}" >"$runs/ct.log" 2>&1 &
beside=$!

training edm mds 1
say "training: edm, on one process"
"${command[@]}"
if ! jobs -rp | grep -qx "$beside" && ! wait "$beside"; then
  cat "$runs/ct.log"
  exit 1
fi
evaluate edm

training cd mds 2 "method.teacher=$runs/edm"
say "training: cd, on two processes"
"${command[@]}"
evaluate cd

say "training: ct, the log of the background"
ended=0
wait "$beside" || ended=$?
beside=""
cat "$runs/ct.log"
[ "$ended" = 0 ] || exit "$ended"
evaluate ct

say "samples, export, editing, report"
cmscale sample "$runs/cd" --samples 64 --out "$runs/samples.npz" --grid "$runs/samples.png"
cmscale export "$runs/cd" --format safetensors --to "$bucket/exports/cd.safetensors"
python data_prep/demo.py --seed 1 --picture "$runs/photograph.png"
cmscale edit inpaint "$bucket/exports/cd.safetensors" "$runs/photograph.png" --out "$runs/inpainted.png"
cmscale edit colorize "$runs/cd" "$runs/photograph.png" --out "$runs/colorized.png" --in-report
python ops/demo_pictures.py "$runs"
cmscale report "$runs/cd" --beside "$runs/edm" --beside "$runs/ct"

say "scores before and after training (FD-EfficientNet, lower is better)"
learned=0
python ops/demo_summary.py "$runs" "$length" || learned=$?
echo "learned:  $PWD/$runs/learned.png"
echo "edits:    $PWD/$runs/edits.png"
echo "samples:  $PWD/$runs/samples.png"
echo "report:   $PWD/$runs/cd/report/index.html"
exit "$learned"
