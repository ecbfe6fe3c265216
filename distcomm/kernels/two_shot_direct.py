"""All-reduce in two steps, the second one straight into all ranks' symmetric outputs.

As `two_shot_push`, but nothing has to be collected: for large tensors.

Stores use links better than loads. A rank that reads its peers' shares instead of being sent them
reaches 317 GB/s on an H200, as the requests take room beside the answers; this one 345.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentError
from .flags import PeerTensors
from .mailbox import Mailboxes, check_vectors
from .reduce_scatter_push import MOST_BYTES, push_and_add
from .vectors import VECTOR_BYTES

__all__ = ["two_shot_direct"]


def two_shot_direct(x: torch.Tensor, output: int, boxes: Mailboxes, peers: PeerTensors) -> None:
    """Every rank's output becomes the sum of all ranks' `x`.

    In fp32, from the first rank to the last, rounded once: the same bits on every rank.

    Args:
        x: bf16, fp16 or fp32, contiguous, whole vectors.
        output: address of rank 0's, of the same size, as this rank reaches it; symmetric, and
            `x` itself or in other memory.
        boxes, peers: the group's.

    Collective. Asynchronous, on the current stream of the current device, which is x's. Calls with
    the same mailboxes come in the same order on all ranks, and one after another on the GPU. May
    be captured in a CUDA graph.

    Raises:
        ArgumentError: a tensor doesn't fit; nothing was launched.
    """
    check_vectors("two_shot_direct", x, x, MOST_BYTES)
    if output % VECTOR_BYTES:
        requirement = f"at a multiple of {VECTOR_BYTES}"
        raise ArgumentError("output", requirement, output, call="two_shot_direct")
    push_and_add(x, output, boxes, peers)
