"""Which NCCL versions are known to break which feature, where, and what is done about it.

One row an issue, each with the public report it rests on. A row is added only for a fault that the
version and the communicator's topology give away; what NCCL reports as an error needs no row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import ArgumentError

__all__ = [
    "ACTIONS",
    "FEATURES",
    "KNOWN_ISSUES",
    "Action",
    "Feature",
    "KnownIssue",
    "KnownIssues",
    "Topology",
]

logger = logging.getLogger(__name__)

Action = Literal["off", "fence", "warn"]
Feature = Literal[
    "symmetric_capture",
    "window_register_in_capture",
    "copy_engine_collectives",
    "capture_across_hosts",
    "communicators_across_hosts",
]

ACTIONS: tuple[Action, ...] = get_args(Action)
"""What is done with an affected feature, strictest first.

``off``: it isn't used. ``fence``: it is used behind a full dependency on the work before it.
``warn``: it is used as it is, and the log says so.
"""

FEATURES: tuple[Feature, ...] = get_args(Feature)
"""What a row can be about.

``symmetric_capture``: collectives on symmetric windows inside CUDA graphs.
``window_register_in_capture``: ncclCommWindowRegister while a stream is being captured.
``copy_engine_collectives``: collectives under CTAPolicy ZERO.
``capture_across_hosts``: any collective inside a CUDA graph, in a group on several hosts.
``communicators_across_hosts``: any call in a group on several hosts.

distcomm looks at ``symmetric_capture`` when it makes a communicator. It never registers during a
capture and doesn't use copy-engine collectives, whatever the version; the rest is for the log.
"""

_ALL = "all"


@dataclass(frozen=True)
class Topology:
    """Where a communicator's ranks are; the same on all of them.

    Attributes:
        num_ranks: number of ranks.
        num_hosts: number of hosts that they are on.
    """

    num_ranks: int
    num_hosts: int


def _anywhere(_: Topology) -> bool:
    return True


def _on_several_hosts(topology: Topology) -> bool:
    return topology.num_hosts > 1


def _in_pairs(topology: Topology) -> bool:
    """Two ranks that share memory over NVLink: in all (maybe across hosts), or on each host."""
    return topology.num_ranks in (2, 2 * topology.num_hosts)


@dataclass(frozen=True)
class KnownIssue:
    """One fault of a range of NCCL versions.

    Attributes:
        name: what a user names to ignore it; never changes.
        feature: the feature it breaks; one of `FEATURES`.
        since: NCCL_VERSION_CODE of the first version known to have it.
        fixed_in: the first version after `since` without it; None while there is none.
        action: what distcomm does about it; one of `ACTIONS`.
        reference: the public report.
        summary: what goes wrong, in one sentence.
        where: whether a communicator of this topology has it.
    """

    name: str
    feature: Feature
    since: int
    fixed_in: int | None
    action: Action
    reference: str
    summary: str
    where: Callable[[Topology], bool] = _anywhere

    def affects(self, version: int, topology: Topology) -> bool:
        return (
            version >= self.since
            and (self.fixed_in is None or version < self.fixed_in)
            and self.where(topology)
        )


KNOWN_ISSUES = (
    KnownIssue(
        name="captured-symmetric-race",
        feature="symmetric_capture",
        since=22800,
        fixed_in=23007,
        action="fence",
        reference="sgl-project/sglang#37768",
        summary="Symmetric kernels are launched as programmatic dependents but don't wait for the "
        "kernel before them, so that in a CUDA graph they may read input not yet written.",
    ),
    KnownIssue(
        name="window-register-in-capture",
        feature="window_register_in_capture",
        since=22700,
        fixed_in=23007,
        action="off",
        reference="NVIDIA/nccl#2209",
        summary="Registering a window while a stream is being captured fails and invalidates the "
        "capture.",
    ),
    KnownIssue(
        name="copy-engine-pair-hang",
        feature="copy_engine_collectives",
        since=22803,
        fixed_in=23102,
        action="off",
        reference="NVIDIA/nccl#2241",
        summary="Between two ranks the first copy-engine collective sends its ready flag through a "
        "multicast group that the peer may not have joined yet, and then waits for ever.",
        where=_in_pairs,
    ),
    # A warning only: all reports are from one kind of machine (GB10 over RoCE), and without CUDA
    # graphs across hosts most multi-host jobs that work today would lose their decode speed.
    KnownIssue(
        name="cross-host-replay-hang",
        feature="capture_across_hosts",
        since=22809,
        fixed_in=23004,
        action="warn",
        reference="vllm-project/vllm#52504",
        summary="Replaying a CUDA graph with collectives between hosts may hang.",
        where=_on_several_hosts,
    ),
    KnownIssue(
        name="cross-host-pxn-hang",
        feature="communicators_across_hosts",
        since=22907,
        fixed_in=23007,
        action="warn",
        reference="https://docs.nvidia.com/cuda/cuest/troubleshooting/index.html",
        summary="Communication over InfiniBand may hang unless NCCL_PXN_DISABLE=1 is set.",
        where=_on_several_hosts,
    ),
)


class KnownIssues:
    """The known issues of one libnccl, less those that the user chose to ignore.

    Args:
        version: NCCL_VERSION_CODE of the libnccl in use, e.g. 22809.
        ignored: names of issues to act as if they didn't exist; ``"all"`` among them stands for
            every issue.

    Raises:
        ArgumentError: `ignored` is a string, or has a name that no issue has.
    """

    def __init__(self, version: int, ignored: Collection[str] = ()) -> None:
        self.version = version
        self.ignored = _checked_names(ignored)

    def affecting(self, topology: Topology) -> tuple[KnownIssue, ...]:
        """Those that a communicator of this topology has, in the table's order."""
        return tuple(
            issue for issue in self._all_affecting(topology) if issue.name not in self.ignored
        )

    def strictest(self, feature: Feature, topology: Topology) -> KnownIssue | None:
        """The issue whose action decides about `feature`; None when the feature is fine.

        Raises:
            ArgumentError: there is no such feature.
        """
        if feature not in FEATURES:
            raise ArgumentError("feature", f"one of {', '.join(FEATURES)}", repr(feature))
        issues = [issue for issue in self.affecting(topology) if issue.feature == feature]
        return min(issues, key=lambda issue: ACTIONS.index(issue.action), default=None)

    def log(self, topologies: Iterable[Topology]) -> None:
        """Logs one line with all issues that communicators of these topologies have, and what
        is done about each; nothing when they have none. A warning if nothing is done about one.
        """
        found = self._found(topologies)
        handled = all(i.action != "warn" and i.name not in self.ignored for i in found.values())
        if found:
            logger.log(
                logging.INFO if handled else logging.WARNING,
                "NCCL %s has known issues: %s. A newer NCCL, or ignore_known_issues, changes that.",
                _version_text(self.version),
                "; ".join(map(self._describe, found.values())),
            )

    def describe(self, topologies: Iterable[Topology]) -> list[str]:
        """A line for each issue that communicators of these topologies have, and what is done
        about it; also for those that are ignored."""
        return [self._describe(issue) for issue in self._found(topologies).values()]

    def _found(self, topologies: Iterable[Topology]) -> dict[str, KnownIssue]:
        """By name, in the table's order."""
        names = {issue.name for t in topologies for issue in self._all_affecting(t)}
        return {issue.name: issue for issue in KNOWN_ISSUES if issue.name in names}

    def _all_affecting(self, topology: Topology) -> Iterable[KnownIssue]:
        return (issue for issue in KNOWN_ISSUES if issue.affects(self.version, topology))

    def _describe(self, issue: KnownIssue) -> str:
        action = "ignored" if issue.name in self.ignored else issue.action
        fix = f"fixed in {_version_text(issue.fixed_in)}" if issue.fixed_in else "not fixed yet"
        return f"{issue.name} ({issue.feature}: {action}; {fix}; {issue.reference})"


def _checked_names(ignored: Collection[str]) -> frozenset[str]:
    known = [issue.name for issue in KNOWN_ISSUES]
    requirement = f"a collection of names out of {', '.join([*known, _ALL])}"
    # A string is a collection too: of its letters.
    if isinstance(ignored, str):
        raise ArgumentError("ignore_known_issues", requirement, f"the string {ignored!r}")
    unknown = [name for name in ignored if name not in known and name != _ALL]
    if unknown:
        raise ArgumentError("ignore_known_issues", requirement, ", ".join(map(repr, unknown)))
    return frozenset(known if _ALL in ignored else ignored)


def _version_text(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
