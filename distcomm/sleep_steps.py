"""How the ranks of a job fall asleep and wake up in step: they compare calls, and how each went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import SleepError
from .meeting import meet

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["SleepSteps"]


class SleepSteps:
    """One rank's side of calls that all ranks make together, one after another.

    Calls are numbered. A rank that misses one is told so by the next one that it makes: that call
    was decided without it, so it goes on to the number that the others are at.

    Args:
        store: where the ranks meet, for nothing else; None for a process alone.
        rank, world_size: this rank, and how many there are.
        timeout_s: what each part of a call may take; others wait twice as long for it.
    """

    def __init__(self, store: Store | None, rank: int, world_size: int, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._wait_s = 0.0
        self._number = 0
        self._call = ""

    def begin(
        self,
        call: str,
        arguments: Mapping[str, Any],
        error: Exception | None,
        extra_s: float = 0.0,
    ) -> None:
        """Passes if all ranks came with the same call and nothing in the way. Collective.

        Args:
            arguments: JSON values.
            error: what is in the way on this rank; None if nothing is.
            extra_s: for how much longer than usual this rank waits for others during the call.

        Raises:
            SleepError: on every rank that came. On a process alone, `error` itself.
        """
        if error is not None and self._world_size == 1:
            raise error
        self._wait_s = 2 * self._timeout_s + extra_s
        self._call = call
        mine = {"call": _text(call, arguments), "failure": None if error is None else str(error)}
        self._number += 1
        reports = self._met("begin", mine)
        while reports[self._rank] is None:
            self._number += 1
            reports = self._met("begin", mine)
        failures = self._absences(reports)
        present = {rank: each for rank, each in enumerate(reports) if each is not None}
        calls = [each["call"] for each in present.values()]
        usual = max(calls, key=calls.count)  # of equally frequent ones the first rank's
        for rank, each in present.items():
            if each["failure"] is not None:
                failures[rank] = each["failure"]
            elif each["call"] != usual:
                failures[rank] = f"calls {each['call']}, others {usual}"
        self._raise(failures, error, "nothing has changed")

    def exchange(self, stage: str, report: Any) -> list[Any]:
        """All ranks' reports on a part of the call that has begun. Collective.

        Args:
            report: a JSON value other than None.

        Raises:
            SleepError: a rank didn't come in time.
        """
        reports = self._met(stage, report)
        self._raise(self._absences(reports), None, f"it has not come to '{stage}'")
        return reports

    def conclude(self, errors: Sequence[Exception]) -> None:
        """Ends the call: passes if it went well on all ranks. Collective.

        Raises:
            SleepError: on every rank. On a process alone, the first of `errors` itself.
        """
        if errors and self._world_size == 1:
            raise errors[0]
        told = self.exchange("end", [str(error) for error in errors])
        failures = {rank: "; ".join(texts) for rank, texts in enumerate(told) if texts}
        outcome = "what went well stays as it is, and the call can be repeated"
        self._raise(failures, errors[0] if errors else None, outcome)

    # ---- inside -----------------------------------------------------------------------------

    def _met(self, stage: str, report: Any) -> list[Any | None]:
        if self._store is None or self._world_size == 1:
            return [report]
        key = f"{self._number}/{stage}"
        try:
            return meet(self._store, key, self._rank, self._world_size, report, self._wait_s)
        except RuntimeError as error:
            raise SleepError(
                f"{self._call}: the job's store can't be reached: {error} [rank {self._rank}]"
            ) from error

    def _absences(self, reports: Sequence[Any | None]) -> dict[int, str]:
        absent = [rank for rank, report in enumerate(reports) if report is None]
        return dict.fromkeys(absent, f"did not come within {self._wait_s:g} s")

    def _raise(self, failures: Mapping[int, str], cause: Exception | None, outcome: str) -> None:
        if not failures:
            return
        lines = "\n".join(f"  rank {rank}: {text}" for rank, text in sorted(failures.items()))
        raise SleepError(
            f"{self._call} failed on ranks {sorted(failures)}: {outcome} "
            f"[raised on rank {self._rank}]\n{lines}"
        ) from cause


def _text(call: str, arguments: Mapping[str, Any]) -> str:
    return f"{call}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
