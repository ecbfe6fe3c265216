#!/usr/bin/env bash
# Runs a command on simulated GPUs, see tests/simulated_gpu/README.md. Makes what it needs first: a
# virtual environment with a CUDA build of torch, which takes about 5 GB.
#
#   scripts/simulated_gpu.sh NUM_GPUS COMMAND...
set -euo pipefail
cd "$(dirname "$0")/.."
export SIMULATED_GPUS=${1:?a number of GPUs}
shift
venv=$(realpath -m "${SIMULATED_VENV:-.venv-cuda}")
python=$venv/bin/python
if [[ ! -e $venv/.ready ]]; then
  python3 -m venv "$venv"
  "$python" -m pip install --quiet torch==2.11.0 nvidia-cuda-crt==13.0.88 numpy cmake \
    "pytest>=8" "pytest-xdist>=3.5" "pytest-timeout>=2.3"
  touch "$venv/.ready"
fi
mkdir -p build
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
{
  make build
  cmake -S tests/simulated_gpu -B build/simulated_gpu -DTORCH_DIR="$packages/torch" \
    -DCUDA_INCLUDE_DIR="$packages/nvidia/cu13/include"
  cmake --build build/simulated_gpu --parallel 2
} > build/simulated_gpu.log 2>&1 || { cat build/simulated_gpu.log; exit 1; }

export SIMULATED_GPU_LIBRARIES=$PWD/build/simulated_gpu/lib
export SIMULATED_GPU_FAKE_NCCL
SIMULATED_GPU_FAKE_NCCL=$("$python" -c 'from tests.fake_nccl import fake_nccl_path as p; print(p())')
export DISTCOMM_NCCL_SO=$SIMULATED_GPU_LIBRARIES/libnccl.so.2
export FAKE_NCCL_VERSION=22809 OMP_NUM_THREADS=1
export PATH=$venv/bin:$PATH PYTHONPATH=$PWD/tests/simulated_gpu/site:$PWD
export LD_LIBRARY_PATH=$SIMULATED_GPU_LIBRARIES
export LD_PRELOAD="$SIMULATED_GPU_LIBRARIES/libcuda.so.1 $SIMULATED_GPU_LIBRARIES/libnccl.so.2"
exec "$@"
