"""`distcomm.layout` against hand-written tables, a naive reference and its own promises."""

from __future__ import annotations

import ast
import doctest
import inspect
import itertools
import pickle
import re
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distcomm import layout as layout_module
from distcomm.errors import LayoutError
from distcomm.layout import AXES, ParallelLayout

ORDERS = ["-".join(names) for names in itertools.permutations(("tp", "cp", "pp", "dp"))]


def all_groups(layout: ParallelLayout) -> dict[str, list[tuple[int, ...]]]:
    return {axis: list(layout.groups(axis)) for axis in AXES}


# Hand-written tables


def test_the_docstrings_examples_are_true():
    result = doctest.testmod(layout_module)
    assert result.failed == 0
    assert result.attempted > 0


def test_cp_inside_tp_on_8_ranks():
    layout = ParallelLayout(world_size=8, tp=8, cp=2)
    assert layout.cp_layout == "inside_tp"
    alone = [(0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,)]
    assert all_groups(layout) == {
        "tp": [(0, 1, 2, 3, 4, 5, 6, 7)],
        "cp": [(0, 4), (1, 5), (2, 6), (3, 7)],
        "attn_tp": [(0, 1, 2, 3), (4, 5, 6, 7)],
        "pp": alone,
        "dp": alone,
        "ep": alone,
        "moe_tp": [(0, 1, 2, 3, 4, 5, 6, 7)],
    }
    assert layout.groups_of(6) == {
        "tp": (0, 1, 2, 3, 4, 5, 6, 7),
        "cp": (2, 6),
        "attn_tp": (4, 5, 6, 7),
        "pp": (6,),
        "dp": (6,),
        "ep": (6,),
        "moe_tp": (0, 1, 2, 3, 4, 5, 6, 7),
    }
    assert layout.coordinates(6) == {
        "tp": 6,
        "cp": 1,
        "attn_tp": 2,
        "pp": 0,
        "dp": 0,
        "ep": 0,
        "moe_tp": 6,
    }


def test_cp_beside_tp_on_16_ranks():
    layout = ParallelLayout(world_size=16, tp=8, cp=2)
    assert layout.cp_layout == "beside_tp"
    both_halves = [(0, 1, 2, 3, 4, 5, 6, 7), (8, 9, 10, 11, 12, 13, 14, 15)]
    assert list(layout.groups("tp")) == both_halves
    assert list(layout.groups("attn_tp")) == both_halves
    assert list(layout.groups("cp")) == [
        *[(0, 8), (1, 9), (2, 10), (3, 11)],
        *[(4, 12), (5, 13), (6, 14), (7, 15)],
    ]
    assert layout.group_of("cp", 0) == (0, 8)


def test_experts_on_8_ranks():
    layout = ParallelLayout(world_size=8, tp=8, ep=4)
    assert list(layout.groups("moe_tp")) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert list(layout.groups("ep")) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert layout.size("moe_tp") == 2


def test_sub_axes_follow_a_tp_group_that_is_not_contiguous():
    layout = ParallelLayout(world_size=16, tp=8, cp=2, pp=2, ep=4, order="pp-tp-cp-dp")
    assert list(layout.groups("tp")) == [
        (0, 2, 4, 6, 8, 10, 12, 14),
        (1, 3, 5, 7, 9, 11, 13, 15),
    ]
    assert list(layout.groups("pp"))[:3] == [(0, 1), (2, 3), (4, 5)]
    assert list(layout.groups("attn_tp")) == [
        *[(0, 2, 4, 6), (1, 3, 5, 7)],
        *[(8, 10, 12, 14), (9, 11, 13, 15)],
    ]
    assert list(layout.groups("cp"))[:3] == [(0, 8), (1, 9), (2, 10)]
    assert list(layout.groups("moe_tp"))[:4] == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert list(layout.groups("ep")) == [
        *[(0, 4, 8, 12), (1, 5, 9, 13)],
        *[(2, 6, 10, 14), (3, 7, 11, 15)],
    ]


def test_order_places_cp_only_beside_tp():
    inside = [ParallelLayout(8, tp=4, cp=2, dp=2, order=o) for o in ("cp-tp-dp-pp", "tp-dp-cp-pp")]
    assert all_groups(inside[0]) == all_groups(inside[1])
    beside = ParallelLayout(8, tp=4, cp=2, order="cp-tp-pp-dp")
    assert list(beside.groups("cp")) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert list(beside.groups("tp")) == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_auto_is_resolved_and_an_explicit_choice_is_kept():
    assert ParallelLayout(8, tp=8).cp_layout == "inside_tp"
    assert ParallelLayout(8, tp=8, cp_layout="beside_tp").cp_layout == "beside_tp"
    explicit = ParallelLayout(8, tp=8, cp=2, cp_layout="inside_tp")
    assert explicit == ParallelLayout(8, tp=8, cp=2)
    assert hash(explicit) == hash(ParallelLayout(8, tp=8, cp=2))


def test_a_layout_is_immutable_and_survives_pickling():
    layout = ParallelLayout(16, tp=8, cp=2, ep=2)
    with pytest.raises(AttributeError):
        layout.tp = 4  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(layout))
    assert copy == layout
    assert all_groups(copy) == all_groups(layout)


def test_it_imports_nothing_but_the_standard_library_and_errors():
    imported = set()
    for node in ast.walk(ast.parse(inspect.getsource(layout_module))):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
    foreign = {name for name in imported if name.split(".")[0] not in sys.stdlib_module_names}
    assert foreign == {"errors"}


# A naive reference: fill the world with coordinates, then collect the ranks that agree


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def small_launches() -> Iterator[dict[str, Any]]:
    for world_size in range(1, 17):
        for tp, pp in itertools.product(divisors(world_size), repeat=2):
            for cp_layout, ep in itertools.product(("inside_tp", "beside_tp"), divisors(tp)):
                rest, remainder = divmod(world_size, tp * pp)
                cps = divisors(tp if cp_layout == "inside_tp" else rest)
                for cp in cps if not remainder else []:
                    dp = rest if cp_layout == "inside_tp" else rest // cp
                    sizes = {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "ep": ep}
                    yield {"world_size": world_size, **sizes, "cp_layout": cp_layout}


def naive_groups(launch: dict[str, Any], order: str) -> dict[str, list[tuple[int, ...]]]:
    inside = launch["cp_layout"] == "inside_tp"
    dims = [name for name in order.split("-") if name != "cp" or not inside]
    slowest_first = dims[::-1]
    places = list(itertools.product(*(range(launch[name]) for name in slowest_first)))

    def agreeing_but_in(name: str) -> list[list[int]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            others = tuple(c for n, c in zip(slowest_first, place, strict=True) if n != name)
            groups.setdefault(others, []).append(rank)
        return list(groups.values())

    def chunks(groups: list[list[int]], size: int) -> list[list[int]]:
        return [g[i : i + size] for g in groups for i in range(0, len(g), size)]

    def columns(groups: list[list[int]], step: int) -> list[list[int]]:
        return [g[i::step] for g in groups for i in range(step)]

    tp = agreeing_but_in("tp")
    attn_tp = launch["tp"] // launch["cp"] if inside else launch["tp"]
    moe_tp = launch["tp"] // launch["ep"]
    found = {
        "tp": tp,
        "cp": columns(tp, attn_tp) if inside else agreeing_but_in("cp"),
        "attn_tp": chunks(tp, attn_tp),
        "pp": agreeing_but_in("pp"),
        "dp": agreeing_but_in("dp"),
        "ep": columns(tp, moe_tp),
        "moe_tp": chunks(tp, moe_tp),
    }
    return {axis: sorted(tuple(group) for group in groups) for axis, groups in found.items()}


@pytest.mark.parametrize("order", ORDERS)
def test_small_worlds_match_the_naive_reference(order: str):
    for launch in small_launches():
        layout = ParallelLayout(**launch, order=order)
        assert all_groups(layout) == naive_groups(launch, order), layout
        auto = ParallelLayout(**{**launch, "cp_layout": "auto"}, order=order)
        assert all_groups(auto) == all_groups(layout), layout


# Invariants


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    tp = draw(st.integers(1, 12))
    cp_layout = draw(st.sampled_from(["inside_tp", "beside_tp"]))
    inside = cp_layout == "inside_tp"
    cp = draw(st.sampled_from(divisors(tp)) if inside else st.integers(1, 4))
    pp, dp = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return ParallelLayout(
        world_size=tp * pp * dp * (1 if inside else cp),
        tp=tp,
        cp=cp,
        pp=pp,
        dp=dp,
        ep=draw(st.sampled_from(divisors(tp))),
        order=draw(st.sampled_from(ORDERS)),
        cp_layout=draw(st.sampled_from(["auto", cp_layout])),
    )


@settings(deadline=None)
@given(layouts())
def test_every_axis_partitions_the_world_in_order(layout: ParallelLayout):
    for axis in AXES:
        groups = list(layout.groups(axis))
        assert sorted(itertools.chain(*groups)) == list(range(layout.world_size))
        assert groups == sorted(groups)
        assert {len(group) for group in groups} == {layout.size(axis)}


@settings(deadline=None)
@given(layouts(), st.data())
def test_a_rank_is_found_at_its_coordinate(layout: ParallelLayout, data: st.DataObject):
    rank = data.draw(st.integers(0, layout.world_size - 1))
    coordinates = layout.coordinates(rank)
    groups = layout.groups_of(rank)
    assert list(coordinates) == list(groups) == list(AXES)
    for axis in AXES:
        assert layout.group_of(axis, rank)[coordinates[axis]] == rank
        assert groups[axis] == layout.group_of(axis, rank)
        assert groups[axis] in list(layout.groups(axis))


@settings(deadline=None)
@given(layouts())
def test_coordinates_tell_ranks_apart(layout: ParallelLayout):
    everyone = [tuple(layout.coordinates(r).values()) for r in range(layout.world_size)]
    assert len(set(everyone)) == layout.world_size


# Errors

ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"world_size": 12, "tp": 8, "cp": 2},
        [
            "world_size must be tp·pp·dp = 8 (inside_tp) or tp·cp·pp·dp = 16 (beside_tp); got 12",
            "[tp=8, cp=2, pp=1, dp=1, ep=1]",
            "inside_tp, tp·pp·dp = 8 ranks: torchrun --nproc-per-node 8 ...",
            "beside_tp, tp·cp·pp·dp = 16 ranks: torchrun --nnodes 2 --nproc-per-node 8 ...",
        ],
    ),
    (
        {"world_size": 24, "tp": 8, "cp": 2},
        ["got 24", "tp·pp·dp = 24 ranks: torchrun --nnodes 3 --nproc-per-node 8 ... with dp=3"],
    ),
    (
        {"world_size": 8, "tp": 8, "cp": 2, "cp_layout": "beside_tp"},
        [
            "world_size must be tp·cp·pp·dp = 16 (beside_tp); got 8",
            "tp·pp·dp = 8 ranks: torchrun --nproc-per-node 8 ... with cp_layout=inside_tp",
        ],
    ),
    (
        {"world_size": 16, "tp": 8, "cp": 2, "cp_layout": "inside_tp"},
        ["world_size must be tp·pp·dp = 8 (inside_tp); got 16", "with cp_layout=beside_tp"],
    ),
    (
        {"world_size": 8, "tp": 8, "cp": 3},
        [
            "cp must divide tp = 8 for inside_tp; got 3",
            "[tp=8, cp=3, pp=1, dp=1, ep=1]",
            "tp·pp·dp = 8 ranks: torchrun --nproc-per-node 8 ... with cp=2",
            "tp·cp·pp·dp = 24 ranks: torchrun --nnodes 3 --nproc-per-node 8 ...",
        ],
    ),
    (
        {"world_size": 8, "tp": 8, "ep": 3},
        [
            "ep must divide tp = 8; got 3",
            "[tp=8, cp=1, pp=1, dp=1, ep=3]",
            "torchrun --nproc-per-node 8 ... with ep=2",
        ],
    ),
    (
        {"world_size": 8, "tp": 8, "order": "tp-pp-dp"},
        ["order must name each of tp, cp, pp and dp once", "got 'tp-pp-dp'", "order=tp-cp-pp-dp"],
    ),
    ({"world_size": 8, "tp": 8, "order": "tp-tp-pp-dp"}, ["order must", "got 'tp-tp-pp-dp'"]),
    ({"world_size": 8, "tp": 8, "order": "tp-cp-pp-ep"}, ["order must", "got 'tp-cp-pp-ep'"]),
    ({"world_size": 8, "tp": 8, "order": "tp,cp,pp,dp"}, ["order must", "got 'tp,cp,pp,dp'"]),
    ({"world_size": 8, "tp": 8, "order": None}, ["order must", "got None"]),
    (
        {"world_size": 8, "tp": 8, "cp_layout": "outside"},
        ["cp_layout must be one of 'auto', 'inside_tp', 'beside_tp', 'adjacent_in_tp'; got"],
    ),
    ({"world_size": 8, "tp": 8, "cp_layout": ["auto"]}, ["cp_layout must", "got ['auto']"]),
]


@pytest.mark.parametrize(("arguments", "fragments"), ERRORS, ids=[str(a) for a, _ in ERRORS])
def test_arguments_that_make_no_layout(arguments: dict[str, Any], fragments: list[str]):
    with pytest.raises(LayoutError) as caught:
        ParallelLayout(**arguments)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("name", ["world_size", "tp", "cp", "pp", "dp", "ep"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_a_size_that_is_no_positive_int(name: str, value: object):
    with pytest.raises(LayoutError) as caught:
        ParallelLayout(**{"world_size": 8, "tp": 8, name: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert f"{name} must be a positive int; got {value!r}" in message
    assert "torchrun --nproc-per-node " in message
    if name != "world_size":
        assert f"{name}={value!r}" in message
        assert f"{name}=1" in message


@pytest.mark.parametrize("axis", ["sp", "", "TP", None, ["tp"]])
@pytest.mark.parametrize("call", ["size", "groups", "group_of"])
def test_an_unknown_axis(call: str, axis: object):
    layout = ParallelLayout(8, tp=8)
    arguments = (axis, 0) if call == "group_of" else (axis,)
    with pytest.raises(LayoutError, match=r"axis must be one of tp, cp, attn_tp, .*; got ") as e:
        getattr(layout, call)(*arguments)
    assert f"got {axis!r}" in str(e.value)
    assert "tp=8, cp=1, pp=1, dp=1, ep=1" in str(e.value)


@pytest.mark.parametrize("rank", [-1, 8, 1.0, "0", True, None])
@pytest.mark.parametrize("call", ["group_of", "groups_of", "coordinates"])
def test_a_rank_out_of_range(call: str, rank: object):
    layout = ParallelLayout(8, tp=8)
    arguments = ("tp", rank) if call == "group_of" else (rank,)
    with pytest.raises(LayoutError) as caught:
        getattr(layout, call)(*arguments)
    assert f"rank must be an int from 0 to 7; got {rank!r}" in str(caught.value)


LAUNCH = re.compile(
    r"  (?P<cp_layout>\w+), \S+ = (?P<ranks>\d+) ranks: "
    r"torchrun (?:--nnodes (?P<nodes>\d+) )?--nproc-per-node (?P<procs>\d+) \.\.\."
    r"(?: with (?P<changes>.+))?"
)
SIZES = ("tp", "cp", "pp", "dp", "ep")


@settings(max_examples=500, deadline=None)
@given(
    st.integers(-1, 60),
    st.fixed_dictionaries(dict.fromkeys(SIZES, st.integers(1, 9))),
    st.dictionaries(st.sampled_from(SIZES), st.sampled_from([0, -1, True, "4"]), max_size=1),
    st.sampled_from([*ORDERS, "tp-cp", ""]),
    st.sampled_from(["auto", "inside_tp", "beside_tp", "outside"]),
)
def test_launches_that_an_error_suggests_work(
    world_size: int, sizes: dict[str, Any], bad: dict[str, Any], order: str, cp_layout: str
):
    arguments = {**sizes, **bad, "order": order, "cp_layout": cp_layout}
    try:
        ParallelLayout(world_size, **arguments)
    except LayoutError as error:
        _, header, *lines = str(error).splitlines()
    else:
        return
    assert header == "Launches that work, nearest first:"
    assert lines
    distances = []
    for line in lines:
        launch = LAUNCH.fullmatch(line)
        assert launch, line
        ranks = int(launch["nodes"] or 1) * int(launch["procs"])
        assert ranks == int(launch["ranks"])
        changes = dict(c.split("=") for c in (launch["changes"] or "").split(", ") if c)
        changed = {n: int(v) if v.isdigit() else v for n, v in changes.items()}
        order_was_not_checked_yet = {"order": order if order in ORDERS else "tp-cp-pp-dp"}
        layout = ParallelLayout(ranks, **{**arguments, **order_was_not_checked_yet, **changed})
        assert layout.cp == 1 or layout.cp_layout == launch["cp_layout"]
        distances.append(abs(ranks - world_size))
    assert world_size < 1 or distances == sorted(distances)


# Cost

HUGE = {"tp": 8, "cp": 2, "pp": 1024, "ep": 4}


def traced_lines(call: Callable[[], object]) -> int:
    """How many lines of layout.py `call` runs."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if frame.f_code.co_filename != layout_module.__file__:
            return None
        count += event == "line"
        return trace

    earlier = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(earlier)
    return count


def one_ranks_view(world_size: int, rank: int, **sizes: int) -> None:
    layout = ParallelLayout(world_size, **sizes)
    layout.groups_of(rank)
    layout.coordinates(rank)
    for axis in AXES:
        layout.group_of(axis, rank)
        layout.size(axis)
        next(layout.groups(axis))


def test_one_rank_of_half_a_million_runs_no_more_lines_than_one_of_eight():
    small = traced_lines(lambda: one_ranks_view(32, 5, tp=8, cp=2, ep=4, pp=2, dp=2))
    huge = traced_lines(lambda: one_ranks_view(524_288, 400_005, dp=64, **HUGE))
    assert 0 < huge == small


def test_one_rank_of_half_a_million_allocates_only_its_groups():
    layout = ParallelLayout(524_288, dp=64, **HUGE)
    num_members = sum(layout.size(axis) for axis in AXES)
    tracemalloc.start()
    try:
        groups = layout.groups_of(400_005)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(map(len, groups.values())) == num_members < 2000
    bytes_per_int_and_its_slot = 48
    assert peak_bytes < bytes_per_int_and_its_slot * num_members + 8192


def test_a_trillion_ranks_are_no_obstacle():
    layout = ParallelLayout(1024**4, tp=1024, cp=1024, pp=1024, dp=1024)
    rank = 1024**4 - 1
    assert set(layout.coordinates(rank).values()) == {1023, 0}
    assert [len(group) for group in layout.groups_of(rank).values()] == [
        layout.size(axis) for axis in AXES
    ]
    assert next(layout.groups("dp"))[1] == 1024**3


def test_axes_that_coincide_are_listed_once():
    groups = ParallelLayout(8, tp=8).groups_of(3)
    assert groups["tp"] is groups["attn_tp"] is groups["moe_tp"]


# The table


def test_the_table_of_a_small_world_shows_every_group():
    assert str(ParallelLayout(4, tp=4, cp=2, ep=4)).splitlines() == [
        "4 ranks, cp inside_tp, order tp-cp-pp-dp",
        "axis     size  groups  ranks",
        "tp          4       1  [0..3]",
        "cp          2       2  [0,2] [1,3]",
        "attn_tp     2       2  [0,1] [2,3]",
        "pp          1       4  [0] [1] [2] [3]",
        "dp          1       4  [0] [1] [2] [3]",
        "ep          4       1  [0..3]",
        "moe_tp      1       4  [0] [1] [2] [3]",
    ]


def test_the_table_of_a_huge_world_stays_short():
    layout = ParallelLayout(524_288, dp=64, **HUGE)
    lines = layout.table().splitlines()
    assert len(lines) == 2 + len(AXES)
    assert max(map(len, lines)) <= 120
    assert lines[3] == "cp          2  262144  [0,4] [1,5] [2,6] ... [524283,524287]"
    assert lines[5].startswith("pp       1024     512  [0,8,..,8184] [1,9,..,8185] ")
    small = ParallelLayout(64, tp=8, dp=8)
    assert traced_lines(layout.table) <= 2 * traced_lines(small.table)
