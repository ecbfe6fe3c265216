"""Rows of one tensor into chosen rows of another, on the same rank.

Shapes: N source rows, S output rows; ``...`` stands for the dims of a row.
"""

from __future__ import annotations

from typing import NoReturn

import torch

from ..errors import ArgumentError
from .push_rows import PushedTensor, push_rows

__all__ = ["place_rows"]

_BLOCKS_PER_MULTIPROCESSOR = 2


def place_rows(
    source: torch.Tensor,
    output: torch.Tensor,
    rows_to: torch.Tensor,
    slots: torch.Tensor | None = None,
) -> None:
    """``output[rows_to[i]] = source[i]``, or ``output[slots[rows_to[i]]] = source[i]``, in place.

    Bit for bit, for any dtype. A row whose number is negative, in either table, is skipped.

    Example: the rows ``[10, 11, 12, 13]`` with ``rows_to = [3, 0, -1, 1]`` turn an output of five
    zeros into ``[11, 13, 0, 10, 0]``, or with ``slots = [4, -1, 2, 0]`` into ``[10, 0, 0, 0, 11]``.

    Args:
        source: [N, ...].
        output: [S, ...], dtype and device of `source`; shares no memory with it. The bytes of a
            row follow one another, rows may be apart.
        rows_to: int32 or int64 [N], on the same device.
        slots: int32 or int64 [any], on the same device; None for no slot table.

    Not collective. On CUDA asynchronous, on the current stream; row numbers aren't checked there.
    Which of two rows for one place wins is open.

    Raises:
        ArgumentError: tensors that don't fit together.
        IndexError: on the CPU, a row number beyond its table or the output.
    """
    _check(source, output, rows_to, slots)
    if source.numel() == 0:
        return
    source_bytes, output_bytes = _row_bytes(source), _row_bytes(output)
    if source.is_cuda:
        _place_on_cuda(source_bytes, output_bytes, rows_to, slots)
    else:
        _place_on_cpu(source_bytes, output_bytes, rows_to, slots)


def _place_on_cpu(
    source: torch.Tensor,
    output: torch.Tensor,
    rows_to: torch.Tensor,
    slots: torch.Tensor | None,
) -> None:
    """Of bytes: source [N, row_bytes], output [S, row_bytes]."""
    to = rows_to.long()
    kept = (to >= 0).nonzero().squeeze(1)
    to = to[kept]
    if slots is not None:
        to = slots[to].long()
        kept, to = kept[to >= 0], to[to >= 0]
    output.index_copy_(0, to, source[kept])


def _place_on_cuda(
    source: torch.Tensor,
    output: torch.Tensor,
    rows_to: torch.Tensor,
    slots: torch.Tensor | None,
) -> None:
    """Of bytes: source [N, row_bytes], output [S, row_bytes]."""
    num_rows, row_bytes = source.shape
    device = output.device
    tensor = PushedTensor(
        source=source.data_ptr(),
        output=output.data_ptr(),
        deltas=None,
        row_bytes=row_bytes,
        source_pitch=source.stride(0),
        output_pitch=output.stride(0),
    )
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    with torch.cuda.device(device):
        push_rows(
            [tensor],
            rows_to.contiguous(),
            slots=None if slots is None else slots.contiguous(),
            rank=0,
            world_size=1,
            signals=None,
            num_blocks=min(num_rows, multiprocessors * _BLOCKS_PER_MULTIPROCESSOR),
        )


def _row_bytes(x: torch.Tensor) -> torch.Tensor:
    """The bytes of each row, uint8 [rows, row_bytes]; of a copy if a row isn't in one piece."""
    x = x.detach().resolve_conj().resolve_neg()
    if not _rows_in_one_piece(x):
        x = x.contiguous()
    row_size = x[:1].numel()
    pitch = x.stride(0) if len(x) > 1 else row_size  # of a single row, torch's means nothing
    return x.as_strided((len(x), row_size), (pitch, 1)).view(torch.uint8)


def _rows_in_one_piece(x: torch.Tensor) -> bool:
    return x[:1].squeeze(0).is_contiguous()


def _check(
    source: torch.Tensor,
    output: torch.Tensor,
    rows_to: torch.Tensor,
    slots: torch.Tensor | None,
) -> None:
    if source.dim() == 0 or output.dim() == 0 or source.shape[1:] != output.shape[1:]:
        _raise("output", f"of rows like those of shape {list(source.shape)}", list(output.shape))
    if output.dtype != source.dtype:
        _raise("output", f"of dtype {source.dtype}", output.dtype)
    apart = len(output) < 2 or output.stride(0) >= output[:1].numel()
    if not apart or not _rows_in_one_piece(output) or output.is_conj() or output.is_neg():
        _raise(
            "output",
            "of rows that are in one piece each and share no memory, no lazily changed view",
            f"strides {output.stride()} for shape {list(output.shape)}",
        )
    if rows_to.shape != (len(source),):
        _raise("rows_to", f"of shape [{len(source)}], one for each row", list(rows_to.shape))
    for argument, tensor in (("output", output), ("rows_to", rows_to), ("slots", slots)):
        if tensor is None:
            continue
        if tensor.device != source.device:
            _raise(argument, f"on {source.device}", tensor.device)
        if argument != "output" and (
            tensor.dtype not in (torch.int32, torch.int64) or tensor.dim() != 1
        ):
            _raise(
                argument,
                "int32 or int64 of one dim",
                f"{tensor.dtype} with shape {list(tensor.shape)}",
            )


def _raise(argument: str, requirement: str, actual: object) -> NoReturn:
    raise ArgumentError(argument, requirement, actual, call="place_rows")
