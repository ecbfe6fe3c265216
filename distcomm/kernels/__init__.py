"""GPU kernels written in Triton, and the launchers that call them."""

from .all_gather_direct import all_gather_direct
from .all_gather_push import all_gather_push
from .all_gather_push import most_bytes as most_gathered
from .flags import MAX_BLOCKS, PeerTensors, signal_bytes
from .mailbox import (
    DTYPES,
    LEAST_CAPABILITY,
    MOST_BLOCKS,
    MOST_RANKS,
    OVERLAPS_SINCE,
    Mailboxes,
    mailbox_bytes,
)
from .meeting import meet
from .one_shot_push import most_bytes as most_all_reduced
from .one_shot_push import one_shot_push
from .one_shot_rms_norm import most_tokens, one_shot_rms_norm
from .place_rows import place_rows
from .push_rows import PushedTensor, push_rows
from .reduce_scatter_push import push_and_add, reduce_scatter_push
from .rms_norm import NormedRows
from .two_shot_direct import two_shot_direct
from .two_shot_push import two_shot_push
from .two_shot_rms_norm import most_row_bytes, two_shot_rms_norm
from .vectors import VECTOR_BYTES

__all__ = [
    "DTYPES",
    "LEAST_CAPABILITY",
    "MAX_BLOCKS",
    "MOST_BLOCKS",
    "MOST_RANKS",
    "OVERLAPS_SINCE",
    "VECTOR_BYTES",
    "Mailboxes",
    "NormedRows",
    "PeerTensors",
    "PushedTensor",
    "all_gather_direct",
    "all_gather_push",
    "mailbox_bytes",
    "meet",
    "most_all_reduced",
    "most_gathered",
    "most_row_bytes",
    "most_tokens",
    "one_shot_push",
    "one_shot_rms_norm",
    "place_rows",
    "push_and_add",
    "push_rows",
    "reduce_scatter_push",
    "signal_bytes",
    "two_shot_direct",
    "two_shot_push",
    "two_shot_rms_norm",
]
