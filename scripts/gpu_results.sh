#!/usr/bin/env bash
# Makes the files of docs/results that need GPUs: benchmarks on four GPUs and on two, and the GPU
# suite on four, two and one. Fewer GPUs give less. Each part takes up to ten minutes.
#
#   scripts/gpu_results.sh FOLDER [benches|sleep|tables|suites|suite-N ...]
set -uo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?a folder for the results}")
shift
parts=("$@")
[[ $# -gt 0 ]] || parts=(benches suites)
mkdir -p "$folder"
machine=$(nvidia-smi --list-gpus | wc -l)
gpus=$((machine < 4 ? machine : 4))
CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))
export CUDA_VISIBLE_DEVICES PYTHONUNBUFFERED=1
options="-v --durations=8 --tb=short --max-worker-restart 0"
failed=0

suite() { # GPUs that a test may use; three tests share them, as they are busy on the host as well
  local gpus=$1 result="$folder/test-gpu-${1}xh200.txt"
  local sharing=$((machine / gpus * 3))
  sharing=$((sharing < 6 ? sharing : 6))
  {
    GPUS_PER_WORKER=$gpus CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((machine - 1))) \
      timeout 500 make test-gpu ARGS="$options -n $sharing -m 'gpu and not alone'" || failed=1
    CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1))) \
      timeout 120 make test-gpu ARGS="$options -m alone" || failed=1
  } > "$result" 2>&1
  # Folders and unrelated pytest plugins are no conditions of the result, nor is the moment at
  # which a worker begins a test.
  sed -i -e '/^rootdir/d' -e 's# -- /[^ ]*python3##' -e '/^cachedir/d' -e '/^benchmark:/d' \
    -e '/^plugins:/d' -e 's#^PYTHONPATH=.*-m pytest#$ pytest#' -e '/pytest_benchmark/d' \
    -e '/^  warner(/d' -e '/^tests\/.* $/d' "$result"
  echo "$gpus GPUs: $(grep -hE '^=+ .* in [0-9.]+s' "$result" | tr '\n' ' ')"
  grep -hE '^(FAILED|ERROR)|^E   [A-Za-z]' "$result" | cut -c 1-300 | head -n 60
}

bench() { # GPUs, benchmark, more options; $result names the file, if not the benchmark
  local gpus=$1 name=$2
  shift 2
  CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1))) timeout 200 \
    make bench BENCH="$name" ARGS="--json $folder/${result:-$name}-${gpus}xh200.json $*" || failed=1
}

alone() { # benchmark of one process, seconds that it may take
  PYTHONPATH=. timeout "$2" python3 -m distcomm.bench "$1" --json "$folder/$1-h200.json" || failed=1
}

make build > "$folder/build.log" 2>&1 || { cat "$folder/build.log"; exit 1; }
for part in "${parts[@]}"; do
  case $part in
    benches)
      alone register 60
      alone sleep 120
      [[ $gpus -gt 1 ]] || continue
      for name in symmetric kv_gather host all_gather reduce_scatter all_reduce_rms_norm \
        decode_step compiled_step; do
        bench "$gpus" $name
      done
      result=all_gather_in_place bench "$gpus" all_gather --in-place
      bench "$gpus" all_reduce --plot "$folder/all_reduce.png"
      [[ $gpus -eq 2 ]] || bench 2 all_reduce
      ;;
    sleep) alone sleep 120 ;;
    tables) # for distcomm/tables
      [[ $gpus -gt 1 ]] && bench "$gpus" tune
      [[ $gpus -gt 2 ]] && bench 2 tune
      ;;
    suites)
      [[ $gpus -gt 2 ]] && suite "$gpus"
      [[ $gpus -gt 1 ]] && suite 2
      suite 1
      ;;
    suite-*) suite "${part#suite-}" ;;
  esac
done
exit $failed
