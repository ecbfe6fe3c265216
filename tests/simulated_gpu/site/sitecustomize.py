"""Python imports this at its start where its folder is on the path: torch gets its operators."""

import ctypes
import os

import torch

torch.set_num_threads(1)  # ranks share a machine, and a stream's thread may not start others
ctypes.CDLL(
    os.path.join(os.environ["SIMULATED_GPU_LIBRARIES"], "libsimulated_operators.so")
).simulated_gpu_replace_operators()
