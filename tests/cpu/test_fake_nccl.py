"""The NCCL stand-in on its own: what its C ABI does, seen through ctypes by four processes."""

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import random
import struct
import time
import traceback
from pathlib import Path

import pytest

from tests.fake_nccl import fake_nccl_path

WORLD = 4
WAIT_S = 30
MIB = 1 << 20
BAD_ADDRESS = 0xDEADBEEF000  # what a failed ncclMemAlloc leaves

SUCCESS, UNHANDLED_CUDA_ERROR, INVALID_ARGUMENT, INVALID_USAGE, REMOTE_ERROR = 0, 1, 4, 5, 6
INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16, FP8 = range(11)
SUM, PROD, MAX, MIN, AVG = range(5)
FORMATS = dict(zip((INT8, UINT8, INT32, UINT32, INT64, UINT64), "bBiIqQ", strict=True))
FORMATS |= {FLOAT16: "e", FLOAT32: "f", FLOAT64: "d", BFLOAT16: "H", FP8: "B"}


class UniqueId(ctypes.Structure):
    _fields_ = [("internal", ctypes.c_byte * 128)]


class Nccl:
    """The library. Calls take ctypes values; a count must be a `size()`, since int is 32 bits."""

    def __init__(self, path):
        self.nccl = ctypes.CDLL(path)
        self.nccl.ncclCommInitRank.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int,
            UniqueId,
            ctypes.c_int,
        ]
        self.nccl.ncclGetLastError.restype = ctypes.c_char_p
        self.nccl.fake_nccl_live_bytes.restype = ctypes.c_long

    def __call__(self, function, *arguments):
        return getattr(self.nccl, function)(*arguments)

    def last_error(self):
        return self.nccl.ncclGetLastError(None).decode()

    def init(self, unique_id, rank, world=WORLD):
        comm = ctypes.c_void_p()
        unique_id = UniqueId.from_buffer_copy(unique_id)
        result = self("ncclCommInitRank", ctypes.byref(comm), world, unique_id, rank)
        return result, comm

    def allocate(self, num_bytes):
        memory = ctypes.c_void_p()
        result = self("ncclMemAlloc", ctypes.byref(memory), size(num_bytes))
        return result, memory

    def register(self, comm, address, num_bytes, flags=1):
        window = ctypes.c_void_p(BAD_ADDRESS)
        arguments = (ctypes.c_void_p(address), size(num_bytes), ctypes.byref(window), flags)
        return self("ncclCommWindowRegister", comm, *arguments), window

    def live(self):
        """Windows and MiB."""
        return self("fake_nccl_live_windows"), self("fake_nccl_live_bytes") / MIB


@contextlib.contextmanager
def environment(**variables):
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def size(count):
    return ctypes.c_size_t(count)


def encode(dtype, values):
    if dtype == BFLOAT16:
        values = [bfloat16(value) for value in values]
    return ctypes.create_string_buffer(
        struct.pack(f"{len(values)}{FORMATS[dtype]}", *values), len(values) * itemsize(dtype)
    )


def decode(dtype, buffer):
    values = list(struct.unpack(f"{len(buffer) // itemsize(dtype)}{FORMATS[dtype]}", buffer))
    return [to_float(value << 16) for value in values] if dtype == BFLOAT16 else values


def itemsize(dtype):
    return struct.calcsize(FORMATS[dtype])


def to_float(bits):
    return struct.unpack("f", struct.pack("I", bits))[0]


def float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def bfloat16(value):
    bits = struct.unpack("I", struct.pack("f", value))[0]
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


# ---- What runs in the ranks: each takes the library, a fresh unique id and the rank.


def with_comm(body):
    def run(nccl, unique_id, rank, *arguments):
        result, comm = nccl.init(unique_id, rank)
        assert result == SUCCESS, nccl.last_error()
        try:
            return body(nccl, comm, rank, *arguments)
        finally:
            assert nccl("ncclCommDestroy", comm) == SUCCESS
            assert nccl("fake_nccl_live_comms") == 0

    return run


@with_comm
def describe(nccl, comm, rank):
    values = [ctypes.c_int(-1) for _ in range(4)]
    nccl("ncclGetVersion", ctypes.byref(values[0]))
    nccl("ncclCommCount", comm, ctypes.byref(values[1]))
    nccl("ncclCommUserRank", comm, ctypes.byref(values[2]))
    nccl("ncclCommGetAsyncError", comm, ctypes.byref(values[3]))
    return [value.value for value in values]


@with_comm
def all_reduce(nccl, comm, rank, cases):
    outputs = []
    for dtype, op, inputs in cases:
        data = encode(dtype, inputs[rank])
        result = nccl("ncclAllReduce", data, data, size(len(inputs[rank])), dtype, op, comm, None)
        assert result == SUCCESS, nccl.last_error()
        outputs.append(decode(dtype, data.raw))
    return outputs


@with_comm
def move_data(nccl, comm, rank, count):
    """Every other collective, out of place, with rank-dependent values."""
    mine = encode(INT32, [1000 * rank + i for i in range(count)])
    wide = encode(INT32, [1000 * rank + i for i in range(WORLD * count)])
    outputs = {name: encode(INT32, [-1] * count) for name in ("scattered", "bcast", "reduced")}
    outputs["gathered"] = encode(INT32, [-1] * WORLD * count)
    outputs["fp8"] = encode(INT32, [-1] * count)
    n = size(count)
    for result in (
        nccl("ncclAllGather", mine, outputs["gathered"], n, INT32, comm, None),
        nccl("ncclReduceScatter", wide, outputs["scattered"], n, INT32, SUM, comm, None),
        nccl("ncclBroadcast", mine, outputs["bcast"], n, INT32, 2, comm, None),
        nccl("ncclReduce", mine, outputs["reduced"], n, INT32, MAX, 1, comm, None),
        nccl("ncclBroadcast", mine, outputs["fp8"], size(4 * count), FP8, 3, comm, None),
    ):
        assert result == SUCCESS, nccl.last_error()
    return {name: decode(INT32, buffer.raw) for name, buffer in outputs.items()}


@with_comm
def all_to_all(nccl, comm, rank, counts):
    """Rank r sends counts[r][p] bytes of value 16 r + p to rank p; all sends come first."""
    received = [ctypes.create_string_buffer(max(1, counts[p][rank])) for p in range(WORLD)]
    nccl("ncclGroupStart")
    nccl("ncclGroupStart")
    for p in range(WORLD):
        data = ctypes.create_string_buffer(bytes([16 * rank + p]) * counts[rank][p])
        received.append(data)  # keeps it alive
        assert nccl("ncclSend", data, size(counts[rank][p]), UINT8, p, comm, None) == SUCCESS
    assert nccl("ncclGroupEnd") == SUCCESS
    for p in range(WORLD):
        assert nccl("ncclRecv", received[p], size(counts[p][rank]), UINT8, p, comm, None) == SUCCESS
    assert nccl("ncclGroupEnd") == SUCCESS, nccl.last_error()
    return all(
        received[p].raw[: counts[p][rank]] == bytes([16 * p + rank]) * counts[p][rank]
        for p in range(WORLD)
    )


@with_comm
def bad_arguments(nccl, comm, rank):
    data, one = ctypes.create_string_buffer(8), size(1)
    calls = {
        "root": ("ncclBroadcast", data, data, one, INT8, WORLD, comm, None),
        "peer": ("ncclSend", data, one, INT8, -1, comm, None),
        "data type": ("ncclAllGather", data, data, one, 99, comm, None),
        "op": ("ncclAllReduce", data, data, one, INT8, 5, comm, None),
        "data type for a reduction": ("ncclReduce", data, data, one, FP8, SUM, 0, comm, None),
        "recvbuff": ("ncclAllReduce", data, None, one, INT8, SUM, comm, None),
    }
    for name, call in calls.items():
        assert nccl(*call) == INVALID_ARGUMENT
        assert call[0] in nccl.last_error()
        assert f"invalid {name} " in nccl.last_error()
    assert nccl("ncclGroupEnd") == INVALID_USAGE
    assert nccl("ncclCommDestroy", ctypes.c_void_p(16)) == INVALID_ARGUMENT

    # An error inside a group is the group's result, and drops what the group had queued.
    nccl("ncclGroupStart")
    assert nccl("ncclAllReduce", data, data, one, INT8, SUM, comm, None) == SUCCESS
    assert nccl(*calls["peer"]) == INVALID_ARGUMENT
    assert nccl("ncclGroupEnd") == INVALID_ARGUMENT
    assert nccl("ncclAllReduce", data, data, size(0), INT8, SUM, comm, None) == SUCCESS


@with_comm
def mismatch(nccl, comm, rank):
    """Rank 3 passes another count; afterwards the communicator stays broken."""
    data = ctypes.create_string_buffer(8)
    count = size(5 if rank == 3 else 4)
    first = nccl("ncclAllReduce", data, data, count, INT8, SUM, comm, None)
    text = nccl.last_error()
    async_error = ctypes.c_int()
    nccl("ncclCommGetAsyncError", comm, ctypes.byref(async_error))
    second = nccl("ncclAllReduce", data, data, size(4), INT8, SUM, comm, None)
    return first, text, async_error.value, second


@with_comm
def injected_all_reduce(nccl, comm, rank):
    data = ctypes.create_string_buffer(8)
    nth = nccl("fake_nccl_calls", b"ncclAllReduce") + 2
    with environment(FAKE_NCCL_FAIL=f"ncclSend:code=4,ncclAllReduce:nth={nth}:code=1"):
        return [nccl("ncclAllReduce", data, data, size(1), INT8, SUM, comm, None) for _ in range(3)]


def init_with(nccl, unique_id, rank, variables):
    with environment(**variables):
        result, comm = nccl.init(unique_id, rank)
        return result, nccl.last_error(), bool(comm), nccl("fake_nccl_live_comms")


def with_memory(body):
    """The first `world` ranks, with 4 MiB each. Windows that the body leaves go with the comm."""

    def run(nccl, unique_id, rank, world, *arguments):
        if rank >= world:
            return None
        result, comm = nccl.init(unique_id, rank, world)
        assert result == SUCCESS, nccl.last_error()
        result, memory = nccl.allocate(4 * MIB)
        assert result == SUCCESS, nccl.last_error()
        try:
            return body(nccl, comm, rank, memory, *arguments)
        finally:
            assert nccl("ncclCommDestroy", comm) == SUCCESS
            assert nccl("ncclMemFree", memory) == SUCCESS, nccl.last_error()
            assert nccl.live() == (0, 0)

    return run


def sum_of_ones(nccl, comm):
    data = encode(INT32, [1])
    assert nccl("ncclAllReduce", data, data, size(1), INT32, SUM, comm, None) == SUCCESS
    return decode(INT32, data.raw)[0]


def peer_pointer(nccl, window, offset, peer):
    pointer = ctypes.c_void_p(BAD_ADDRESS)
    result = nccl("ncclGetPeerDevicePointer", window, size(offset), peer, ctypes.byref(pointer))
    return pointer.value if result == SUCCESS else result


@with_memory
def register_two(nccl, comm, rank, memory):
    """Two windows in one allocation; one is deregistered, the other one left behind."""
    windows = []
    for flags in (0, 1):
        result, window = nccl.register(comm, memory.value + flags * 2 * MIB, 2 * MIB, flags)
        assert result == SUCCESS, nccl.last_error()
        windows.append(window)
    assert nccl.live() == (2, 4)
    assert nccl("ncclMemFree", memory) == INVALID_USAGE
    assert "still on this memory" in nccl.last_error()
    assert peer_pointer(nccl, windows[1], 5, rank) == memory.value + 2 * MIB + 5
    assert peer_pointer(nccl, windows[1], 0, 1 - min(rank, 1)) is None
    for offset, peer in ((2 * MIB, rank), (0, WORLD), (0, -1)):
        assert peer_pointer(nccl, windows[1], offset, peer) == INVALID_ARGUMENT
    assert nccl("ncclCommWindowDeregister", comm, windows[0]) == SUCCESS
    assert nccl("ncclCommWindowDeregister", comm, windows[0]) == INVALID_ARGUMENT
    assert peer_pointer(nccl, windows[0], 0, rank) == INVALID_ARGUMENT
    assert nccl("ncclMemFree", memory) == INVALID_USAGE
    assert nccl.live() == (1, 4)
    # What was deregistered may be registered anew, and has another handle.
    result, again = nccl.register(comm, memory.value, 2 * MIB)
    assert result == SUCCESS
    assert again.value not in {window.value for window in windows}
    return sum_of_ones(nccl, comm)


@with_memory
def bad_windows(nccl, comm, rank, memory):
    """All refused at once, on one rank alone: the others don't come."""
    base, host = memory.value, ctypes.create_string_buffer(8192)
    result, lone = nccl.register(comm, base, 2 * MIB)
    assert result == SUCCESS
    if rank == 0:
        other_id = UniqueId()
        nccl("ncclGetUniqueId", ctypes.byref(other_id))
        other = nccl.init(bytes(other_id), 0, world=1)[1]
        for address, num_bytes, flags, code, text in (
            (ctypes.addressof(host) + -ctypes.addressof(host) % 4096, 4096, 1, 4, "not inside"),
            (base + 2 * MIB + 64, 4096, 1, 4, "multiple of 4096"),
            (base + 2 * MIB, 2 * MIB + 1, 1, 4, "not inside"),
            (base + 4 * MIB, 4096, 1, 4, "not inside"),
            (base - 4096, 8192, 1, 4, "not inside"),
            (None, 4096, 1, 4, "not inside"),
            (base + 2 * MIB, 0, 1, 4, "empty"),
            (base + 2 * MIB, 4096, 2, 4, "invalid flags"),
            (base, 2 * MIB, 1, 5, "window there already"),
            (base + 2 * MIB - 4096, 8192, 1, 5, "window there already"),
        ):
            result, window = nccl.register(comm, address, num_bytes, flags)
            assert (result, window.value) == (code, BAD_ADDRESS), (address, num_bytes, flags)
            assert text in nccl.last_error()
        # Another communicator may have the same memory, and its windows are its own.
        result, window = nccl.register(other, base, 4 * MIB)
        assert result == SUCCESS
        assert nccl("ncclCommWindowDeregister", other, lone) == INVALID_ARGUMENT
        assert nccl("ncclCommWindowDeregister", comm, window) == INVALID_ARGUMENT
        assert nccl("ncclCommWindowDeregister", comm, None) == INVALID_ARGUMENT
        assert nccl("fake_nccl_live_windows") == 2
        assert nccl("ncclCommAbort", other) == SUCCESS
        nccl("ncclGroupStart")
        assert nccl.register(comm, base + 2 * MIB, 4096)[0] == INVALID_USAGE
        assert nccl("ncclGroupEnd") == INVALID_USAGE
    assert nccl("fake_nccl_live_windows") == 1
    return sum_of_ones(nccl, comm)


@with_memory
def register_different(nccl, comm, rank, memory, version, sizes, flags):
    with environment(FAKE_NCCL_VERSION=version):
        result, window = nccl.register(comm, memory.value, sizes[rank], flags[rank])
    text = nccl.last_error() if result != SUCCESS else ""
    num_windows = nccl("fake_nccl_live_windows")
    if result == SUCCESS:
        assert nccl("ncclCommWindowDeregister", comm, window) == SUCCESS
    assert sum_of_ones(nccl, comm) == len(sizes)
    assert nccl.register(comm, memory.value, 2 * MIB)[0] == SUCCESS
    return result, text, num_windows


@with_memory
def register_late(nccl, comm, rank, memory, late_by_s):
    with environment(FAKE_NCCL_TIMEOUT_S="0.3"):
        if rank == 1:
            time.sleep(late_by_s)
        return nccl.register(comm, memory.value, 2 * MIB)[0], nccl("fake_nccl_live_windows")


@with_memory
def register_or_reduce(nccl, comm, rank, memory):
    with environment(FAKE_NCCL_TIMEOUT_S="0.3"):
        if rank == 1:
            data = ctypes.create_string_buffer(16)
            return nccl("ncclAllReduce", data, data, size(2), UINT64, SUM, comm, None), 0
        return nccl.register(comm, memory.value, 2 * MIB)[0], nccl("fake_nccl_live_windows")


@with_memory
def register_with(nccl, comm, rank, memory, variable, rule):
    """Twice on every rank, where a rule may be about the second; then once more without it."""
    outputs = []
    nth = nccl("fake_nccl_calls", b"ncclCommWindowRegister") + 2
    with environment(**{variable: rule.format(nth=nth)}, FAKE_NCCL_TIMEOUT_S="0.3"):
        for half in range(2):
            result, window = nccl.register(comm, memory.value + half * 2 * MIB, 2 * MIB)
            outputs.append(bool(window) if result == SUCCESS else -result)
    return outputs, nccl("fake_nccl_live_windows")


def memory_limit(nccl, unique_id, rank):
    with environment(FAKE_NCCL_MEMORY_BYTES=str(7 * MIB)):
        allocations = [nccl.allocate(num_bytes) for num_bytes in (1, 2 * MIB + 1, 1)]
        results, memories = zip(*allocations, strict=True)
        assert results == (SUCCESS, SUCCESS, UNHANDLED_CUDA_ERROR)
        assert "out of memory" in nccl.last_error()
        assert memories[2].value == BAD_ADDRESS
        assert nccl.live() == (0, 6)
        assert nccl("ncclMemFree", memories[0]) == SUCCESS
        result, again = nccl.allocate(2 * MIB)
        assert result == SUCCESS
        assert nccl.allocate(2**64 - 1)[0] == UNHANDLED_CUDA_ERROR
    assert nccl.allocate(2**64 - 1)[0] == UNHANDLED_CUDA_ERROR
    assert nccl.allocate(0)[0] == INVALID_ARGUMENT
    with environment(FAKE_NCCL_FAIL="ncclMemAlloc:code=3"):
        result, memory = nccl.allocate(1)
        assert (result, memory.value) == (3, BAD_ADDRESS)
    for memory in (again, memories[1]):
        assert memory.value % (2 * MIB) == 0
        assert nccl("ncclMemFree", ctypes.c_void_p(memory.value + 4096)) == INVALID_ARGUMENT
        assert nccl("ncclMemFree", memory) == SUCCESS
        assert nccl("ncclMemFree", memory) == INVALID_ARGUMENT
    assert nccl.live() == (0, 0)


def large_memory(nccl, unique_id, rank):
    """4 GiB, of which a page at each end is used; how much the process has grown, in MiB."""

    def resident_mib():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MIB

    before, num_bytes = resident_mib(), 4 << 30
    result, memory = nccl.allocate(num_bytes)
    assert result == SUCCESS, nccl.last_error()
    for offset in (0, num_bytes - 1):
        ctypes.memset(memory.value + offset, 1, 1)
    assert nccl.live() == (0, num_bytes / MIB)
    grown = resident_mib() - before
    assert nccl("ncclMemFree", memory) == SUCCESS
    return grown


# ---- The ranks.


def serve(connection, path, rank):
    nccl = Nccl(path)
    while (request := connection.recv()) is not None:
        function, unique_id, arguments = request
        try:
            connection.send((globals()[function](nccl, unique_id, rank, *arguments), None))
        except Exception:  # noqa: BLE001  # reported to the test, whatever it is
            connection.send((None, traceback.format_exc()))


class Ranks:
    def __init__(self, path):
        self.nccl = Nccl(path)
        context = multiprocessing.get_context("spawn")
        self.connections, self.processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, path, rank), daemon=True)
            process.start()
            self.connections.append(ours)
            self.processes.append(process)

    def unique_id(self):
        unique_id = UniqueId()
        assert self.nccl("ncclGetUniqueId", ctypes.byref(unique_id)) == SUCCESS
        return bytes(unique_id)

    def run(self, function, *arguments):
        """Runs the function of this name in all ranks; their outputs, by rank."""
        unique_id = self.unique_id()
        for connection in self.connections:
            connection.send((function, unique_id, arguments))
        outputs = []
        for rank, connection in enumerate(self.connections):
            assert connection.poll(WAIT_S), f"rank {rank} did not answer within {WAIT_S} s"
            output, error = connection.recv()
            outputs.append(output)
            assert error is None, f"rank {rank}: {error}"
        return outputs

    def close(self):
        for connection, process in zip(self.connections, self.processes, strict=True):
            with contextlib.suppress(OSError):  # of a rank that died
                connection.send(None)
            process.join(timeout=5)
            process.kill()


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(str(fake_nccl_path()))
    yield ranks
    ranks.close()


def test_queries(ranks):
    assert ranks.run("describe") == [[22809, WORLD, rank, SUCCESS] for rank in range(WORLD)]
    assert ranks.unique_id() != ranks.unique_id()


def test_a_damaged_unique_id_is_refused(ranks):
    unique_id = ranks.unique_id()
    for damaged in (unique_id[:127] + bytes([unique_id[127] ^ 1]), bytes(128)):
        assert ranks.nccl.init(damaged, 0, world=1)[0] == INVALID_ARGUMENT
    assert ranks.nccl.init(unique_id, 2, world=2)[0] == INVALID_ARGUMENT


def reference(dtype, op, column):
    if op in (MAX, MIN):
        return max(column) if op == MAX else min(column)
    total = column[0]
    for value in column[1:]:
        total = total * value if op == PROD else total + value
    if op != AVG:
        return total
    is_float = dtype in (FLOAT16, FLOAT32, FLOAT64, BFLOAT16)
    return total / WORLD if is_float else int(total / WORLD)


def test_all_reduce_every_type_and_op(ranks):
    cases, expected = [], []
    for dtype in FORMATS.keys() - {FP8}:
        signed = dtype not in (UINT8, UINT32, UINT64)
        inputs = [
            [rank + 1, 3 - rank, -rank if signed else 2, -3 if signed else 3]
            for rank in range(WORLD)
        ]
        for op in (SUM, PROD, MAX, MIN, AVG):
            cases.append((dtype, op, inputs))
            expected.append([reference(dtype, op, column) for column in zip(*inputs, strict=True)])
    assert ranks.run("all_reduce", cases) == [expected] * WORLD


def test_integers_wrap(ranks):
    cases = [(INT8, SUM, [[100, -100]] * WORLD), (UINT8, PROD, [[10, 3]] * WORLD)]
    assert ranks.run("all_reduce", cases)[1] == [[-112, 112], [10000 % 256, 81]]


def test_16_bit_floats_accumulate_in_float_and_round_to_nearest_even(ranks):
    generator = random.Random(0)
    halves = [
        [struct.unpack("e", generator.randbytes(2))[0] for _ in range(4000)] for _ in range(WORLD)
    ]
    columns = [c for c in zip(*halves, strict=True) if all(abs(x) < 15000 for x in c)]
    inputs = [list(row) for row in zip(*columns, strict=True)]
    sums = [float32(float32(float32(a + b) + c) + d) for a, b, c, d in columns]
    half_sums = [struct.unpack("e", struct.pack("e", total))[0] for total in sums]
    # Half has fewer exponents and more digits than bfloat16, so the inputs are rounded too.
    rounded = [[to_float(bfloat16(x) << 16) for x in c] for c in columns]
    sums = [float32(float32(float32(a + b) + c) + d) for a, b, c, d in rounded]
    bfloat_sums = [to_float(bfloat16(total) << 16) for total in sums]
    specials = [[value] * 3 for value in (65504.0, float("inf"), float("-inf"), 6e-8)]
    cases = [
        (FLOAT16, SUM, inputs),
        (BFLOAT16, SUM, inputs),
        (FLOAT16, MAX, specials),
        (FLOAT16, SUM, [[40000.0]] * WORLD),
    ]
    outputs = ranks.run("all_reduce", cases)[3]
    assert len(columns) > 1000
    assert outputs[0] == half_sums
    assert outputs[1] == bfloat_sums
    assert outputs[2:] == [[float("inf")] * 3, [float("inf")]]


@pytest.mark.parametrize("count", [0, 3, 20_001])
def test_data_movement(ranks, count):
    """The largest count needs many turns of a mailbox."""
    own = [[1000 * rank + i for i in range(count)] for rank in range(WORLD)]
    untouched = [-1] * count
    for rank, outputs in enumerate(ranks.run("move_data", count)):
        assert outputs["gathered"] == list(itertools.chain(*own))
        chunk = range(rank * count, (rank + 1) * count)
        assert outputs["scattered"] == [6000 + WORLD * i for i in chunk]
        assert outputs["bcast"] == own[2]
        assert outputs["reduced"] == (own[3] if rank == 1 else untouched)
        assert outputs["fp8"] == own[3]


def test_grouped_sends_and_receives_do_not_deadlock(ranks):
    counts = [[(2 * r + p) % 5 * 20_000 for p in range(WORLD)] for r in range(WORLD)]
    assert counts[0][0] == 0
    assert ranks.run("all_to_all", counts) == [True] * WORLD


def test_bad_arguments(ranks):
    ranks.run("bad_arguments")


def test_ranks_that_disagree_get_an_error(ranks):
    for first, text, async_error, second in ranks.run("mismatch"):
        assert first == async_error == second
        assert first in (INVALID_USAGE, REMOTE_ERROR)
        assert "(count 5" in text or "has left" in text


def test_injected_failure_of_the_nth_call(ranks):
    assert ranks.run("injected_all_reduce") == [[SUCCESS, UNHANDLED_CUDA_ERROR, SUCCESS]] * WORLD


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        ({"FAKE_NCCL_FAIL": "ncclCommInitRank:rank=2:code=1"}, UNHANDLED_CUDA_ERROR),
        ({"FAKE_NCCL_HANG": "ncclCommInitRank:rank=2"}, REMOTE_ERROR),
    ],
)
def test_injected_failure_of_one_rank(ranks, rule, code):
    outputs = ranks.run("init_with", rule | {"FAKE_NCCL_TIMEOUT_S": "0.3"})
    assert [output[0] for output in outputs] == [REMOTE_ERROR, REMOTE_ERROR, code, REMOTE_ERROR]
    assert [output[2:] for output in outputs] == [(False, 0)] * WORLD
    assert next(iter(rule)) in outputs[2][1]
    assert "not all ranks came" in outputs[0][1]


def test_memory_has_a_limit(ranks):
    ranks.run("memory_limit")


def test_large_memory_is_cheap(ranks):
    """At most a huge page for each of the two bytes."""
    assert all(grown < 16 for grown in ranks.run("large_memory"))


@pytest.mark.parametrize("world", [2, 3])
def test_windows(ranks, world):
    assert ranks.run("register_two", world)[:world] == [world] * world


def test_bad_windows(ranks):
    assert ranks.run("bad_windows", 2)[:2] == [2, 2]


@pytest.mark.parametrize(
    ("version", "sizes", "flags", "code"),
    [
        ("23006", (2 * MIB, 2 * MIB, 4 * MIB), (1, 1, 1), UNHANDLED_CUDA_ERROR),
        ("22809", (2 * MIB, 4096), (1, 1), UNHANDLED_CUDA_ERROR),
        ("23007", (2 * MIB, 2 * MIB, 4 * MIB), (1, 1, 1), SUCCESS),
        ("23007", (2 * MIB, 2 * MIB), (1, 0), INVALID_USAGE),
    ],
)
def test_windows_that_differ(ranks, version, sizes, flags, code):
    """All ranks learn it, and the communicator remains usable."""
    outputs = ranks.run("register_different", len(sizes), version, sizes, flags)[: len(sizes)]
    assert [output[0] for output in outputs] == [code] * len(sizes)
    for _, text, num_windows in outputs:
        assert num_windows == (code == SUCCESS)
        assert ("sizes differ" in text) == (code == UNHANDLED_CUDA_ERROR)
        assert ("flags differ" in text) == (code == INVALID_USAGE)


@pytest.mark.parametrize("world", [2, 3])
def test_a_late_rank_gets_no_window(ranks, world):
    """Nor do the others. A rank that comes in time is awaited."""
    assert ranks.run("register_late", world, 0.9)[:world] == [(REMOTE_ERROR, 0)] * world
    assert ranks.run("register_late", world, 0.1)[:world] == [(SUCCESS, 1)] * world


def test_a_window_is_no_other_collective(ranks):
    outputs = ranks.run("register_or_reduce", 3)[:3]
    assert all(code in (INVALID_USAGE, REMOTE_ERROR) for code, _ in outputs)
    assert all(num_windows == 0 for _, num_windows in outputs)


@pytest.mark.parametrize(
    ("variable", "rule", "expected"),
    [
        ("FAKE_NCCL_NULL_WINDOW", ":rank=1", [([True, True], 2), ([False, False], 0)]),
        ("FAKE_NCCL_NULL_WINDOW", ":nth={nth}", [([True, False], 1), ([True, False], 1)]),
        ("FAKE_NCCL_FAIL", ":nth={nth}:code=3", [([True, -3], 1), ([True, -3], 1)]),
        # Rank 0 waits in vain, and its communicator is broken.
        ("FAKE_NCCL_HANG", ":rank=1", [([-6, -6], 0), ([-6, -6], 0)]),
    ],
)
def test_windows_by_rule(ranks, variable, rule, expected):
    rule = f"ncclCommWindowRegister{rule}"
    assert ranks.run("register_with", 2, variable, rule)[:2] == expected
