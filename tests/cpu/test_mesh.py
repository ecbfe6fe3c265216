"""`DeviceMesh`, in and out: layouts of meshes, meshes of groups, and what torch does with them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import distcomm
from distcomm import (
    ArgumentError,
    DistcommError,
    GroupClosedError,
    GroupMember,
    LayoutError,
    NotInitializedError,
    ParallelLayout,
    ParallelState,
)
from distcomm.agreement import LayoutWish
from distcomm.communicators import GroupCommunicators
from distcomm.current import init_world
from distcomm.layout import AXES
from distcomm.mesh import describe_mesh, layout_of_mesh, make_device_mesh
from tests.cpu.job import TIMEOUT_S, Job
from tests.worker_pool import WorkerPool, fresh_init_method

ORDERS = ["-".join(names) for names in itertools.permutations(["tp", "cp", "pp", "dp"])]


@contextmanager
def torch_rank(rank: int, world_size: int) -> Iterator[None]:
    """torch takes this process for a rank of a job, whose groups send nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


# Layouts of meshes


@pytest.mark.parametrize(
    ("dims", "given", "expected"),
    [
        ({"tp": 8}, {}, {"tp": 8}),
        ({"dp": 8}, {}, {"dp": 8}),
        ({"dp": 2, "tp": 4}, {}, {"tp": 4, "dp": 2}),
        ({"tp": 4, "dp": 2}, {}, {"tp": 4, "dp": 2, "order": "dp-tp-cp-pp"}),
        ({"pp": 2, "dp": 2, "tp": 2}, {}, {"tp": 2, "pp": 2, "dp": 2, "order": "tp-dp-pp-cp"}),
        ({"dp": 2, "pp": 2, "tp": 2}, {}, {"tp": 2, "pp": 2, "dp": 2}),
        ({"dp": 1, "pp": 1, "cp": 1, "tp": 8}, {}, {"tp": 8}),
        ({"tp": 8, "pp": 1, "dp": 1}, {}, {"tp": 8}),
        ({"dp": 2, "cp": 2, "tp": 2}, {}, {"tp": 2, "cp": 2, "dp": 2, "cp_layout": "beside_tp"}),
        ({"cp": 2, "tp": 4}, {}, {"tp": 4, "cp": 2, "cp_layout": "beside_tp"}),
        ({"tp": 4, "cp": 2}, {}, {"tp": 4, "cp": 2, "order": "cp-tp-pp-dp"}),
        ({"cp": 8}, {}, {"cp": 8, "cp_layout": "beside_tp"}),
        ({"cp": 8}, {"cp_layout": "inside_tp"}, {"cp": 8, "tp": 8, "cp_layout": "inside_tp"}),
        ({"cp": 2, "attn_tp": 4}, {}, {"tp": 8, "cp": 2, "cp_layout": "inside_tp"}),
        ({"cp": 2, "attn_tp": 4}, {"cp_layout": "beside_tp"}, {"tp": 4, "cp": 2}),
        ({"dp": 2, "cp": 2, "attn_tp": 2}, {}, {"tp": 4, "cp": 2, "dp": 2}),
        (
            {"cp": 2, "attn_tp": 2, "dp": 2},
            {},
            {"tp": 4, "cp": 2, "dp": 2, "order": "dp-tp-cp-pp"},
        ),
        ({"cp": 8, "attn_tp": 1}, {}, {"tp": 8, "cp": 8, "cp_layout": "inside_tp"}),
        ({"dp": 2, "attn_tp": 4}, {}, {"tp": 4, "dp": 2}),
        ({"ep": 4, "moe_tp": 2}, {}, {"tp": 8, "ep": 4}),
        ({"dp": 2, "ep": 4}, {}, {"tp": 4, "ep": 4, "dp": 2}),
        ({"dp": 2, "moe_tp": 4}, {}, {"tp": 4, "dp": 2}),
        ({"cp": 2, "ep": 2, "moe_tp": 2}, {}, {"tp": 4, "cp": 2, "ep": 2}),
        # What the mesh leaves open, other arguments say.
        ({"tp": 8}, {"cp": 2, "ep": 4}, {"tp": 8, "cp": 2, "ep": 4, "cp_layout": "inside_tp"}),
        ({"cp": 2, "attn_tp": 4}, {"ep": 2}, {"tp": 8, "cp": 2, "ep": 2}),
        ({"dp": 2, "tp": 4}, {"tp": 4, "dp": 2, "order": "cp-tp-pp-dp"}, {"tp": 4, "dp": 2}),
    ],
)
def test_layout_of_a_mesh(dims: dict[str, int], given: dict[str, Any], expected: dict[str, Any]):
    for rank in range(8):
        with torch_rank(rank, 8):
            layout = layout_of(mesh_of(**dims), **given)
            wanted = ParallelLayout(8, **expected)
            assert layout.cp_layout == wanted.cp_layout
            assert layout.groups_of(rank) == wanted.groups_of(rank)
            assert layout.order == given.get("order", wanted.order)


def layout_of(mesh: DeviceMesh, **given: Any) -> ParallelLayout:
    options = {name: given.pop(name) for name in ("order", "cp_layout") if name in given}
    return layout_of_mesh(mesh, dist.get_world_size(), given, **options)


@pytest.mark.parametrize(
    ("dims", "given", "argument", "problem"),
    [
        ({"dp": 2, "tp": 4}, {"tp": 2}, "tp", "left out, or 4 as in DeviceMesh(dp=2, tp=4)"),
        ({"dp": 2, "tp": 4}, {"pp": 2}, "pp", "left out, or 1 as in"),
        ({"cp": 2, "attn_tp": 4}, {"cp": 4}, "cp", "left out, or 2"),
        ({"cp": 2, "attn_tp": 4}, {"tp": 4}, "tp", "left out, or 8"),
        ({"ep": 2, "moe_tp": 4}, {"ep": 4}, "ep", "left out, or 2"),
        ({"dp": 2, "tp": 4}, {"tp": "four"}, "tp", "got 'four'"),
        ({"tp": 4, "dp": 2}, {"order": "tp-pp-cp-dp"}, "order", "or like 'dp-tp-cp-pp' as in"),
        ({"cp": 2, "tp": 4}, {"cp_layout": "inside_tp"}, "cp_layout", "'beside_tp' or left out"),
        ({"cp": 2, "attn_tp": 2, "tp": 2}, {}, "mesh", "or its parts attn_tp and cp, or its parts"),
        ({"ep": 2, "tp": 4}, {}, "mesh", "got dims ep, tp"),
        ({"ep": 2, "attn_tp": 4}, {}, "mesh", "got dims ep, attn_tp"),
        ({"attn_tp": 4, "cp": 2}, {}, "mesh", "has ranks [[0, 4], [1, 5], [2, 6], [3, 7]]"),
        ({"cp": 2, "dp": 2, "attn_tp": 2}, {}, "mesh", "one that a layout has"),
        ({"moe_tp": 2, "ep": 4}, {}, "mesh", "has ranks [[0, 2, 4, 6], [1, 3, 5, 7]]"),
        ({"dp": 2, "attn_tp": 4}, {"cp": 2}, "mesh", "one that a layout has"),
        ({"data": 2, "tp": 4}, {}, "mesh", "distinct ones of tp, cp, attn_tp"),
        ({"tp": 4}, {}, "mesh", "each of the job's 8 ranks once"),
    ],
)
def test_meshes_and_arguments_that_fit_no_layout(
    dims: dict[str, int], given: dict[str, Any], argument: str, problem: str
):
    for rank in (0, 7):
        with torch_rank(rank, 8):
            with pytest.raises(ArgumentError) as caught:
                layout_of(mesh_of(**dims), **given)
            assert caught.value.argument == argument, caught.value
            assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "names", "problem"),
    [
        ([[0, 1], [3, 2]], ("dp", "tp"), "has ranks [[0, 1], [2, 3]]"),
        ([3, 2, 1, 0], ("tp",), "DeviceMesh(tp=4) of cpu ranks [3, 2, 1, 0]"),
        ([0, 2, 1, 3], ("tp",), "one that a layout has"),
        ([[0, 1], [2, 3]], None, "mesh_dim_names None"),
        ([[0, 1]], ("dp", "tp"), "each of the job's 4 ranks once"),
        ([2, 3], ("tp",), "each of the job's 4 ranks once"),
    ],
)
def test_meshes_of_ranks_that_fit_no_layout(
    ranks: list[Any], names: tuple[str, ...] | None, problem: str
):
    for rank in range(4):
        with torch_rank(rank, 4):
            with pytest.raises(ArgumentError) as caught:
                layout_of(DeviceMesh("cpu", ranks, mesh_dim_names=names))
            assert problem in str(caught.value)


def test_what_is_no_mesh_of_this_job():
    with torch_rank(2, 4):
        mesh = mesh_of(dp=2, tp=2)
        with pytest.raises(ArgumentError, match="each of the job's 4 ranks once"):
            layout_of(mesh["tp"])
        with pytest.raises(ArgumentError, match="a torch DeviceMesh; got a list"):
            layout_of([[0, 1], [2, 3]])
        with pytest.raises(LayoutError, match="ep must divide tp"):
            layout_of(mesh, ep=3)
        with pytest.raises(LayoutError, match="order must name each"):
            layout_of(mesh, order="tp-dp")
        part = mesh["tp"]
    with pytest.raises(ArgumentError, match="of a job that has ended"):
        layout_of_mesh(part, 4, {})


def test_large_meshes_are_described_in_short():
    with torch_rank(0, 1024):
        mesh, other = mesh_of(dp=128, tp=8), torch.arange(1024).reshape(128, 8)
        other[100, 3:5] = other[100, 3:5].flip(0)
        texts = [
            describe_mesh(each)
            for each in (mesh, DeviceMesh("cpu", other, mesh_dim_names=("dp", "tp")))
        ]
        assert layout_of(mesh).groups_of(1023) == ParallelLayout(1024, tp=8, dp=128).groups_of(1023)
    assert all(len(text) < 200 for text in texts)
    assert texts[0] != texts[1]


# Meshes of groups


class FakeGroup(NamedTuple):
    """A coordinator's side of a group, of process groups that send nothing."""

    cpu_group: dist.ProcessGroup
    device_group: dist.ProcessGroup
    device: torch.device = torch.device("cpu")


def fake_groups(layout: ParallelLayout, rank: int) -> dict[str, FakeGroup]:
    ranks = {"world": range(layout.world_size), **layout.groups_of(rank)}
    return {
        axis: FakeGroup(dist.new_group(list(each)), dist.new_group(list(each)))
        for axis, each in ranks.items()
    }


LAYOUTS = [
    {"tp": 4, "cp": 2, "pp": 2, "cp_layout": "inside_tp", "dp": 2},
    {"tp": 2, "cp": 2, "pp": 2, "cp_layout": "beside_tp", "dp": 2},
    {"tp": 4, "ep": 2, "pp": 1, "dp": 4},
]
WHOLE = {  # axes that have all ranks, outermost first
    "inside_tp": [("dp", "pp", "tp"), ("pp", "dp", "cp", "attn_tp"), ("dp", "pp", "ep", "moe_tp")],
    "beside_tp": [("dp", "pp", "cp", "tp"), ("cp", "dp", "pp", "attn_tp")],
}


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_a_mesh_of_all_axes_makes_the_same_layout(sizes: dict[str, Any]):
    for order, rank in zip(ORDERS, itertools.cycle((0, 6, 15))):
        layout = ParallelLayout(16, order=order, **sizes)
        with torch_rank(rank, 16):
            groups = fake_groups(layout, rank)
            for axes in WHOLE[layout.cp_layout]:
                mesh = make_device_mesh(layout, groups, axes)
                assert mesh.mesh_dim_names == axes
                assert mesh.shape == tuple(layout.size(axis) for axis in axes)
                left_open = {n: getattr(layout, n) for n in ("cp", "ep") if n not in axes}
                again = layout_of(mesh, cp_layout=layout.cp_layout, **left_open)
                assert again.groups_of(rank) == layout.groups_of(rank), (order, axes)


@pytest.mark.parametrize("sizes", LAYOUTS)
def test_meshes_of_all_combinations_of_axes(sizes: dict[str, Any]):
    """Each is what it has to be, or refused because its dims would share ranks."""
    num_made = 0
    for order, rank in (("tp-cp-pp-dp", 11), ("pp-tp-dp-cp", 6)):
        layout = ParallelLayout(16, order=order, **sizes)
        with torch_rank(rank, 16):
            groups = fake_groups(layout, rank)
            for number in (1, 2, 3):
                for axes in itertools.permutations(AXES, number):
                    num_made += made_or_refused(layout, groups, axes, rank)
            for axes in itertools.combinations(AXES, 4):
                num_made += made_or_refused(layout, groups, axes, rank)
    assert num_made > 100


def made_or_refused(
    layout: ParallelLayout, groups: dict[str, FakeGroup], axes: tuple[str, ...], rank: int
) -> bool:
    own = {axis: layout.group_of(axis, rank) for axis in axes}
    several = [{*own[axis]} for axis in axes if layout.size(axis) > 1]
    shared = any(len(one & other) > 1 for one, other in itertools.combinations(several, 2))
    both_splits = bool({"cp", "attn_tp"} & {*axes} and {"ep", "moe_tp"} & {*axes})
    try:
        mesh = make_device_mesh(layout, groups, axes)
    except ArgumentError:
        return not (shared or both_splits) and pytest.fail(f"{axes} refused for {layout!r}")
    assert not shared
    assert len({*mesh.mesh.flatten().tolist()}) == mesh.size()
    for dim, axis in enumerate(axes):
        assert mesh.get_group(axis) is groups[axis].device_group
        assert mesh.get_local_rank(axis) == layout.coordinates(rank)[axis]
        place = list(mesh.get_coordinate())
        place[dim] = slice(None)
        assert tuple(mesh.mesh[tuple(place)].tolist()) == own[axis]
        assert mesh[axis].mesh.tolist() == list(own[axis])
        assert mesh[axis].get_group() is groups[axis].device_group
    assert [*mesh._get_root_mesh().mesh.flatten().sort().values] == [*range(layout.world_size)]
    return True


@pytest.mark.parametrize(
    ("axes", "problem"),
    [
        (("dp", "cp", "tp"), "cp lies inside tp: ask for 'dp', 'cp', 'attn_tp'"),
        (("tp", "attn_tp"), "attn_tp lies inside tp: ask for 'cp', 'attn_tp'"),
        (("tp", "ep"), "ep lies inside tp: ask for 'moe_tp', 'ep'"),
        (("cp", "moe_tp"), "of one way to split tp: into cp and attn_tp, or into ep and moe_tp"),
        (("world", "dp"), "'world' alone"),
        (("dp", "dp"), "dp and dp are the same"),
        (("pp", "x"), "at least one of world, tp, cp,"),
        (("dp", 3), "at least one of world, tp, cp,"),
        ((), "got none"),
    ],
)
def test_axes_that_do_not_lie_side_by_side(axes: tuple[Any, ...], problem: str):
    layout = ParallelLayout(16, tp=8, cp=2, ep=4, dp=2)
    with torch_rank(3, 16):
        with pytest.raises(ArgumentError) as caught:
            make_device_mesh(layout, fake_groups(layout, 3), axes)
    assert problem in str(caught.value)


def test_two_names_of_the_same_ranks():
    layout = ParallelLayout(8, tp=4, cp=2, cp_layout="beside_tp")
    with torch_rank(3, 8):
        groups = fake_groups(layout, 3)
        with pytest.raises(ArgumentError, match="tp and attn_tp are the same"):
            make_device_mesh(layout, groups, ("tp", "attn_tp"))
        mesh = make_device_mesh(layout, groups, ("cp", "attn_tp"))
        assert mesh.mesh.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert make_device_mesh(layout, groups, ("world",)).mesh.tolist() == [*range(8)]


# With groups of real ranks


@contextmanager
def torch_job(rank: int, world_size: int, url: str) -> Iterator[None]:
    """torch's default process group; at its end no state is in force."""
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        distcomm.destroy_distributed()
        dist.destroy_process_group()


def start_on(mesh: Any, **options: Any) -> ParallelState:
    return distcomm.init_distributed(mesh=mesh, timeout=TIMEOUT_S, **options)


def groups_of_a_mesh(
    rank: int, world_size: int, url: str, dims: dict[str, int], options: dict[str, Any]
) -> ParallelLayout:
    with torch_job(rank, world_size, url):
        theirs, x = mesh_of(**dims), torch.tensor([2.0**rank])
        with start_on(theirs, **options) as state:
            assert state.device.type == "cpu"
            ours = state.device_mesh(*dims)
            assert torch.equal(ours.mesh, theirs.mesh)
            for axis in dims:
                group = state.groups[axis]
                assert group.ranks == dist.get_process_group_ranks(theirs.get_group(axis))
                assert ours.get_group(axis) is group.device_group
                assert group.all_reduce(x).item() == sum(2**each for each in group.ranks)
            assert state.world.all_reduce(x).item() == 2**world_size - 1
        for axis, size in dims.items():  # the caller's groups survive
            total = torch.ones(1)
            dist.all_reduce(total, group=theirs.get_group(axis))
            assert total.item() == size
        return state.layout


@pytest.mark.parametrize(
    ("dims", "options", "expected"),
    [
        ({"dp": 2, "tp": 4}, {}, {"tp": 4, "dp": 2}),
        ({"tp": 2, "dp": 2, "pp": 2}, {}, {"tp": 2, "pp": 2, "dp": 2, "order": "pp-dp-tp-cp"}),
        ({"dp": 2, "cp": 2, "attn_tp": 2}, {"ep": 2}, {"tp": 4, "cp": 2, "dp": 2, "ep": 2}),
        ({"pp": 1, "cp": 2, "tp": 4}, {"tp": 4}, {"tp": 4, "cp": 2}),
    ],
)
def test_groups_of_a_mesh(
    workers: WorkerPool, dims: dict[str, int], options: dict[str, Any], expected: dict[str, Any]
):
    url = fresh_init_method()
    layouts = workers.run(groups_of_a_mesh, url, dims, options, ranks=8)
    assert layouts == [ParallelLayout(8, **expected)] * 8


def two_halves(rank: int, world_size: int, url: str) -> None:
    with torch_job(rank, world_size, url):
        with init_world(device="cpu", timeout=TIMEOUT_S) as state:
            for dims in ({"dp": 2, "tp": 2}, {"tp": 2, "dp": 2}):
                mesh = mesh_of(**dims)
                state.lay_out(LayoutWish({}, mesh=mesh))
                assert torch.equal(state.device_mesh(*dims).mesh, mesh.mesh)
                state.clear_layout()
            wish = LayoutWish({"tp": 4 if rank == 1 else 1}, mesh=mesh)
            with pytest.raises(DistcommError, match="tp must be left out, or 2"):
                state.lay_out(wish)
            assert not state.is_laid_out


def test_a_mesh_for_the_second_half(workers: WorkerPool):
    workers.run(two_halves, fresh_init_method(), ranks=4)


def mismatched(
    rank: int, world_size: int, url: str, kind: str
) -> tuple[str, str, list[int] | None]:
    with torch_job(rank, world_size, url):
        mesh, other = mesh_of(dp=2, tp=2), mesh_of(tp=2, dp=2)
        partial = DeviceMesh("cpu", [0, 1], mesh_dim_names=("tp",))
        on_meta = copy.copy(mesh)
        on_meta._device_type = "meta"
        of_all = {"partial": partial, "slice": mesh["tp"]}
        of_rank_2 = {"other": other, "none": None, "no mesh": "tp", "part of it": partial}
        of_rank_2 |= {"device": on_meta}
        wrong = {**of_all, **(of_rank_2 if rank == 2 else {})}
        sizes = {"tp": 4} if (kind, rank) == ("contradicted", 2) else {}
        with pytest.raises(DistcommError) as caught:
            start_on(wrong.get(kind, mesh), **sizes)
        assert not distcomm.is_initialized()
        with start_on(other) as state:  # the same ranks go on with what is right
            assert state.tp.all_reduce(torch.ones(1)).item() == 2
    failures = getattr(caught.value, "failures", None)
    return type(caught.value).__name__, str(caught.value), failures and [*failures]


@pytest.mark.parametrize("kind", ["partial", "slice"])
def test_a_mesh_of_some_ranks_is_refused_on_all(workers: WorkerPool, kind: str):
    for error, text, _ in workers.run(mismatched, fresh_init_method(), kind, ranks=4):
        assert error == "ArgumentError"
        assert "mesh must be one that has each of the job's 4 ranks once" in text


@pytest.mark.parametrize(
    ("kind", "error", "problem"),
    [
        ("other", "InitializationError", "mesh is DeviceMesh(tp=2, dp=2) of cpu ranks [[0, 1]"),
        ("none", "LayoutError", "world_size must be"),
        ("no mesh", "ArgumentError", "a torch DeviceMesh; got a str"),
        ("part of it", "ArgumentError", "DeviceMesh(tp=2) of cpu ranks [0, 1]"),
        ("contradicted", "ArgumentError", "tp must be left out, or 2"),
        ("device", "ArgumentError", "device must be one of auto, cuda, cpu; got 'meta'"),
    ],
)
def test_a_mesh_that_one_rank_has_differently_fails_on_all(
    workers: WorkerPool, kind: str, error: str, problem: str
):
    results = workers.run(mismatched, fresh_init_method(), kind, ranks=4)
    for rank, (name, text, failures) in enumerate(results):
        assert name == (error if rank == 2 else "InitializationError"), text
        assert problem in text
        if name == "InitializationError":
            assert failures == [2]


# What torch does with our groups


@pytest.fixture(scope="module")
def job(workers: WorkerPool) -> Iterator[Job]:
    """Eight ranks: dp, cp and attn_tp of two each, the latter two inside tp."""
    job = Job(workers, 8, tp=4, cp=2, dp=2)
    yield job
    job.close()


def redistribute(state: ParallelState) -> None:
    whole = torch.arange(16.0 * 6).reshape(16, 6)
    mesh = state.device_mesh("dp", "cp", "attn_tp")
    groups_before = len(dist.distributed_c10d._world.pg_map)
    x = distribute_tensor(whole, mesh, [Shard(0), Shard(0), Shard(1)])
    rows, columns = whole.reshape(4, 4, 6), 2 * state.dp.rank_in_group + state.cp.rank_in_group
    c = 3 * state.attn_tp.rank_in_group
    assert torch.equal(x.to_local(), rows[columns][:, c : c + 3])
    assert torch.equal(x.full_tensor(), whole)
    y = x.redistribute(placements=[Replicate(), Shard(1), Replicate()])
    assert torch.equal(y.to_local(), whole[:, 3 * state.cp.rank_in_group :][:, :3])
    part = DTensor.from_local(whole * (state.rank + 1), mesh, [Partial()] * 3)
    assert torch.equal(part.full_tensor(), whole * 36)
    part = part.redistribute(placements=[Shard(0), Replicate(), Replicate()])
    assert torch.equal(part.to_local(), 36 * whole[8 * state.dp.rank_in_group :][:8])
    assert len(dist.distributed_c10d._world.pg_map) == groups_before

    tp = state.device_mesh("tp")  # this rank's: the other half of the job works beside it
    w = distribute_tensor(whole.T.contiguous(), tp, [Shard(1)])
    product = distribute_tensor(whole, tp, [Shard(1)]) @ w.redistribute(placements=[Shard(0)])
    assert torch.equal(product.full_tensor(), whole @ whole.T)


def test_dtensors_are_redistributed(job: Job):
    job.run(redistribute)


def slice_and_flatten(state: ParallelState) -> None:
    mesh = state.device_mesh("dp", "cp", "attn_tp")
    for axis in ("dp", "cp", "attn_tp"):
        group = state.groups[axis]
        assert mesh[axis].get_group() is group.device_group is group.cpu_group
        assert mesh[axis].get_local_rank() == group.rank_in_group
    assert mesh["cp", "attn_tp"].mesh.flatten().tolist() == state.tp.ranks
    flat = mesh["dp", "cp"]._flatten("dp_cp")
    assert flat.mesh.tolist() == [state.attn_tp.rank_in_group + 2 * i for i in range(4)]
    total = torch.tensor([1.0 + state.rank])
    dist.all_reduce(total, group=flat.get_group())
    assert total.item() == sum(1 + rank for rank in flat.mesh.tolist())
    # Also of a mesh that is only this rank's.
    flat = state.device_mesh("cp", "attn_tp")._flatten("all_of_tp")
    assert dist.get_process_group_ranks(flat.get_group()) == state.tp.ranks


def test_slices_and_flat_meshes(job: Job):
    job.run(slice_and_flatten)


def model() -> torch.nn.Sequential:
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))


def train_sharded(state: ParallelState, axes: tuple[str, ...]) -> None:
    """Three steps of FSDP on our groups give the weights that one process gets from all data."""
    mesh = state.device_mesh(*axes)
    whole, sharded = model(), model()
    for layer in (sharded[0], sharded[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    weight = sharded[0].weight
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape[0] == 16 // mesh.size(mesh.ndim - 1)
    data = torch.randn(mesh.size(), 5, 8, generator=torch.Generator().manual_seed(6))
    place = int((mesh.mesh.flatten() == state.rank).nonzero())
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (whole, sharded)]
    for _ in range(3):
        for each, x in ((whole, data.flatten(0, 1)), (sharded, data[place])):
            each(x).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for own, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(own.full_tensor(), expected)


@pytest.mark.parametrize("axes", [("world",), ("dp",), ("dp", "tp"), ("tp",)])
def test_fully_shard(job: Job, axes: tuple[str, ...]):
    job.run(train_sharded, axes)


def run_stages(state: ParallelState) -> None:
    mesh = state.device_mesh("pp", "tp")
    stage = state.pp.rank_in_group
    torch.manual_seed(7)
    layers = [torch.nn.Linear(6, 6) for _ in range(2)]
    group = mesh.get_group("pp")
    own = PipelineStage(layers[stage], stage, 2, torch.device("cpu"), group=group)
    schedule = ScheduleGPipe(own, n_microbatches=4)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(state.tp.rank_in_group))
    with torch.no_grad():
        y = schedule.step(x) if state.pp.is_first_rank else schedule.step()
        if state.pp.is_last_rank:
            torch.testing.assert_close(y, layers[1](layers[0](x)))


def test_pipeline_stages(workers: WorkerPool):
    job = Job(workers, 4, tp=2, pp=2)
    job.run(run_stages)
    job.close()


def use_after_closing(rank: int, world_size: int, url: str) -> None:
    with torch_job(rank, world_size, url):
        state = start_on(mesh_of(dp=2, tp=2))
        mesh = state.device_mesh("dp", "tp")
        with pytest.raises(ArgumentError, match="device_mesh: axes must be at least one of world"):
            state.device_mesh("data")
        state.clear_layout()
        with pytest.raises(NotInitializedError):
            state.device_mesh("dp")
        state.close()
        with pytest.raises(GroupClosedError, match="device_mesh"):
            state.device_mesh("dp")
        with pytest.raises(RuntimeError, match="Could not resolve the process group"):
            mesh.get_group("tp")


def test_a_mesh_ends_with_its_groups(workers: WorkerPool):
    workers.run(use_after_closing, fresh_init_method(), ranks=4)


def test_an_adopted_group_is_forgotten():
    job: Any = SimpleNamespace(device=torch.device("cuda", 0))
    communicators = GroupCommunicators(GroupMember("tp", (0,), 0), job, "name")
    theirs: Any = "the mesh's"
    with mock.patch.object(communicators, "_create", lambda backend: f"our own {backend}"):
        for _ in range(2):
            communicators.adopt_device_group(theirs)
            assert communicators.device_group == theirs
            communicators.forget_adopted()
        assert communicators.device_group == "our own nccl"
        communicators.adopt_device_group(theirs)
        communicators.forget_adopted()
        assert communicators.device_group == "our own nccl"


def clear_what_was_adopted(rank: int, world_size: int, url: str) -> None:
    """The group of all ranks stays, and the caller may destroy the mesh's of the same ranks."""
    with torch_job(rank, world_size, url):
        with start_on(mesh_of(tp=world_size)) as state:
            communicators = state.communicators[0]
            assert state.tp.cpu_group is state.world.cpu_group is communicators.cpu_group
            communicators.adopt_device_group(state.tp.cpu_group)
            with mock.patch.object(state.world, "forget_device_group") as forget:
                state.clear_layout()
            forget.assert_called_once_with()
            assert communicators._adopted is None


def test_what_was_adopted_goes_with_its_layout(workers: WorkerPool):
    workers.run(clear_what_was_adopted, fresh_init_method(), ranks=2)
