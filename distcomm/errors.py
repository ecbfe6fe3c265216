"""Every error distcomm raises on purpose, and the record that says which rank raised it.

All of them derive from `DistcommError`. Those about an argument also derive from `ValueError`,
so a caller who catches only built-in errors still catches them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "AlreadyInitializedError",
    "ArgumentError",
    "CaptureMismatchError",
    "CollectiveError",
    "CommunicatorDisabledError",
    "DistcommError",
    "GroupClosedError",
    "GroupMember",
    "InitializationError",
    "LaunchError",
    "LayoutError",
    "NativeLibraryError",
    "NcclError",
    "NcclLibraryError",
    "NotInitializedError",
    "PeerCopyError",
    "PlanMismatchError",
    "SleepError",
    "SymmetricMemoryError",
    "SymmetricMismatchError",
]


@dataclass(frozen=True)
class GroupMember:
    """One rank's place in one group.

    Attributes:
        name: the group's name, e.g. ``"tp"``.
        ranks: global ranks of the group, in group order.
        rank: this process's global rank; one of `ranks`.
        rank_in_group: index of `rank` in `ranks`.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    rank_in_group: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank_in_group", self.ranks.index(self.rank))

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    def __str__(self) -> str:
        return f"group '{self.name}', rank {self.rank} ({self.rank_in_group} of {self.world_size})"


class DistcommError(RuntimeError):
    """Base of every error that distcomm raises on purpose."""


class ArgumentError(DistcommError, ValueError):
    """An argument doesn't meet a call's requirement.

    Raised before anything is sent, so the group stays usable: a call with a right
    argument may follow, as long as the other ranks make the same call.
    """

    def __init__(
        self,
        argument: str,
        requirement: str,
        actual: object,
        *,
        call: str = "",
        member: GroupMember | None = None,
    ) -> None:
        self.argument = argument
        self.requirement = requirement
        self.actual = actual
        self.member = member
        where = f" [{member}]" if member else ""
        prefix = f"{call}: " if call else ""
        super().__init__(f"{prefix}{argument} must be {requirement}; got {actual}{where}")


class LayoutError(DistcommError, ValueError):
    """Parallel sizes that don't fit together, or don't fit the world size."""


class LaunchError(DistcommError):
    """This process doesn't know its rank, its world size or where its peers are."""


class NotInitializedError(DistcommError):
    """A group was asked for before `init_distributed()`."""


class AlreadyInitializedError(DistcommError):
    """`init_distributed()` was called again without `destroy_distributed()`."""


class InitializationError(DistcommError):
    """Initialization failed on at least one rank; raised on every rank that is there.

    Attributes:
        failures: global rank -> what went wrong there.
    """

    def __init__(self, what: str, failures: Mapping[int, str], *, rank: int) -> None:
        self.failures = dict(failures)
        self.rank = rank
        lines = "\n".join(f"  rank {r}: {text}" for r, text in sorted(self.failures.items()))
        super().__init__(f"{what} [raised on rank {rank}]\n{lines}")


class GroupClosedError(DistcommError):
    """A collective was called on a group or communicator that has been closed."""


class CommunicatorDisabledError(DistcommError):
    """A PyNCCL call was made while `change_state(enable=False)` was in force."""


class CollectiveError(DistcommError):
    """A collective failed or timed out after it was started; names call, group and rank."""

    def __init__(self, call: str, cause: object, *, member: GroupMember) -> None:
        self.call = call
        self.member = member
        super().__init__(f"{call} failed: {cause} [{member}]")


class PlanMismatchError(DistcommError):
    """The ranks of a group would gather by different plans or arguments; raised on every rank.

    Attributes:
        call: what the ranks were about to do.
        reports: global rank -> plan and arguments there, or what is wrong with them, as text.
        odd_ranks: the ranks that differ from most of the others.
    """

    def __init__(self, call: str, reports: Mapping[int, str], *, member: GroupMember) -> None:
        self.call = call
        self.reports = dict(reports)
        self.member = member
        texts = list(self.reports.values())
        usual = max(texts, key=texts.count)  # of equally frequent ones the first rank's
        self.odd_ranks = [rank for rank, text in self.reports.items() if text != usual]
        lines = "\n".join(f"  rank {rank}: {text}" for rank, text in self.reports.items())
        super().__init__(f"{call}: ranks {self.odd_ranks} differ [{member}]\n{lines}")


class NativeLibraryError(DistcommError):
    """distcomm's own C++ library is missing or doesn't match this Python code."""


class NcclLibraryError(DistcommError):
    """libnccl can't be found or loaded, or lacks a function that was asked for."""


class NcclError(DistcommError):
    """An NCCL call returned an error.

    Attributes:
        call: the C function, e.g. ``"ncclAllReduce"``.
        code: its `ncclResult_t`.
        last_error: NCCL's own text about the last error; may be empty.
    """

    def __init__(
        self,
        call: str,
        code: int,
        meaning: str,
        last_error: str = "",
        *,
        member: GroupMember | None = None,
    ) -> None:
        self.call = call
        self.code = code
        self.last_error = last_error
        self.member = member
        detail = f": {last_error}" if last_error else ""
        where = f" [{member}]" if member else ""
        super().__init__(f"{call} returned {code} ({meaning}){detail}{where}")


class SleepError(DistcommError):
    """Memory or communicators can't be put to sleep or woken up, or can't be used while asleep."""


class SymmetricMemoryError(DistcommError):
    """Symmetric memory can't be had, or not here."""


class PeerCopyError(SymmetricMemoryError):
    """The CUDA driver refused a part of a push into the ranks' memory.

    Attributes:
        code: its `CUresult`.
        rank_in_group: the rank that pushed.
    """

    def __init__(self, code: int, *, rank_in_group: int, world_size: int) -> None:
        self.code = code
        self.rank_in_group = rank_in_group
        super().__init__(
            f"pushing rows failed with driver error {code} [rank {rank_in_group} of {world_size}]"
        )


class SymmetricMismatchError(SymmetricMemoryError):
    """The ranks of a group differ in their symmetric memory; the same on every rank that came.

    Attributes:
        call: what the ranks were doing.
        reports: global rank -> what it has, as text; ``"did not come within ... s"`` for a rank
            that is absent.
        odd_ranks: the global ranks that differ from most, failed, or are absent.
    """

    def __init__(
        self,
        call: str,
        problem: str,
        reports: Mapping[int, str],
        odd_ranks: Sequence[int],
        *,
        member: GroupMember,
    ) -> None:
        self.call = call
        self.reports = dict(reports)
        self.odd_ranks = list(odd_ranks)
        self.member = member
        odd = f"rank{'s' * (len(odd_ranks) > 1)} {', '.join(map(str, odd_ranks))}"
        lines = "\n".join(f"  rank {rank}: {text}" for rank, text in sorted(reports.items()))
        super().__init__(f"{call}: {problem}; look at {odd} [{member}]\n{lines}")


class CaptureMismatchError(SymmetricMismatchError):
    """The ranks of a group have captured different collectives into a CUDA graph."""
