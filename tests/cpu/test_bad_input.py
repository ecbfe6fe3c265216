"""Wrong arguments: a typed error that says what is wrong and where, and a group that still works.

Shapes: W group size, r rank_in_group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from distcomm import ArgumentError, GroupCoordinator, ParallelState
from tests.cpu.job import Job

GROUPS = ["tp", "cp", "mixed", "pp"]  # 8 ranks, 2, 3 or 2 in an order of their own, and 1
MIXED = [(5, 2, 7), (6, 0, 1), (4, 3)]
FLOAT8 = torch.float8_e4m3fn


def group_named(state: ParallelState, name: str) -> GroupCoordinator:
    if name not in state.groups:
        return state.create_group(name, next(ranks for ranks in MIXED if state.rank in ranks))
    return state.groups[name]


def floats(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def columns(rows: int, width: int) -> torch.Tensor:
    """[rows, width] of ones, whose columns are contiguous and not its rows."""
    return torch.ones(width, rows).t()


def on_meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


class Bad(NamedTuple):
    """A wrong call, and what its error must say.

    Attributes:
        call: makes it.
        argument: the one that is wrong.
        requirement: part of what the message requires of it.
        got: part of what the message says came; ``{W}`` stands for the group size.
        alone: whether it is wrong in a group of one, too.
    """

    call: Callable[[GroupCoordinator], object]
    argument: str
    requirement: str
    got: str
    alone: bool = True


def rows_for_all(g: GroupCoordinator) -> torch.Tensor:
    return floats(2 * g.world_size, 3)


def equal_sizes(g: GroupCoordinator) -> list[int]:
    return [2] * g.world_size


def three_of_own(g: GroupCoordinator) -> list[int]:
    """As many rows as `equal_sizes`, of which the caller's own are one too many."""
    sizes = [3 if r == g.rank_in_group else 2 for r in range(g.world_size)]
    sizes[(g.rank_in_group + 1) % g.world_size] -= 1
    return sizes


def overlapping_rows(g: GroupCoordinator) -> tuple[torch.Tensor, torch.Tensor]:
    """Both like `rows_for_all`; the last row of one is the first of the other."""
    rows = 2 * g.world_size
    memory = floats(2 * rows - 1, 3)
    return memory[rows - 1 :], memory[:rows]


# Functions of a group, an op and an input: every reduction.
REDUCTIONS: dict[str, Callable[[GroupCoordinator, str, torch.Tensor], object]] = {
    "all_reduce": lambda g, op, x: g.all_reduce(x, op),
    "reduce": lambda g, op, x: g.reduce(x, 0, op),
    "reduce_scatter": lambda g, op, x: g.reduce_scatter(x, 0, op),
    "reduce_scatter_tensor": lambda g, op, x: g.reduce_scatter_tensor(
        torch.empty(2, 3, dtype=x.dtype), x, op
    ),
    "reduce_scatterv": lambda g, op, x: g.reduce_scatterv(x, equal_sizes(g), op=op),
}

# Functions of a group and an input of 2 W rows, on any device.
COLLECTIVES: dict[str, Callable[[GroupCoordinator, torch.Tensor], object]] = {
    **{name: (lambda call: lambda g, x: call(g, "sum", x))(c) for name, c in REDUCTIONS.items()},
    "all_gather": lambda g, x: g.all_gather(x),
    "all_gather_into_tensor": lambda g, x: g.all_gather_into_tensor(
        torch.empty(g.world_size, *x.shape), x
    ),
    "all_gatherv": lambda g, x: g.all_gatherv(x, [len(x)] * g.world_size),
    "all_to_all_single": lambda g, x: g.all_to_all_single(torch.empty(x.shape), x),
    "broadcast": lambda g, x: g.broadcast(x),
    "cp_all_gather_into_tensor_async": lambda g, x: g.cp_all_gather_into_tensor_async(
        torch.empty(g.world_size, *x.shape), x
    ),
    "gather": lambda g, x: g.gather(x),
    "send": lambda g, x: g.send(x),
    "recv": lambda g, x: g.recv(x),
}

# Functions of a group and a rank in it.
PEERS: dict[str, tuple[str, Callable[[GroupCoordinator, Any], object]]] = {
    "broadcast": ("src", lambda g, peer: g.broadcast(floats(2), peer)),
    "broadcast_object": ("src", lambda g, peer: g.broadcast_object(1, peer)),
    "broadcast_object_list": ("src", lambda g, peer: g.broadcast_object_list([1], peer)),
    "broadcast_tensor_dict": ("src", lambda g, peer: g.broadcast_tensor_dict({}, peer)),
    "gather": ("dst", lambda g, peer: g.gather(floats(2), peer)),
    "reduce": ("dst", lambda g, peer: g.reduce(floats(2), peer)),
    "send": ("dst", lambda g, peer: g.send(floats(2), peer)),
    "send_object": ("dst", lambda g, peer: g.send_object(1, peer)),
    "send_tensor_dict": ("dst", lambda g, peer: g.send_tensor_dict({}, peer)),
    "recv": ("src", lambda g, peer: g.recv((2,), torch.float32, peer)),
    "recv_object": ("src", lambda g, peer: g.recv_object(peer)),
    "recv_tensor_dict": ("src", lambda g, peer: g.recv_tensor_dict(peer)),
}
POINT_TO_POINT = [name for name in PEERS if name.startswith(("send", "recv"))]

# Functions of a group and a dim.
WITH_DIM: dict[str, Callable[[GroupCoordinator, Any, torch.Tensor], object]] = {
    "all_gather": lambda g, dim, x: g.all_gather(x, dim),
    "gather": lambda g, dim, x: g.gather(x, dim=dim),
    "reduce_scatter": lambda g, dim, x: g.reduce_scatter(x, dim),
}

# Functions of a group and an output that should be [2, 3] or, of gathers, [2 W, 3].
SHARES: dict[str, tuple[str, Callable[[GroupCoordinator, torch.Tensor], object]]] = {
    "all_reduce": ("out", lambda g, out: g.all_reduce(floats(2, 3), out=out)),
    "reduce": ("out", lambda g, out: g.reduce(floats(2, 3), g.rank_in_group, out=out)),
    "reduce_scatter_tensor": (
        "output",
        lambda g, out: g.reduce_scatter_tensor(out, rows_for_all(g)),
    ),
    "reduce_scatterv": (
        "out",
        lambda g, out: g.reduce_scatterv(rows_for_all(g), equal_sizes(g), out),
    ),
}
GATHERED: dict[str, tuple[str, Callable[[GroupCoordinator, torch.Tensor], object]]] = {
    "all_gather_into_tensor": (
        "output",
        lambda g, out: g.all_gather_into_tensor(out, floats(2, 3)),
    ),
    "all_gatherv": ("out", lambda g, out: g.all_gatherv(floats(2, 3), equal_sizes(g), out)),
    "all_to_all_single": (
        "output",
        lambda g, out: g.all_to_all_single(out, rows_for_all(g), equal_sizes(g), equal_sizes(g)),
    ),
    "cp_all_gather_into_tensor_async": (
        "output",
        lambda g, out: g.cp_all_gather_into_tensor_async(out, floats(2, 3)),
    ),
}


def wrong_ops() -> dict[str, Bad]:
    known = "one of sum, prod, max, min, avg"
    return {
        f"{name}: op {op!r}": Bad(
            lambda g, call=call, op=op: call(g, op, rows_for_all(g)), "op", known, repr(op)
        )
        for name, call in REDUCTIONS.items()
        for op in ("mean", None)
    }


def wrong_dtypes() -> dict[str, Bad]:
    pairs = [(torch.bool, "sum"), (torch.complex64, "max"), (torch.int32, "avg"), (FLOAT8, "sum")]
    return {
        f"{name}: {op} of {dtype}": Bad(
            lambda g, call=call, op=op, dtype=dtype: call(g, op, rows_for_all(g).to(dtype)),
            "input" if name.startswith("reduce_scatter") and name[-1] == "r" else "x",
            f"of a dtype that '{op}' can reduce here: torch.float16, ",
            str(dtype),
            alone=dtype != FLOAT8,
        )
        for name, call in REDUCTIONS.items()
        for dtype, op in pairs
    }


def wrong_devices() -> dict[str, Bad]:
    names = {"recv": "out", **dict.fromkeys(("all_reduce", "reduce", "reduce_scatterv"), "x")}
    names |= dict.fromkeys(("all_gatherv", "broadcast", "gather", "send"), "x")
    inputs = {
        f"{name}: input on meta": Bad(
            lambda g, call=call: call(g, on_meta(2 * g.world_size, 3)),
            names.get(name, "input"),
            "on cpu",
            "meta",
            alone=False,
        )
        for name, call in COLLECTIVES.items()
    }
    outputs = {
        f"{name}: output on meta": Bad(
            lambda g, call=call, rows=rows: call(g, on_meta(rows(g), 3)), argument, "on cpu", "meta"
        )
        for calls, rows in OUTPUTS
        for name, (argument, call) in calls.items()
    }
    return inputs | outputs


def wrong_peers() -> dict[str, Bad]:
    ranks: dict[str, Callable[[GroupCoordinator], Any]] = {
        "-1": lambda g: -1,
        "W": lambda g: g.world_size,
        "True": lambda g: True,
        "1.0": lambda g: 1.0,
        "'0'": lambda g: "0",
    }
    found = {
        f"{name}: {argument} {text}": Bad(
            lambda g, call=call, peer=peer: call(g, peer(g)),
            argument,
            "a rank in the group, 0 to ",
            "{W}" if text == "W" else text,
        )
        for name, (argument, call) in PEERS.items()
        for text, peer in ranks.items()
    }
    for name in POINT_TO_POINT:
        argument, call = PEERS[name]
        own = "another rank than the caller's own"
        found[f"{name}: oneself"] = Bad(
            lambda g, call=call: call(g, g.rank_in_group), argument, own, "{r}"
        )
    return found


def wrong_dims() -> dict[str, Bad]:
    found = {
        f"{name}: dim {dim}": Bad(
            lambda g, call=call, dim=dim: call(g, dim, rows_for_all(g)),
            "dim",
            "between -2 and 1",
            repr(dim),
        )
        for name, call in WITH_DIM.items()
        for dim in (2, -3, 0.0, True)
    }
    for name, call in WITH_DIM.items():
        found[f"{name}: dim of a scalar"] = Bad(
            lambda g, call=call: call(g, 0, floats()), "dim", "given a tensor with dims", "0"
        )
    return found


# Calls with outputs, and the rows that their outputs should have.
OUTPUTS: list[tuple[dict[str, Any], Callable[[GroupCoordinator], int]]] = [
    (SHARES, lambda g: 2),
    (GATHERED, lambda g: 2 * g.world_size),
]


def wrong_outputs() -> dict[str, Bad]:
    found = {}
    for calls, rows in OUTPUTS:
        for name, (argument, call) in calls.items():
            found[f"{name}: output of the wrong shape"] = Bad(
                lambda g, call=call, rows=rows: call(g, floats(rows(g), 4)),
                argument,
                "of shape [",
                ", 4]",
            )
            found[f"{name}: output of too many dims"] = Bad(
                lambda g, call=call, rows=rows: call(g, floats(rows(g), 1, 3)),
                argument,
                "of shape [",
                ", 1, 3]",
            )
            found[f"{name}: output of the wrong dtype"] = Bad(
                lambda g, call=call, rows=rows: call(g, floats(rows(g), 3).double()),
                argument,
                "of dtype torch.float32",
                "torch.float64",
            )
            found[f"{name}: output not contiguous"] = Bad(
                lambda g, call=call, rows=rows: call(g, columns(rows(g), 3)),
                argument,
                "contiguous, because it is written in place",
                "strides (1, ",
            )
    return found


def wrong_sizes() -> dict[str, Bad]:
    calls: dict[str, Callable[[GroupCoordinator, torch.Tensor, Any], object]] = {
        "all_gatherv": lambda g, x, sizes: g.all_gatherv(x, sizes),
        "reduce_scatterv": lambda g, x, sizes: g.reduce_scatterv(x, sizes),
    }
    sizes: dict[str, Callable[[GroupCoordinator], list[Any]]] = {
        "too few": lambda g: [2] * (g.world_size - 1),
        "too many": lambda g: [2] * (g.world_size + 1),
        "negative": lambda g: [*equal_sizes(g)[1:], -2],
        "not ints": lambda g: [*equal_sizes(g)[1:], 2.0],
    }
    found = {
        f"{name}: sizes {text}": Bad(
            lambda g, call=call, make=make: call(g, rows_for_all(g), make(g)),
            "sizes",
            "{W} non-negative row counts, one per rank",
            "[",
        )
        for name, call in calls.items()
        for text, make in sizes.items()
    }
    found["all_gatherv: rows unlike the own size"] = Bad(
        lambda g: g.all_gatherv(floats(3, 5), equal_sizes(g)),
        "x",
        "of 2 rows, the own entry of sizes [2",
        "shape [3, 5]",
    )
    found["reduce_scatterv: rows unlike the sum"] = Bad(
        lambda g: g.reduce_scatterv(floats(1, 5), equal_sizes(g)),
        "x",
        "rows, the sum of sizes [2",
        "shape [1, 5]",
    )
    for name, call in calls.items():
        found[f"{name}: scalar"] = Bad(
            lambda g, call=call: call(g, floats(), equal_sizes(g)),
            "x",
            "of at least one dim",
            "a scalar",
        )
    return found


def wrong_splits() -> dict[str, Bad]:
    splits: dict[str, Callable[[GroupCoordinator], list[Any]]] = {
        "too few": lambda g: [2] * (g.world_size - 1),
        "too many": lambda g: [*equal_sizes(g), 0],
        "negative": lambda g: [*equal_sizes(g)[1:], -2],
        "of another sum": lambda g: [*equal_sizes(g)[1:], 3],
        "not ints": lambda g: [*equal_sizes(g)[1:], 2.0],
    }
    calls: dict[str, Callable[[GroupCoordinator, Any], object]] = {
        "input_splits": lambda g, s: g.all_to_all_single(
            rows_for_all(g), rows_for_all(g), equal_sizes(g), s
        ),
        "output_splits": lambda g, s: g.all_to_all_single(
            rows_for_all(g), rows_for_all(g), s, equal_sizes(g)
        ),
    }
    found = {
        f"all_to_all_single: {argument} {text}": Bad(
            lambda g, call=call, make=make: call(g, make(g)),
            argument,
            "{W} non-negative row counts with the sum ",
            "[",
        )
        for argument, call in calls.items()
        for text, make in splits.items()
    }
    uneven = "rows don't divide by the group size {W}"
    found["all_to_all_single: rows that don't divide"] = Bad(
        lambda g: g.all_to_all_single(rows_for_all(g), floats(2 * g.world_size + 1, 3)),
        "input_splits",
        uneven,
        "None",
        alone=False,
    )
    found["all_to_all_single: output rows that don't divide"] = Bad(
        lambda g: g.all_to_all_single(floats(2 * g.world_size + 1, 3), rows_for_all(g)),
        "output_splits",
        uneven,
        "None",
        alone=False,
    )
    found["all_to_all_single: not to itself what it gets of itself"] = Bad(
        lambda g: g.all_to_all_single(
            rows_for_all(g), rows_for_all(g), three_of_own(g), equal_sizes(g)
        ),
        "output_splits",
        "the rows that the caller sends to itself",
        "[",
        alone=False,
    )
    found["all_to_all_single: overlap"] = Bad(
        lambda g: g.all_to_all_single(*overlapping_rows(g)),
        "output",
        "in other memory than input",
        "overlapping tensors",
        alone=False,
    )
    found["all_to_all_single: scalar"] = Bad(
        lambda g: g.all_to_all_single(floats(1), floats()), "input", "at least one dim", "a scalar"
    )
    return found


def wrong_inputs() -> dict[str, Bad]:
    indivisible = "divisible by the group size {W} in dim 0"
    return {
        "reduce_scatter: rows that don't divide": Bad(
            lambda g: g.reduce_scatter(floats(2 * g.world_size + 1, 3), 0),
            "x",
            indivisible,
            ", 3]",
            alone=False,
        ),
        "reduce_scatter_tensor: rows that don't divide": Bad(
            lambda g: g.reduce_scatter_tensor(floats(2, 3), floats(2 * g.world_size + 1, 3)),
            "input",
            indivisible,
            ", 3]",
            alone=False,
        ),
        "reduce_scatter_tensor: scalar": Bad(
            lambda g: g.reduce_scatter_tensor(floats(1), floats()), "input", indivisible, "shape []"
        ),
        "broadcast: into an expanded tensor": Bad(
            lambda g: g.broadcast(floats(2, 1).expand(2, 3)),
            "x",
            "whose elements don't share memory, because it is written in place",
            "strides (1, 0) for shape [2, 3]",
        ),
        "recv: another dtype than the output's": Bad(
            lambda g: g.recv(floats(2), torch.float64), "dtype", "float32, as out's", "float64"
        ),
        "recv: a shape without a dtype": Bad(
            lambda g: g.recv((2, 3)), "dtype", "given with a shape", "None"
        ),
        "recv: a negative size": Bad(
            lambda g: g.recv((2, -1), torch.int32),
            "shape_or_out",
            "of non-negative sizes",
            "[2, -1]",
        ),
        "recv: output not contiguous": Bad(
            lambda g: g.recv(columns(2, 3)), "out", "contiguous", "strides (1, 2)", alone=False
        ),
    }


BAD = {
    **wrong_ops(),
    **wrong_dtypes(),
    **wrong_devices(),
    **wrong_peers(),
    **wrong_dims(),
    **wrong_outputs(),
    **wrong_sizes(),
    **wrong_splits(),
    **wrong_inputs(),
}


def call_badly(group: GroupCoordinator, bad: Bad) -> None:
    values = {"W": group.world_size, "r": group.rank_in_group}
    with pytest.raises(ArgumentError) as caught:
        bad.call(group)
    error = caught.value
    text = str(error)
    assert isinstance(error, ValueError), text
    assert error.argument == bad.argument, text
    assert error.member == group.member, text
    assert bad.requirement.format(**values) in error.requirement, text
    assert bad.got.format(**values) in str(error.actual), text
    assert f"{error.argument} must be {error.requirement}; got {error.actual} [" in text
    place = f"rank {group.rank} ({group.rank_in_group} of {group.world_size})"
    assert text.endswith(f" [group '{group.name}', {place}]"), text


def assert_group_works(group: GroupCoordinator) -> None:
    assert group.all_reduce(torch.ones(2)).tolist() == [group.world_size] * 2


def recover_from(state: ParallelState, case: str) -> None:
    bad = BAD[case]
    for name in GROUPS:
        group = group_named(state, name)
        if group.world_size == 1 and not bad.alone:
            continue
        call_badly(group, bad)
        assert_group_works(group)
        if group.is_last_rank:  # the others don't notice
            call_badly(group, bad)
        assert_group_works(group)


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_argument_is_named_and_the_group_still_works(job: Job, case: str):
    job.run(recover_from, case)


def keep_outputs(state: ParallelState) -> None:
    """Outputs of calls that were refused because of another argument."""
    group = state.cp
    out = torch.full((4, 3), 7.0)
    refused: list[Callable[[], object]] = [
        lambda: group.all_reduce(out, "mean", out),
        lambda: group.all_gather_into_tensor(out, torch.ones(3, 3)),
        lambda: group.all_gatherv(torch.ones(2, 3), [2, 3], out),
        lambda: group.reduce_scatter_tensor(out, torch.ones(8, 3, dtype=torch.bool)),
        lambda: group.all_to_all_single(out, torch.ones(4, 3), [2, 2], [2, 3]),
        lambda: group.broadcast(out, 2),
        lambda: group.recv(out, src=2),
    ]
    for call in refused:
        with pytest.raises(ArgumentError):
            call()
        assert (out == 7.0).all()


def test_a_refused_call_leaves_its_output_alone(job: Job):
    job.run(keep_outputs)
