"""Benchmarks: ``torchrun --nproc-per-node N -m distcomm.bench NAME``."""
