"""Context parallelism: who holds which token, and gathers of the KV cache in token order."""

from .gather import KvGather, all_gather_kv, all_gather_kv_into_cache
from .pipeline import PipelinedKvGather
from .plan import AttentionLengths, ContextParallelPlan, TokenRun

__all__ = [
    "AttentionLengths",
    "ContextParallelPlan",
    "KvGather",
    "PipelinedKvGather",
    "TokenRun",
    "all_gather_kv",
    "all_gather_kv_into_cache",
]
