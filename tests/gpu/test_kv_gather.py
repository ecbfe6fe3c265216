"""KV gathers on GPUs: every method's bits, order between streams, reuse, graphs, memory.

A wrong order must show as wrong data: outputs are poisoned, and inputs come late on one rank.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from distcomm import (
    ArgumentError,
    ContextParallelPlan,
    DistcommError,
    GroupCoordinator,
    ParallelState,
    PipelinedKvGather,
    SymmetricMismatchError,
    all_gather_kv,
    all_gather_kv_into_cache,
)
from tests.gpu.job import start
from tests.gpu.test_streams import DELAY_CYCLES
from tests.kv_cases import random_case, same_bits, whole_batch
from tests.worker_pool import WorkerPool, fresh_init_method

METHODS = ("collective", "kernel", "copy_engine", "auto")
DIRECT = ("kernel", "copy_engine")
POISON = -7.0


@contextmanager
def kv_job(rank: int, world: int, url: str, **options: Any) -> Iterator[ParallelState]:
    """A job whose ranks are all context-parallel."""
    options = {"cp": world, "symmetric_reserve": "512MiB", "timeout": 30, **options}
    with start(rank, world, url, **options) as state:
        yield state


def gathered(result: Any, num_tensors: int) -> list[torch.Tensor]:
    return [result] if num_tensors == 1 else list(result)


def late(group: GroupCoordinator, trial: int) -> None:
    """The current stream of one rank, another one each time, falls behind by about 10 ms."""
    if group.rank_in_group == trial % group.world_size:
        torch.cuda._sleep(DELAY_CYCLES)


# ---- what comes out -----------------------------------------------------------------------------


def random_batches(rank: int, world: int, url: str) -> None:
    with kv_job(rank, world, url) as state:
        group, rng = state.cp, random.Random(world)
        for number in range(120):
            case = random_case(rng, world)
            method = METHODS[number % len(METHODS)]
            whole = [x.to(state.device) for x in whole_batch(case)]
            mine = [case.plan.shard(x, rank) for x in whole]
            if number % 5 == 2:  # rows of a wider tensor, as of a fused projection
                mine = [torch.stack((x, x), dim=1)[:, 1] for x in mine]
            stream = torch.cuda.Stream() if number % 3 == 1 else None
            result: Any = all_gather_kv(group, case.plan, *mine, stream=stream, method=method)
            results = gathered(result if stream is None else result.wait(), len(whole))
            assert all(map(same_bits, results, whole)), (number, method, case)
        ops = group.stats()["ops"]["all_gather_kv"]
        assert set(ops) == {"pynccl", "kernel", "copy_engine"}
        assert group.stats()["fallbacks"] == {}
        assert_signals_at_rest(group)


def assert_signals_at_rest(group: GroupCoordinator) -> None:
    torch.cuda.synchronize()
    group.barrier()
    channel = group.peer_channel()
    assert not isinstance(channel, str)
    assert channel.signals_are_at_rest()


def caches(rank: int, world: int, url: str) -> None:
    with kv_job(rank, world, url) as state:
        group, rng = state.cp, random.Random(100 + world)
        for number in range(60):
            case = random_case(rng, world)
            num_tokens = case.plan.num_tokens
            num_slots = num_tokens + rng.randrange(20) + 1
            chosen = rng.sample(range(num_slots), num_tokens)
            slots = torch.tensor(
                [-1 if rng.random() < 0.2 else slot for slot in chosen],
                dtype=rng.choice([torch.int32, torch.int64]),
                device=state.device,
            )
            whole = [x.to(state.device) for x in whole_batch(case)]
            with group.symmetric_memory():
                into = [x.new_zeros((num_slots, *x.shape[1:])) for x in whole]
            expected = [cache.clone() for cache in into]
            wanted = slots >= 0
            for cache, x in zip(expected, whole, strict=True):
                cache[slots[wanted].long()] = x[wanted]
            mine = [case.plan.shard(x, rank) for x in whole]
            method = ("kernel", "collective", "auto")[number % 3]
            stream = torch.cuda.Stream() if number % 2 else None
            result: Any = all_gather_kv_into_cache(
                group, case.plan, mine, into, slots, stream=stream, method=method, validate=True
            )
            if stream is not None:
                result.wait()
            assert all(map(same_bits, into, expected)), (number, method, case)


# ---- order --------------------------------------------------------------------------------------


def beside_the_caller(rank: int, world: int, url: str) -> None:
    """The gather waits for what the caller did before, and the caller waits for the gather."""
    with kv_job(rank, world, url) as state:
        group, plan = state.cp, ContextParallelPlan([1000, 37], world)
        tokens = torch.arange(1037.0, device=state.device)[:, None].expand(-1, 64).contiguous()
        side = torch.cuda.Stream()
        with group.symmetric_memory():
            out = torch.empty_like(tokens)
        for trial in range(24):
            method = METHODS[trial % len(METHODS)]
            mine = plan.shard(tokens, rank).fill_(POISON)
            out.fill_(POISON)
            late(group, trial)
            mine.copy_(plan.shard(tokens + trial, rank))  # the gather must wait for this
            handle = all_gather_kv(group, plan, mine, out=out, stream=side, method=method)
            unrelated = torch.ones(64, 64, device=state.device) @ tokens[:64]
            result = handle.wait()
            assert result is out
            copy = result.clone()  # and this for the gather
            mine.fill_(POISON)
            assert torch.equal(copy, tokens + trial), (trial, method)
            assert (unrelated[0] == tokens[:64].sum(0)).all()


def peers_still_read(rank: int, world: int, url: str, method: str) -> None:
    """A rank that is behind still reads what the next gather overwrites: 10,000 calls."""
    with kv_job(rank, world, url) as state:
        group, plan = state.cp, ContextParallelPlan([64, 3, 1], world)
        tokens = torch.arange(68, device=state.device)[:, None].repeat(1, 32)
        with group.symmetric_memory():
            out = torch.empty_like(tokens)
        mine = plan.shard(tokens, rank)
        shards = mine.clone()
        num_wrong = torch.zeros((), dtype=torch.int64, device=state.device)
        for trial in range(10_000):
            if trial % 500 == 0:
                late(group, trial // 500)
            torch.add(shards, trial, out=mine)
            all_gather_kv(group, plan, mine, out=out, method=method)
            if trial % 500 == 250:
                late(group, trial // 500)  # between the gather and the reader
            num_wrong += (out != tokens + trial).sum()
        assert int(num_wrong) == 0
        assert_signals_at_rest(group)


def methods_take_turns(rank: int, world: int, url: str) -> None:
    """Methods, grids and streams of one group change from call to call."""
    with kv_job(rank, world, url) as state:
        group, rng = state.cp, random.Random(5)
        streams = [None, torch.cuda.Stream(), torch.cuda.Stream()]
        plans = [ContextParallelPlan([n], world) for n in (1, 100, 5000)]
        whole = [torch.randn(p.num_tokens, 8, 128, device=state.device) for p in plans]
        for x in whole:
            group.broadcast(x)
        with group.symmetric_memory():
            outs = [torch.empty_like(x) for x in whole]
        for trial in range(600):
            which, method, stream = rng.randrange(3), rng.choice(METHODS), rng.choice(streams)
            if trial % 50 == 0:
                late(group, trial // 50)
            mine = plans[which].shard(whole[which], rank)
            result: Any = all_gather_kv(
                group, plans[which], mine, out=outs[which], stream=stream, method=method
            )
            if stream is not None:
                result.wait()
            if trial % 10 == 0:
                assert torch.equal(outs[which], whole[which]), (trial, method)
                outs[which].fill_(POISON)
        assert_signals_at_rest(group)


def streams_of_one_group(rank: int, world: int, url: str) -> None:
    """Calls on streams that nothing else orders run one after another."""
    with kv_job(rank, world, url) as state:
        group, plan = state.cp, ContextParallelPlan([700, 33], world)
        tokens = torch.arange(733.0, device=state.device)[:, None].repeat(1, 128)
        streams = torch.cuda.Stream(), torch.cuda.Stream()
        wrong = torch.zeros(2, dtype=torch.int64, device=state.device)
        with group.symmetric_memory():
            outs = [torch.full_like(tokens, POISON) for _ in streams]
        mine = [plan.shard(tokens, rank) for _ in streams]
        shards = mine[0].clone()
        plan.prepare(group)
        torch.cuda.synchronize()
        for trial in range(40):
            for number, stream in enumerate(streams):
                value = 10 * trial + number
                with torch.cuda.stream(stream):
                    late(group, trial + number)  # one rank here, another one on the other stream
                    torch.add(shards, value, out=mine[number])
                    method = DIRECT[trial // 2 % 2]
                    all_gather_kv(group, plan, mine[number], out=outs[number], method=method)
                    wrong[number] += (outs[number] != tokens + value).sum()
        torch.cuda.synchronize()
        assert wrong.tolist() == [0, 0]
        assert_signals_at_rest(group)


def index_tensors_on_another_stream(rank: int, world: int, url: str) -> None:
    """What one stream makes late, another one waits for."""
    with kv_job(rank, world, url) as state:
        for trial in range(5):
            plan = ContextParallelPlan([3000 + trial, 77], world)
            with torch.cuda.stream(torch.cuda.Stream()):
                torch.cuda._sleep(DELAY_CYCLES)
                plan.token_indices(rank, state.device)
            with torch.cuda.stream(torch.cuda.Stream()):
                copy = plan.token_indices(rank, state.device).clone()
                assert torch.equal(copy.cpu(), plan.token_indices(rank))


def two_groups_at_once(rank: int, world: int, url: str) -> None:
    with kv_job(rank, world, url) as state:
        other = state.create_group("reversed", list(reversed(range(world))))
        groups = (state.cp, other)
        streams = (torch.cuda.Stream(), torch.cuda.Stream())
        plan = ContextParallelPlan([512, 33], world)
        tokens = torch.arange(545, device=state.device)[:, None].repeat(1, 256)
        for trial in range(60):
            method = DIRECT[trial % 2]
            handles = []
            for number, (group, stream) in enumerate(zip(groups, streams, strict=True)):
                late(group, trial)
                mine = plan.shard(tokens, group.rank_in_group) + trial * 10 + number
                handles.append(all_gather_kv(group, plan, mine, stream=stream, method=method))
            for number, handle in enumerate(handles):
                assert torch.equal(handle.wait(), tokens + trial * 10 + number), (trial, method)


def pipelined(rank: int, world: int, url: str) -> None:
    with kv_job(rank, world, url) as state:
        group, plan = state.cp, ContextParallelPlan([300, 41], world)
        tokens = torch.arange(341.0, device=state.device)[:, None].repeat(1, 128)
        for method in METHODS:
            pipeline = PipelinedKvGather(group, 400, method=method)
            wrong = torch.zeros((), dtype=torch.int64, device=state.device)
            mine = plan.shard(tokens, rank)
            pipeline.start(plan, mine)
            for layer in range(100):
                result = pipeline.finish()
                assert isinstance(result, torch.Tensor)
                if layer < 99:
                    pipeline.start(plan, mine + layer + 1)
                if layer % 20 == 0:
                    late(group, layer // 20)  # this layer's compute, beside the next gather
                wrong += (result != tokens + layer).sum()
            assert int(wrong) == 0, method


def own_rows_beside(rank: int, world: int, url: str) -> None:
    """Many rows of the rank's own are copied on another stream, in order all the same."""
    with kv_job(rank, world, url, symmetric_reserve="1GiB") as state:
        group, plan = state.cp, ContextParallelPlan([3000 * world + 5, 7], world)
        num_tokens = plan.num_tokens
        tokens = torch.arange(num_tokens, device=state.device)[:, None].repeat(1, 512)
        shards, wrong = plan.shard(tokens, rank), torch.zeros_like(tokens[0, 0])
        with group.symmetric_memory():
            out = torch.empty_like(tokens)
        mine = torch.empty_like(shards)
        graph = torch.cuda.CUDAGraph()

        def gather() -> None:
            all_gather_kv(group, plan, mine, out=out, method="copy_engine")
            mine.fill_(-1)

        gather()
        with group.graph_capture() as c, torch.cuda.graph(graph, stream=c.stream):
            gather()
        for trial in range(24):
            late(group, trial)
            torch.add(shards, trial, out=mine)
            out.fill_(-1)
            gather() if trial % 2 else graph.replay()
            wrong += (out != tokens + trial).sum()
        assert int(wrong) == 0
        assert_signals_at_rest(group)


# ---- graphs -------------------------------------------------------------------------------------


def captured(rank: int, world: int, url: str) -> None:
    """Replays give what eager calls give, with other inputs, and eager calls in between."""
    with kv_job(rank, world, url) as state:
        group, plan = state.cp, ContextParallelPlan([500, 0, 77], world)
        tokens = torch.arange(577.0, device=state.device)[:, None].repeat(1, 96)
        shards = plan.shard(tokens, rank)
        for method in METHODS:
            x = shards.clone()
            with group.symmetric_memory():
                out = torch.empty_like(tokens)
            all_gather_kv(group, plan, x, out=out, method=method)  # tables and signals
            graph = torch.cuda.CUDAGraph()
            with group.graph_capture() as c, torch.cuda.graph(graph, stream=c.stream):
                made = all_gather_kv(group, plan, x * 2, method=method)
                all_gather_kv(group, plan, x, out=out, method=method)
                doubled = out * 2
            wrong = torch.zeros((), dtype=torch.int64, device=state.device)
            for trial in range(200):
                torch.add(shards, trial, out=x)
                if trial % 40 == 0:
                    late(group, trial // 40)
                graph.replay()
                wrong += (made != 2 * (tokens + trial)).sum()
                wrong += (doubled != 2 * (tokens + trial)).sum()
                if trial % 7 == 0:
                    eager = all_gather_kv(group, plan, shards, method=method)
                    wrong += (eager != tokens).sum()
            assert int(wrong) == 0, method
            del graph, made, doubled
        assert_signals_at_rest(group)


def captured_beside(rank: int, world: int, url: str) -> None:
    """A side stream that forks from the capture and joins it."""
    with kv_job(rank, world, url) as state:
        group, plan = state.cp, ContextParallelPlan([640], world)
        tokens = torch.arange(640.0, device=state.device)[:, None].repeat(1, 64)
        x, side = plan.shard(tokens, rank), torch.cuda.Stream()
        for method in METHODS:
            all_gather_kv(group, plan, x, stream=side, method=method).wait()
            graph = torch.cuda.CUDAGraph()
            with group.graph_capture() as c, torch.cuda.graph(graph, stream=c.stream):
                handle = all_gather_kv(group, plan, x, stream=side, method=method)
                beside = x * 3
                result = handle.wait() + 1
            for _ in range(50):
                graph.replay()
            assert torch.equal(result, tokens + 1), method
            assert torch.equal(beside, x * 3)
            del graph, handle, result, beside


def captured_without_its_plan(rank: int, world: int, url: str) -> None:
    """A graph goes on when the plan that it was captured with is gone."""
    with kv_job(rank, world, url) as state:
        group, tokens = state.cp, torch.arange(900.0, device=state.device)[:, None].repeat(1, 64)
        for method in ("collective", "kernel"):
            plan = ContextParallelPlan([890, 10], world)
            x = plan.shard(tokens, rank)
            all_gather_kv(group, plan, x, method=method)
            sizes = {plan.token_indices(rank).nbytes, plan.token_order().nbytes}
            graph = torch.cuda.CUDAGraph()
            with group.graph_capture() as c, torch.cuda.graph(graph, stream=c.stream):
                result = all_gather_kv(group, plan, x, method=method)
            del plan
            torch.cuda.synchronize()
            # What would take the place of its index tensors skips every row.
            others = [torch.full((size // 8,), -1, device=state.device) for size in sizes] * 8
            result.fill_(POISON)
            graph.replay()
            assert torch.equal(result, tokens), method
            del graph, result, others


def in_a_symmetric_context(rank: int, world: int, url: str) -> None:
    """What differs between ranks in size isn't symmetric, so that what follows lies alike."""
    with kv_job(rank, world, url) as state:
        group = state.cp
        for trial in range(6):
            plan = ContextParallelPlan([1] * 40 + [100 + trial], world)  # rank 0 has 40 tokens more
            tokens = torch.arange(float(plan.num_tokens), device=state.device)
            shard = plan.shard(tokens, rank)[:, None].expand(-1, 4096)  # no row is in one piece
            with group.symmetric_memory():
                result = all_gather_kv(group, plan, shard, method=METHODS[trial % len(METHODS)])
                after = torch.empty(1 << 20, device=state.device)
            assert torch.equal(result, tokens[:, None].expand(-1, 4096))
            places = group.all_gather_object(group.placement(after))
            assert places == [places[0]] * world, trial
            assert places[0] is not None


def unsymmetric_later_on(rank: int, world: int, url: str) -> None:
    """Where buffers are compared before every call, those of a known plan are, too."""
    with kv_job(rank, world, url, verify_symmetric=True) as state:
        group, plan = state.cp, ContextParallelPlan([64], world)
        tokens = torch.arange(64.0, device=state.device)
        x = plan.shard(tokens, rank)
        with group.symmetric_memory():
            buffers = [torch.full_like(tokens, POISON) for _ in range(2)]
        for method in DIRECT:
            all_gather_kv(group, plan, x, out=buffers[0], method=method)
            with pytest.raises(SymmetricMismatchError):
                all_gather_kv(group, plan, x, out=buffers[rank == 1], method=method)
            torch.cuda.synchronize()
            assert torch.equal(buffers[0], tokens)
            assert (buffers[1] == POISON).all()


def capture_error(
    group: GroupCoordinator, plan: ContextParallelPlan, x: torch.Tensor, out: torch.Tensor
) -> str:
    try:
        with group.graph_capture() as c:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=c.stream):
                all_gather_kv(group, plan, x, out=out, method="kernel")
    except DistcommError as error:
        return str(error)
    return "none"


def capture_unprepared(rank: int, world: int, url: str) -> None:
    """A first call in a capture is an error that says so, and the next capture works."""
    with kv_job(rank, world, url, symmetric_reserve=0) as state:
        group, plan = state.cp, ContextParallelPlan([64], world)
        tokens = torch.arange(64.0, device=state.device)
        x = plan.shard(tokens, rank)
        with group.symmetric_memory():
            out = torch.empty_like(tokens)
        assert "can't be captured" in capture_error(group, plan, x, out)
        assert torch.equal(all_gather_kv(group, plan, x, method="kernel"), tokens)
        other = ContextParallelPlan([64], world)
        assert "call prepare(group)" in capture_error(group, other, x, out)
        other.prepare(group)
        graph = torch.cuda.CUDAGraph()
        with group.graph_capture() as c, torch.cuda.graph(graph, stream=c.stream):
            result = all_gather_kv(group, other, x, method="kernel")
        graph.replay()
        assert torch.equal(result, tokens)


# ---- memory, fallbacks, errors ------------------------------------------------------------------


def memory(rank: int, world: int, url: str) -> None:
    """A gather straight into place takes the output, and nothing else; steady state nothing."""
    with kv_job(rank, world, url) as state:
        group, plan = state.cp, ContextParallelPlan([4096], world)
        x = torch.zeros(plan.tokens_per_rank[rank], 8, 128, device=state.device)
        for method in DIRECT:
            result = all_gather_kv(group, plan, x, method=method)
            assert group.is_symmetric(result)
            num_bytes = result.nbytes
            del result
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            made = state.symmetric_pool.stats()["segments_made"]
            side = torch.cuda.Stream()
            for trial in range(40):
                if trial % 2:
                    all_gather_kv(group, plan, x, method=method, stream=side).wait()
                else:
                    all_gather_kv(group, plan, x, method=method)
            assert torch.cuda.max_memory_allocated() - before <= num_bytes
            assert state.symmetric_pool.stats()["segments_made"] == made


def frozen(rank: int, world: int, url: str) -> None:
    """No room: the collective, on all ranks, counted."""
    with kv_job(rank, world, url, symmetric_reserve="16MiB") as state:
        group, plan = state.cp, ContextParallelPlan([100_000], world)
        tokens = torch.arange(100_000, device=state.device)[:, None].repeat(1, 64)  # 51 MB
        x = plan.shard(tokens, rank)
        state.symmetric_pool.freeze()
        assert torch.equal(all_gather_kv(group, plan, x), tokens)
        reason = "the outputs are ordinary memory"
        assert group.stats()["fallbacks"] == {"all_gather_kv": {reason: 1}}
        with pytest.raises(ArgumentError, match=r"possible here.*outputs are ordinary"):
            all_gather_kv(group, plan, x, method="kernel")
        small = ContextParallelPlan([10], world)
        mine = small.shard(tokens[:10], rank)
        assert torch.equal(all_gather_kv(group, small, mine, method="kernel"), tokens[:10])


def two_hosts(rank: int, world: int, url: str) -> None:
    """Ranks out of reach: the collective, on all ranks, counted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_HOSTID", f"host{rank}")
        two_hosts_job(rank, world, url)


def two_hosts_job(rank: int, world: int, url: str) -> None:
    with kv_job(rank, world, url, timeout=60) as state:
        group, plan = state.cp, ContextParallelPlan([100], world)
        tokens = torch.arange(100, device=state.device)
        x = plan.shard(tokens, rank)
        assert torch.equal(all_gather_kv(group, plan, x), tokens)
        (reason,) = group.stats()["fallbacks"]["all_gather_kv"]
        assert "within reach" in reason
        with pytest.raises(ArgumentError, match="within reach"):
            all_gather_kv(group, plan, x, method="copy_engine")


def ordinary_output(rank: int, world: int, url: str) -> None:
    with kv_job(rank, world, url) as state:
        group, plan = state.cp, ContextParallelPlan([100], world)
        tokens = torch.arange(100, device=state.device)
        x, out = plan.shard(tokens, rank), torch.empty_like(tokens)
        for method in DIRECT:
            with pytest.raises(ArgumentError, match="the outputs are ordinary memory"):
                all_gather_kv(group, plan, x, out=out, method=method)
        assert all_gather_kv(group, plan, x, out=out) is out
        assert torch.equal(out, tokens)
        on_cpu = all_gather_kv(group, plan, x.cpu())
        assert torch.equal(on_cpu, tokens.cpu())
        with pytest.raises(ArgumentError, match="stream must be a CUDA stream"):
            all_gather_kv(group, plan, x, stream=torch.cpu.Stream())


def unsymmetric_outputs(rank: int, world: int, url: str) -> None:
    """Outputs at different places are found before anything is written."""
    with kv_job(rank, world, url) as state:
        group, plan = state.cp, ContextParallelPlan([64], world)
        tokens = torch.arange(64.0, device=state.device)
        with group.symmetric_memory():
            buffers = [torch.full_like(tokens, POISON) for _ in range(2)]
        with pytest.raises(DistcommError, match=r"(?s)ranks \[1\] differ.*segment #\d+ at"):
            all_gather_kv(group, plan, plan.shard(tokens, rank), out=buffers[rank == 1])
        torch.cuda.synchronize()
        assert all((buffer == POISON).all() for buffer in buffers)


EVERY_WORLD = (random_batches, caches, beside_the_caller, captured, two_groups_at_once)
MOST_RANKS = (
    methods_take_turns,
    streams_of_one_group,
    index_tensors_on_another_stream,
    own_rows_beside,
    pipelined,
    captured_beside,
    captured_without_its_plan,
    in_a_symmetric_context,
    unsymmetric_later_on,
    capture_unprepared,
    memory,
    frozen,
    ordinary_output,
    unsymmetric_outputs,
)


@pytest.mark.parametrize("function", EVERY_WORLD, ids=lambda function: function.__name__)
def test_kv_gather(gpus: WorkerPool, world: int, function: Callable[..., None]) -> None:
    gpus.run(function, fresh_init_method(), ranks=world)


@pytest.mark.parametrize("function", MOST_RANKS, ids=lambda function: function.__name__)
def test_kv_gather_of_most_ranks(
    gpus: WorkerPool, most_ranks: int, function: Callable[..., None]
) -> None:
    gpus.run(function, fresh_init_method(), ranks=most_ranks)


@pytest.mark.parametrize("method", METHODS)
def test_peers_still_read(gpus: WorkerPool, most_ranks: int, method: str) -> None:
    gpus.run(peers_still_read, fresh_init_method(), method, ranks=most_ranks)


def test_two_hosts() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    with WorkerPool(2, timeout_s=120) as fresh:  # NCCL asks for its host once per process
        fresh.run(two_hosts, fresh_init_method())
