"""Memory that sleeps on GPUs: content and addresses, what is given back, and what is refused."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from distcomm import ArgumentError, SleepablePool, SleepError, SleepOutOfMemoryError
from tests.worker_pool import WorkerPool

MIB = 1 << 20
SLACK = 4 * MIB  # what the driver may take for itself, as for page tables
WORDS = MIB // 4  # 1 MiB of int32


@contextmanager
def new_pool(device: object = None, **options: object) -> Iterator[SleepablePool]:
    """A pool of this test's own; what a former test has left is given back first."""
    gc.collect()
    torch.cuda.empty_cache()
    with SleepablePool(device, **options) as pool:
        yield pool
        stats = pool.stats()
        assert (stats["failed_releases"], stats["unknown_frees"]) == (0, 0)


def pattern(mib: int, seed: int, device: object = "cuda") -> torch.Tensor:
    """Of int32, so that equal means equal bits; all bits of a word vary."""
    return torch.arange(mib * WORDS, dtype=torch.int32, device=device) * (2654435 + 2 * seed) + seed


def made(pool: SleepablePool, tag: str, mib: int, seed: int) -> torch.Tensor:
    with pool.use(tag):
        x = torch.empty(mib * WORDS, dtype=torch.int32, device=pool.device)
    with torch.cuda.device(x.device):  # simulated GPUs work in the current one's streams
        return x.copy_(pattern(mib, seed, x.device))


def holds(x: torch.Tensor, seed: int) -> bool:
    with torch.cuda.device(x.device):
        return torch.equal(x, pattern(x.numel() // WORDS, seed, x.device))


def mapped(pool: SleepablePool) -> dict[str, int]:
    """MiB of GPU memory by tag."""
    return {tag: usage.mapped_bytes // MIB for tag, usage in pool.usage().items()}


class Probe:
    """Finds out under which tag of these pools this thread allocates now.

    Each probe is a segment of its own, as torch cuts none smaller than 20 MiB from this size on,
    and is kept, so that the next one isn't made in its place.
    """

    def __init__(self, *pools: SleepablePool) -> None:
        self._pools = pools
        self._kept: list[torch.Tensor] = []

    def __call__(self, device: object = "cuda") -> tuple[str, str] | None:
        """The pool's name and the tag; None if it is other memory."""
        before = [mapped(pool) for pool in self._pools]
        self._kept.append(torch.empty(12 * MIB, dtype=torch.uint8, device=device))
        grown = [
            (pool.name, tag)
            for pool, former in zip(self._pools, before, strict=True)
            for tag, mib in mapped(pool).items()
            if mib > former.get(tag, 0)
        ]
        assert len(grown) <= 1
        return grown[0] if grown else None


def free_bytes() -> int:
    """By the driver's count."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def cycles(rank: int, world: int) -> None:
    """50 times in mixed company: content, addresses, and what is held on the GPU and the host."""
    with new_pool() as pool:
        weights, adapter = made(pool, "weights", 72, 1), made(pool, "adapter", 12, 2)
        kv = made(pool, "kv", 24, 3)
        assert holds(kv, 3)
        places = [x.data_ptr() for x in (weights, adapter, kv)]
        asleep, awake, host = [], [], []
        for number in range(50):
            if number % 3 == 0:
                report = pool.sleep(("weights", "adapter"))
            else:  # in two steps, the second of which finds the first one's asleep
                report = pool.sleep(("adapter",), tags=("kv", "adapter"))
                assert (report.freed_bytes, report.offloaded_bytes) == (36 * MIB, 12 * MIB)
                report = pool.sleep(("weights", "adapter"))
                assert (report.freed_bytes, report.offloaded_bytes) == (72 * MIB, 72 * MIB)
            assert mapped(pool) == dict.fromkeys(("weights", "adapter", "kv"), 0)
            asleep.append(free_bytes())
            taken = pool.wake_up(("adapter",)) if number % 2 else 0
            assert taken + pool.wake_up() == 108 * MIB
            assert pool.asleep_tags == ()
            awake.append(free_bytes())
            host.append(pool.stats()["host_bytes"])
            assert [x.data_ptr() for x in (weights, adapter, kv)] == places
            assert holds(weights, 1 + number)
            assert holds(adapter, 2)
            weights.copy_(pattern(72, 2 + number))
            assert holds(kv.copy_(pattern(24, number)), number)
        for found in (asleep, awake):  # the first ones load kernels and make streams
            assert max(found[3:]) - min(found[3:]) <= SLACK, found
        freed = [more - less for more, less in zip(asleep[3:], awake[3:], strict=True)]
        assert all(abs(each - 108 * MIB) <= SLACK for each in freed), freed
        assert set(host) == {84 * MIB}
        assert pool.release_host_memory() == 84 * MIB
        assert pool.stats()["host_bytes"] == 0


def captured_graph(rank: int, world: int) -> None:
    """A graph that reads what was offloaded and writes what was discarded; also made in a `use`."""
    with new_pool() as pool:
        weights, kv = made(pool, "weights", 24, 1), made(pool, "kv", 12, 2)
        other = torch.zeros(WORDS, dtype=torch.int32, device="cuda")

        def step() -> torch.Tensor:
            kv.copy_(weights[: kv.numel()] + other[0])
            return kv.clone() + 1

        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[0]):
            first = step()
        with pool.use("kv"):
            usage = mapped(pool)["kv"]
            with torch.cuda.graph(graphs[1]):
                second = step()
            assert mapped(pool)["kv"] <= usage + 2  # graphs have memory of their own
        for number in range(3):
            other.fill_(number)
            for graph, result in zip(graphs, (first, second), strict=True):
                graph.replay()
                assert torch.equal(kv, pattern(12, 1) + number)
                assert torch.equal(result, pattern(12, 1) + number + 1)
            pool.sleep(("weights",))
            assert torch.equal(second, pattern(12, 1) + number + 1)
            pool.wake_up()
        del graphs, first, second


def refused_in_a_capture(rank: int, world: int) -> None:
    """The capture goes on, even when a tensor of the pool goes in it."""
    with new_pool() as pool:
        x, gone = made(pool, "weights", 4, 1), made(pool, "other", 24, 2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x + 1
            for call in (
                pool.sleep,
                pool.wake_up,
                pool.prepare_sleep,
                pool.use("weights").__enter__,
            ):
                with pytest.raises(SleepError, match="CUDA graph is being captured"):
                    call()
            del gone
            z = y + 1
        graph.replay()
        assert torch.equal(z, pattern(4, 1) + 2)
        assert pool.sleep(("weights",)).freed_bytes >= 4 * MIB
        assert mapped(pool) == {"weights": 0, "other": 0}
        pool.wake_up()
        x.add_(1)
        graph.replay()
        assert torch.equal(z, pattern(4, 1) + 3)
        del graph, y, z


def partial_tags(rank: int, world: int) -> None:
    """One tag sleeps while others are worked with; what is named wrongly changes nothing."""
    with new_pool() as pool:
        weights, kv = made(pool, "weights", 24, 1), made(pool, "kv", 32, 2)
        for arguments in (
            {"offload_tags": ("none",)},
            {"tags": ("none",)},
            {"tags": "kv"},
            {"offload_tags": ("weights",), "tags": ("kv",)},
        ):
            with pytest.raises(ArgumentError):
                pool.sleep(**arguments)
        assert mapped(pool) == {"weights": 24, "kv": 32}
        assert pool.sleep(tags=("kv",)).freed_bytes == 32 * MIB
        assert pool.asleep_tags == ("kv",)
        assert holds(weights, 1)
        with pytest.raises(SleepError, match="'kv' is asleep"), pool.use("kv"):
            pass
        more = made(pool, "weights", 12, 3)
        assert pool.sleep(("weights", "kv")).offloaded_bytes == 36 * MIB
        assert pool.usage()["kv"] == (0, 32 * MIB, 0)  # too late to keep it
        assert pool.usage()["weights"] == (0, 36 * MIB, 36 * MIB)
        assert pool.sleep().freed_bytes == 0
        assert pool.wake_up(("weights",)) == 36 * MIB
        assert pool.wake_up(("weights",)) == 0
        assert holds(weights, 1)
        assert holds(more, 3)
        assert pool.wake_up() == 32 * MIB
        assert holds(kv.copy_(pattern(32, 4)), 4)
        pool.prepare_sleep(("weights",))
        with pytest.raises(SleepError, match="under way"), pool.use("kv"):
            pass
        pool.cancel_sleep()
        assert holds(made(pool, "kv", 12, 5), 5)
        assert holds(weights, 1)


def freed(rank: int, world: int) -> None:
    """What nobody needs is given back: after a `use`, and while asleep with its addresses."""
    with new_pool() as pool:
        with pool.use("weights"):
            kept = pattern(24, 1)
            for mib in (48, 100, 3):
                torch.empty(mib * WORDS, device="cuda")
        assert mapped(pool) == {"weights": 24}
        kv = made(pool, "kv", 64, 2)
        with pool.use("kv"):
            small = torch.ones(100, device="cuda")
        assert mapped(pool) == {"weights": 24, "kv": 66}
        pool.sleep(("weights", "kv"))
        assert pool.stats()["free_host_bytes"] == 0
        del kv
        assert pool.wake_up() == 26 * MIB
        assert mapped(pool) == {"weights": 24, "kv": 2}
        assert pool.stats()["free_host_bytes"] == 90 * MIB
        assert small.sum().item() == 100
        assert holds(kept, 1)
        pool.sleep(("weights",))
        del small, kept
        torch.cuda.empty_cache()
        nothing = (0, 0, 0)
        assert pool.usage() == {"weights": nothing, "kv": nothing}
        assert pool.wake_up() == 0
        again = made(pool, "weights", 24, 3)
        place = again.data_ptr()
    assert again.data_ptr() == place
    assert holds(again, 3)  # outlives its closed pool
    with pytest.raises(SleepError, match="closed"), pool.use():
        pass
    del again
    torch.cuda.empty_cache()
    assert mapped(pool) == {"weights": 0, "kv": 0}


def errors_in_the_body(rank: int, world: int) -> None:
    """Whatever is raised, allocation goes on as before, and what was made stays."""
    with new_pool(name="pool") as pool:
        probe, kept = Probe(pool), []

        def body() -> None:
            with pytest.raises(KeyError), pool.use("b"):
                raise KeyError
            assert probe() == ("pool", "a")
            kept.append(pattern(12, 1))
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError), pool.use("a"):
            body()
        assert probe() is None
        for tag in ("", 3):
            with pytest.raises(ArgumentError), pool.use(tag):
                pass
        with pool.use("a"):
            for call in (pool.sleep, pool.wake_up, pool.close):
                with pytest.raises(SleepError, match="1 uses have not ended"):
                    call()
        assert probe() is None
        pool.sleep(("a",))
        pool.wake_up()
        assert holds(kept[0], 1)


def nested(rank: int, world: int) -> None:
    """The innermost tag and pool count."""
    with new_pool(name="one") as one, SleepablePool(name="two") as two:
        probe = Probe(one, two)
        with one.use("a"):
            with one.use("b"), one.use("a"):
                assert probe() == ("one", "a")
            with one.use("b"):
                with two.use("b"):
                    assert probe() == ("two", "b")
                    with one.use("b"):
                        assert probe() == ("one", "b")
                        kept = pattern(12, 1)
                    assert probe() == ("two", "b")
                assert probe() == ("one", "b")
            assert probe() == ("one", "a")
        assert probe() is None
        two.sleep()
        assert holds(kept, 1)
        one.sleep(("b",))
        two.wake_up()
        one.wake_up()
        assert holds(kept, 1)


def streams_and_threads(rank: int, world: int) -> None:
    """Sleep waits for work on other streams; each thread allocates for itself."""
    with new_pool(name="pool") as pool:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side), pool.use("weights"):
            x = torch.zeros(24 * WORDS, dtype=torch.int32, device="cuda")
            wanted = pattern(24, 1)
            torch.cuda._sleep(100_000_000)  # about 50 ms
            x.copy_(wanted)
        pool.sleep(("weights",))
        pool.wake_up()
        assert holds(x, 1)
        probe, found = Probe(pool), []
        inside, done = threading.Event(), threading.Event()

        def work() -> None:  # a new thread, whose current device is the first
            found.append(probe())
            with pool.use("other"):
                found.extend([probe(), pattern(12, 2)])
                inside.set()
                done.wait(20)
            found.append(probe())

        thread = threading.Thread(target=work)
        thread.start()
        assert inside.wait(20)
        assert probe() is None
        with pool.use("mine"):
            assert probe() == ("pool", "mine")
        with pytest.raises(SleepError, match="1 uses have not ended"):
            pool.sleep()
        done.set()
        thread.join(20)
        assert [found[0], found[1], found[3]] == [None, ("pool", "other"), None]
        pool.sleep(("weights", "other"))
        waker = threading.Thread(target=pool.wake_up)
        waker.start()
        waker.join(20)
        assert holds(x, 1)
        assert holds(found[2], 2)


def out_of_memory(rank: int, world: int) -> None:
    """The error says how much is missing; all stays asleep, and it can be tried again."""
    with new_pool(name="pool") as pool:
        weights, kv = made(pool, "weights", 128, 1), made(pool, "kv", 128, 2)
        place = kv.data_ptr()
        pool.sleep(("weights",))
        ballast = torch.empty(free_bytes() - 100 * MIB, dtype=torch.uint8, device="cuda")
        for tags, mib in ((None, 256), (("kv",), 128), (("weights",), 128)):
            with pytest.raises(SleepOutOfMemoryError) as caught:
                pool.wake_up(tags)
            error = caught.value
            assert error.needed_bytes == mib * MIB
            assert error.missing_bytes == mib * MIB - error.free_bytes
            assert abs(error.free_bytes - torch.cuda.mem_get_info()[0]) <= SLACK
            assert f"{error.missing_bytes} are missing" in str(error)
            assert isinstance(error, torch.OutOfMemoryError)
            assert pool.asleep_tags == ("weights", "kv")
            assert mapped(pool) == {"weights": 0, "kv": 0}
        del ballast
        torch.cuda.empty_cache()
        assert pool.wake_up() == 256 * MIB
        assert holds(weights, 1)
        assert kv.data_ptr() == place
        assert holds(kv.copy_(pattern(128, 3)), 3)
        probe = Probe(pool)
        with pool.use("kv"):
            with pytest.raises(SleepOutOfMemoryError) as caught, pool.use("more"):
                torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
            assert "use('more') of 'pool'" in str(caught.value)
            assert caught.value.needed_bytes == 1 << 40
            assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
            assert probe() == ("pool", "kv")
        assert mapped(pool) == {"weights": 128, "kv": 140, "more": 0}
        with pytest.raises(torch.OutOfMemoryError) as ordinary:
            torch.empty(1 << 40, dtype=torch.uint8, device="cuda")
        assert not isinstance(ordinary.value, SleepOutOfMemoryError)


@pytest.mark.parametrize(
    "function",
    [
        captured_graph,
        refused_in_a_capture,
        partial_tags,
        freed,
        errors_in_the_body,
        nested,
        streams_and_threads,
    ],
    ids=lambda function: function.__name__,
)
def test_on_one_gpu(gpus: WorkerPool, function: object) -> None:
    gpus.run(function, ranks=1)


@pytest.mark.alone
@pytest.mark.parametrize(
    "function", [cycles, out_of_memory], ids=lambda function: function.__name__
)
def test_free_memory(gpus: WorkerPool, function: object) -> None:
    gpus.reset()
    gpus.run(function, ranks=1)
