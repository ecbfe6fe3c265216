#!/usr/bin/env bash
# Makes the files of docs/results that need GPUs: benchmarks on four GPUs, and the GPU suite on
# four, two and one, at the same time where there are that many. Takes about ten minutes, twelve on
# four GPUs alone; fewer GPUs take less and give less.
#
#   scripts/gpu_results.sh FOLDER
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?a folder for the results}")
mkdir -p "$folder"
machine=$(nvidia-smi --list-gpus | wc -l)
gpus=$((machine < 4 ? machine : 4))
CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))
export CUDA_VISIBLE_DEVICES PYTHONUNBUFFERED=1
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
  for bench in symmetric kv_gather host; do
    timeout 90 make bench BENCH=$bench ARGS="--json $folder/$bench-${gpus}xh200.json" || failed=1
  done
fi
if [[ $machine -ge 7 ]]; then
  suite 0,1,2,3 4 500 & pids=($!)
  suite 4,5 2 400 & pids+=($!)
  suite 6 1 200 & pids+=($!)
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
else
  suite "$CUDA_VISIBLE_DEVICES" "$gpus" 500 || failed=1
  if [[ $gpus -gt 2 ]]; then
    suite 2 1 200 & pid=$!
    suite 0,1 2 400 || failed=1
    wait "$pid" || failed=1
  fi
fi
exit $failed
