"""The memory half of a group: symmetric memory, and what is captured into CUDA graphs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass

import torch

from .algorithms import AlgorithmTable, table_for
from .backends import KernelCollectives
from .communicators import GroupCommunicators, JobContext
from .errors import ArgumentError, GroupMember
from .handles import StreamHandle
from .kernels import (
    LEAST_CAPABILITY,
    MAX_BLOCKS,
    MOST_BLOCKS,
    MOST_RANKS,
    OVERLAPS_SINCE,
    Mailboxes,
    mailbox_bytes,
    signal_bytes,
)
from .memory import (
    ASLEEP,
    CaptureLog,
    InactiveContext,
    MemoryContext,
    PeerChannel,
    SuspendedContext,
    SymmetricMemoryContext,
    expandable_segments_off,
    placement_check,
)
from .objects import ObjectChannel
from .outside_graphs import outside_graphs
from .routing import Router

__all__ = ["CHANNEL_BYTES", "GraphCapture", "GroupMemory", "capture_stream"]

logger = logging.getLogger(__name__)

CHANNEL_BYTES = mailbox_bytes() + (1 << 20)
"""Symmetric memory that a group takes at most to write into its peers' memory."""


@dataclass(frozen=True)
class GraphCapture:
    """What to capture CUDA graphs with: ``torch.cuda.graph(graph, pool=c.pool, stream=c.stream)``.

    Attributes:
        stream: the stream to capture; None on CPU.
        pool: the graphs' memory pool, symmetric if that was asked for; else None. Of no use
            after the block.
    """

    stream: torch.cuda.Stream | None = None
    pool: tuple[int, int] | None = None


class GroupMemory:
    """Symmetric memory and graph captures of one group; `GroupCoordinator` is one."""

    member: GroupMember
    device: torch.device
    _job: JobContext
    _communicators: GroupCommunicators
    _router: Router

    def _prepare_memory(self) -> None:
        self._symmetric_counters: Counter[str] = Counter()
        self._inactive: Counter[str] = Counter()
        self._capture_number = 0
        self._memory_closed = False
        self._kept_for_graphs: dict[int, torch.Tensor] = {}
        self._parked_handles: list[StreamHandle] = []
        windows = self._communicators.windows
        if windows is not None and self._job.verifies_symmetric:
            channel = ObjectChannel(self.member, self._communicators.cpu_group)
            self._router.add_observer(placement_check(windows, self.member.name, channel))

    @outside_graphs
    def symmetric_memory(self, enabled: bool = True) -> MemoryContext:
        """A ``with`` block whose new CUDA tensors are symmetric: NCCL reads peers' directly.

        All ranks of the group allocate the same, in the same order. The memory comes from one pool
        of the process, so such a tensor may be used with every group; it is symmetric for those
        that have a window of it (`is_symmetric`). Leaving is collective where the pool has grown,
        and costs no communication otherwise. Contexts nest. Tensors live on after the block.

        In a CUDA graph capture the block has to be entered inside the capture. Where there is no
        symmetric memory the block does nothing, and `stats` counts why: on CPU, in a group of
        one, with an NCCL that has no windows, or not `enabled`.

        Args:
            enabled: False for a block that does nothing.

        Raises:
            SymmetricMismatchError: on leaving, the ranks differ in what they have allocated, one
                ran out of memory, or one didn't come in time; on every rank that came.
            SymmetricOutOfMemoryError: an allocation failed.
            SymmetricMemoryError: on leaving during a capture that needs a registration.
        """
        pool, windows = self._job.symmetric_pool, self._communicators.windows
        if pool is None or windows is None or not enabled or windows.unsupported is not None:
            return InactiveContext(self._why_inactive(enabled), self._inactive)
        return SymmetricMemoryContext(pool, windows, self._symmetric_counters)

    @outside_graphs
    def is_symmetric(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` lies in memory that NCCL has a window of, for this group. Local."""
        windows = self._communicators.windows
        return windows is not None and windows.is_symmetric(tensor)

    @outside_graphs
    def peer_pointers(self, tensor: torch.Tensor) -> list[int | None]:
        """The addresses of `tensor`'s first byte on every rank, in group order. Local.

        An address can be loaded from and stored to by this rank's GPU. It is None for a rank
        that is out of reach, and for all others where the probe at initialization has failed.
        The other ranks' tensors must be at the same place of theirs, as they are if all ranks
        have allocated the same. Addresses are valid until the group is closed or the memory freed.

        Raises:
            ArgumentError: `tensor` isn't symmetric for this group.
        """
        windows = self._communicators.windows
        pointers = None
        if windows is not None and windows.is_symmetric(tensor):
            pointers = windows.peer_addresses(tensor.data_ptr())
        if pointers is None:
            raise ArgumentError(
                "tensor",
                "symmetric for this group",
                f"one of shape {list(tensor.shape)} on {tensor.device} that is not",
                call="peer_pointers",
                member=self.member,
            )
        return pointers

    @outside_graphs
    def suspend_symmetric_memory(self) -> MemoryContext:
        """A ``with`` block whose new tensors are ordinary memory, whatever contexts it is in."""
        pool = self._job.symmetric_pool
        return InactiveContext() if pool is None else SuspendedContext(pool)

    @outside_graphs
    def placement(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """The segment that `tensor` begins in, and the offset there; the same on all ranks if they
        have allocated the same. None if it isn't symmetric for this group. Local."""
        windows = self._communicators.windows
        place = None
        if windows is not None and windows.is_symmetric(tensor):
            place = windows.find(tensor.data_ptr())
        return None if place is None else (place.ordinal, place.offset)

    def stream_handle(
        self, stream: torch.cuda.Stream, tensors: Sequence[torch.Tensor]
    ) -> StreamHandle:
        """The handle of a collective that was enqueued on `stream` and uses `tensors`. Local."""
        symmetric: list[torch.Tensor] = []
        others: list[torch.Tensor] = []
        for tensor in tensors:
            (symmetric if self.may_be_in_symmetric_pool(tensor) else others).append(tensor)
        if self._parked_handles:
            StreamHandle.unpark(self._parked_handles)
        return StreamHandle(stream, others, symmetric, self._parked_handles)

    def may_be_in_symmetric_pool(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` was allocated in the symmetric pool, whichever group has a window.

        Of a pool that has overflowed into ordinary memory, any tensor may be. Local.
        """
        pool = self._job.symmetric_pool
        if pool is None or not tensor.is_cuda:
            return False
        # Not the tensor's own address, which an empty slice of a buffer has none of.
        return pool.contains(tensor.untyped_storage().data_ptr()) or pool.overflowed

    def keep_if_capturing(self, tensor: torch.Tensor) -> None:
        """Keeps a tensor that a CUDA graph under capture uses, until the group is closed.

        For what the caller doesn't know of, and so can't keep.
        """
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            self._kept_for_graphs[tensor.data_ptr()] = tensor

    def peer_channel(self) -> PeerChannel | str:
        """What kernels need that write into peers' memory; or why there can be none.

        Collective when first called, and local from then on. The same on all ranks.

        Raises:
            SymmetricMemoryError: when first called, a rank didn't come, or captures a graph.
        """
        if self._memory_closed:
            return "the group is closed"
        pool = self._job.symmetric_pool
        if pool is not None and pool.asleep:
            return ASLEEP
        if self._communicators.channel is None:
            self._communicators.channel = self._open_peer_channel()
        channel = self._communicators.channel
        return channel if isinstance(channel, str) else channel.problem or channel

    @property
    def kernels(self) -> KernelCollectives | None:
        """Collectives by kernels that use peers' memory; None where there can't be any."""
        return self._communicators.kernels

    def enable_kernels(self) -> None:
        """Lets kernels run this group's collectives, where they can. Collective.

        Raises:
            SymmetricMemoryError, CollectiveError: a rank didn't come.
        """
        communicators = self._communicators
        if communicators.kernels is None and communicators.no_kernels is None:
            made = self._kernel_collectives()
            if isinstance(made, str):
                communicators.no_kernels = made
                logger.info("no kernels of our own for collectives: %s [%s]", made, self.member)
            else:
                communicators.kernels = made

    def use_table(self, table: AlgorithmTable) -> None:
        """From now on kernels are chosen by `table`, which has to be the same on all ranks."""
        if self._communicators.kernels is not None:
            self._communicators.kernels.use_table(table)

    def announce(self, op: str, *tensors: torch.Tensor) -> None:
        """To be called before a collective that writes to the same place of every rank's tensors.

        They are compared between ranks where collectives are, as in `graph_capture`.
        """
        self._router.announce(op, tensors, True)

    @outside_graphs
    @contextmanager
    def graph_capture(
        self, stream: torch.cuda.Stream | None = None, *, symmetric: bool = False
    ) -> Iterator[GraphCapture]:
        """A block in which this group's collectives are captured into CUDA graphs. Collective.

            with group.graph_capture() as c, torch.cuda.graph(g, pool=c.pool, stream=c.stream):
                y = group.all_reduce(x)

        PyNCCL is enabled inside; the stream is current, after all that the former one was given,
        and the former one goes on after it. At the end the ranks compare what they have captured.
        On CPU it does nothing.

        Args:
            stream: the stream to capture; by default a new one.
            symmetric: gives the graphs a memory pool of their own (``c.pool``) in symmetric
                memory, which returns at the next `graph_capture` of a group of all ranks, or of
                the state, after they have died. Graphs captured with one pool share memory:
                replay them one after another. Where there is no symmetric memory, ordinary.

        Raises:
            SymmetricMismatchError: a rank didn't come in time to the beginning.
            CaptureMismatchError: the ranks have captured different calls, a rank's capture
                failed, or a rank didn't come in time; on every rank that came.
            SymmetricOutOfMemoryError: the capture needs more symmetric memory than is reserved;
                it names how much. The capture can be repeated.
        """
        windows, pool = self._communicators.windows, self._job.symmetric_pool
        self.count_capture()
        if symmetric and (windows is None or windows.unsupported is not None):
            self._inactive[self._why_inactive(True)] += 1
        if windows is not None and pool is not None:
            if self.member.world_size == len(self._job.hosts):
                pool.settle(self.member.world_size)
            elif not pool.frozen and not pool.asleep:
                windows.count_common()
                windows.register_common()
        with capture_stream(self._job, stream, symmetric) as capture, self.capturing():
            yield capture

    def count_capture(self) -> None:
        """To be called before `capturing`, and before anything that may fail on a rank alone."""
        self._capture_number = self._communicators.next_capture(self.member.name)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The group's part of `graph_capture`, on whatever stream the caller captures."""
        comm, windows = self._communicators.pynccl, self._communicators.windows
        if comm is None or windows is None:
            with comm.change_state(enable=True) if comm is not None else nullcontext():
                yield
            return
        store = self._communicators.meeting_store(f"{self.member.name}/{self._capture_number}")
        log = CaptureLog(windows, self.member.name, store, self._job.timeout_s)
        self._router.add_observer(log.observe)
        try:
            with comm.change_state(enable=True):
                yield
        except BaseException as error:
            log.tell(f"its capture failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._router.remove_observer(log.observe)
        log.compare()

    # ---- inside -----------------------------------------------------------------------------

    def _open_peer_channel(self) -> PeerChannel | str:
        windows, pool = self._communicators.windows, self._job.symmetric_pool
        if windows is None or pool is None or windows.unsupported is not None:
            return self._why_inactive(True)
        return PeerChannel(
            pool,
            windows,
            num_kernel_bytes=signal_bytes(self.member.world_size, MAX_BLOCKS),
            num_mailbox_bytes=0 if self._job.tune == "nccl" else mailbox_bytes(),
            timeout_s=self._job.timeout_s,
        )

    def _kernel_collectives(self) -> KernelCollectives | str:
        """Or why there can't be any; the same on all ranks."""
        member = self.member
        if member.world_size > MOST_RANKS:
            return f"the group has more than {MOST_RANKS} ranks"
        capability = torch.cuda.get_device_capability(self.device)
        gpu = torch.cuda.get_device_name(self.device)
        table = table_for(self._job.tune, self._job.tables, gpu, member.world_size)
        objects = ObjectChannel(member, self._communicators.cpu_group)
        everyone = objects.all_gather((capability, table))
        if any(capability < LEAST_CAPABILITY for capability, _ in everyone):
            return f"a GPU has less than compute capability {LEAST_CAPABILITY}"
        channel = self.peer_channel()
        if isinstance(channel, str):
            return channel
        if not channel.mailboxes:
            return "no room for mailboxes is left in the symmetric reserve"
        with self.suspend_symmetric_memory():
            turns = torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=self.device)
        boxes = Mailboxes(
            base=channel.mailboxes,
            stride=channel.stride,
            turns=turns,
            rank=member.rank_in_group,
            world_size=member.world_size,
            overlaps=capability >= OVERLAPS_SINCE,
        )
        # The first rank's table, as GPUs may differ.
        return KernelCollectives(boxes, channel, everyone[0][1], self._job.deterministic)

    def _why_no_kernels(self) -> str | None:
        if self._job.device.type == "cuda" and self._job.tune == "nccl":
            return "none: tune='nccl'"
        pool = self._job.symmetric_pool
        if pool is not None and pool.asleep:
            return f"none: {ASLEEP}"
        reason = self._communicators.no_kernels
        return None if reason is None else f"none: {reason}"

    def _close_memory(self) -> None:
        self._memory_closed = True
        self._kept_for_graphs.clear()

    def _memory_stats(self) -> dict[str, object]:
        windows = self._communicators.windows
        return {
            "contexts": self._symmetric_counters["contexts"],
            "inactive": dict(self._inactive),
            "windows": 0 if windows is None else windows.num_windows,
        }

    @property
    def why_not_symmetric(self) -> str | None:
        """Why `symmetric_memory` does nothing here; None where it does. Local."""
        return self._why_inactive(True) or None

    def _why_inactive(self, enabled: bool) -> str:
        windows = self._communicators.windows
        if not enabled:
            return "disabled by the caller"
        if self._job.symmetric_pool is None:
            return self._job.no_symmetric
        if windows is None:
            return "a group of one"
        return windows.unsupported or ""


@contextmanager
def capture_stream(
    job: JobContext, stream: torch.cuda.Stream | None, symmetric: bool
) -> Iterator[GraphCapture]:
    """Makes a side stream current, ordered after and before the current one."""
    if job.device.type != "cuda":
        yield GraphCapture()
        return
    if stream is not None and stream.device != job.device:
        raise ArgumentError(
            "stream", f"a CUDA stream of {job.device}", stream, call="graph_capture"
        )
    stream = torch.cuda.Stream(job.device) if stream is None else stream
    pool = job.symmetric_pool if symmetric else None
    if pool is not None and (pool.asleep or len(job.hosts) == 1):
        pool = None  # asleep, or there are no peers and nothing is reserved
    number, graph_pool = (0, None) if pool is None else pool.routing.open_graph_pool()
    current = torch.cuda.current_stream(job.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream), expandable_segments_off if pool else nullcontext():
            yield GraphCapture(stream, graph_pool)
    except torch.OutOfMemoryError as error:
        failure = None if pool is None else pool.heap.take_failure()
        if pool is not None and failure is not None:
            raise pool.out_of_memory("graph_capture", failure) from error
        raise
    finally:
        # A capture that was broken off may have left the stream unusable.
        with suppress(RuntimeError):
            current.wait_stream(stream)
        if pool is not None:
            pool.routing.close_graph_pool(number)
