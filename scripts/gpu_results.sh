#!/usr/bin/env bash
# Makes the files of docs/results that need GPUs: benchmarks, and the GPU suite on all GPUs, on two
# and on one. Takes about nine minutes on four GPUs, and one on a single GPU, which gives less.
#
#   scripts/gpu_results.sh FOLDER
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?a folder for the results}")
mkdir -p "$folder"
gpus=$(nvidia-smi --list-gpus | wc -l)
export PYTHONUNBUFFERED=1
options="-v --durations=8 --tb=short"
failed=0

suite() { # GPUs as for CUDA_VISIBLE_DEVICES, their number, seconds
  local result="$folder/test-gpu-$2xh200.txt"
  CUDA_VISIBLE_DEVICES=$1 timeout "$3" make test-gpu ARGS="$options" > "$result" 2>&1
  local code=$?
  # Folders and unrelated pytest plugins are no conditions of the result.
  sed -i -e '/^rootdir/d' -e 's# -- /[^ ]*python3##' -e '/^cachedir/d' -e '/^benchmark:/d' \
    -e '/^plugins:/d' -e 's#^PYTHONPATH=.*-m pytest#$ pytest#' "$result"
  echo "$2 GPUs: $(tail -n 1 "$result")"
  grep -hE '^(FAILED|ERROR)|^E   [A-Za-z]' "$result" | cut -c 1-300 | head -n 60
  return $code
}

make build > "$folder/build.log" 2>&1 || { cat "$folder/build.log"; exit 1; }
PYTHONPATH=. timeout 60 python3 -m distcomm.bench register --json "$folder/register-h200.json" \
  || failed=1
if [[ $gpus -gt 1 ]]; then
  for bench in symmetric host; do
    timeout 60 make bench BENCH=$bench ARGS="--json $folder/$bench-${gpus}xh200.json" || failed=1
  done
fi
suite "$(seq -s, 0 $((gpus - 1)))" "$gpus" 330 || failed=1
if [[ $gpus -gt 2 ]]; then
  suite 2 1 100 &
  suite 0,1 2 200 || failed=1
  wait $! || failed=1
fi
exit $failed
