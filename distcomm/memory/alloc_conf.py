"""torch's expandable segments, switched off around a pool that can't have them.

A `torch.cuda.MemPool` over a pluggable allocator doesn't work with `expandable_segments:True`
(pytorch#147851). torch keeps its allocator settings as one string ("the text" below):

- setting a text resets `max_split_size_mb`, `max_non_split_rounding_mb`,
  `roundup_power2_divisions` and `garbage_collection_threshold` where it omits them, so the whole
  text is set again with only this option changed;
- `expandable_segments` and the rest keep their value where a text omits them, so a text alone
  doesn't always say whether expandable segments are on;
- a text that torch rejects is recorded all the same.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable
from typing import Any

import torch

from ..errors import DistcommError

__all__ = [
    "AllocatorSettings",
    "ExpandableSegmentsGuard",
    "block_settings",
    "expandable_segments_in",
    "expandable_segments_off",
    "without_expandable_segments",
]

logger = logging.getLogger(__name__)

_OPTION = "expandable_segments"

# Variables of torch, not of distcomm, hence not in env.py. In torch's order: the first that is
# set counts, even when it is empty.
_TORCH_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

_COMMA_OUTSIDE_BRACKETS = re.compile(r",(?![^\[\]]*\])")


def _split_options(text: str) -> list[str]:
    return [option for option in _COMMA_OUTSIDE_BRACKETS.split(text) if option.strip()]


def _key_and_value(option: str) -> tuple[str, str]:
    # torch drops white space wherever it is, also within a word
    key, _, value = "".join(option.split()).partition(":")
    return key, value


def _stated_value(text: str) -> bool | None:
    """What `text` sets `expandable_segments` to; None when it omits it."""
    stated: bool | None = None
    for key, value in map(_key_and_value, _split_options(text)):
        if key == _OPTION:
            stated = value.lower() == "true"
    return stated


def _with_value(text: str, value: bool) -> str:
    options = _split_options(text)
    wanted = f"{_OPTION}:{value}"
    replaced = [wanted if _key_and_value(option)[0] == _OPTION else option for option in options]
    return ",".join(replaced if wanted in replaced else [*replaced, wanted])


def expandable_segments_in(settings: str) -> bool:
    """Whether a settings text switches expandable segments on; the last mention counts."""
    return _stated_value(settings) is True


def without_expandable_segments(settings: str) -> str:
    """The same options in the same order, with `expandable_segments:False`."""
    return _with_value(settings, False)


def block_settings(settings: str) -> str:
    """What of the text decides how torch cuts memory into blocks, in any order."""
    options = (_key_and_value(option) for option in _split_options(settings))
    return ",".join(sorted(f"{key}:{value}" for key, value in options if key != _OPTION))


class AllocatorSettings:
    """torch's allocator settings, those made at run time included.

    torch 2.13 returns the text in force at once. Before, a snapshot of the allocator has it, from
    CUDA's initialization on; until then it is the text last set here, else the environment's.

    Attributes:
        reads_at_once: whether `current` costs one call instead of a snapshot of all segments.
    """

    reads_at_once: bool

    def __init__(self) -> None:
        self._get: Callable[[], str] | None = getattr(
            torch._C, "_accelerator_getAllocatorSettings", None
        )
        self._set: Callable[[str], None] = (
            getattr(torch._C, "_accelerator_setAllocatorSettings", None)
            or torch.cuda.memory._set_allocator_settings
        )
        self._last_set: str | None = None
        self.reads_at_once = self._get is not None

    def current(self) -> str:
        """The text last set, by anyone, or else found in the environment."""
        if self._get is not None:
            return self._get()
        text = (self._snapshot() or {}).get("PYTORCH_CUDA_ALLOC_CONF", self._last_set)
        return _environment_text() if text is None else str(text)

    def set(self, text: str) -> None:
        """Sets `text`; see the module's docstring for what becomes of options that it omits.

        Raises:
            RuntimeError, ValueError: torch rejects it, but has recorded it.
        """
        self._set(text)
        self._last_set = text

    def expandable_segments(self) -> bool:
        """Whether expandable segments are on. It may take a snapshot, so not for a hot path.

        Where neither the text nor a snapshot tells (CUDA isn't initialized, or torch's allocator
        isn't the native one), the environment does.
        """
        stated = _stated_value(self.current())
        if stated is None:
            stated = (self._snapshot() or {}).get(_OPTION)
        return expandable_segments_in(_environment_text()) if stated is None else stated

    def _snapshot(self) -> dict[str, Any] | None:
        if not torch.cuda.is_initialized():
            return None
        try:
            return dict(torch.cuda.memory._snapshot()["allocator_settings"])
        except RuntimeError:  # not every backend takes snapshots; cudaMallocAsync doesn't
            return None


def _environment_text() -> str:
    values = (os.environ.get(name) for name in _TORCH_VARIABLES)
    return next((value for value in values if value is not None), "")


class ExpandableSegmentsGuard:
    """Keeps expandable segments off while anyone is inside; the last to leave restores them.

    The settings are those of the whole process, so use `expandable_segments_off`, not a second
    guard over the same settings. All methods are thread-safe. Entering is cheap while expandable
    segments are off: one call to torch, or none where torch can't be asked at once; then the
    answer is a remembered one, and `refresh` has to be called.

    A text that someone sets meanwhile stays when the guard is left, and one that switches
    expandable segments on is overruled by whoever enters next, until the last one leaves.
    """

    def __init__(self, settings: AllocatorSettings | None = None) -> None:
        self._settings = AllocatorSettings() if settings is None else settings
        # reentrant: a finalizer may enter while its thread is in here
        self._lock = threading.RLock()
        self._depth = 0
        self._seen = ""  # the text that `_on` belongs to, unless stale
        self._on = False
        self._is_stale = True
        self._switched: tuple[str, str] | None = None  # the text to restore, and ours
        self._has_warned = False

    def __enter__(self) -> None:
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()

    def enter(self) -> None:
        """Switches expandable segments off if they are on; `leave` has to follow.

        Raises:
            RuntimeError, ValueError: torch rejects the text; nothing is changed or entered.
        """
        with self._lock:
            self._look()
            if self._on:
                self._switch_off()
            self._depth += 1

    def leave(self) -> None:
        """Undoes one `enter`; the last one restores the text from before.

        Raises:
            DistcommError: there is no `enter` to undo.
            RuntimeError, ValueError: torch rejects the former text; the guard is left.
        """
        with self._lock:
            if self._depth == 0:
                raise DistcommError("ExpandableSegmentsGuard.leave() was called without enter()")
            self._depth -= 1
            if self._depth == 0 and self._switched is not None:
                self._restore(*self._switched)

    def refresh(self) -> None:
        """Asks torch again whether expandable segments are on.

        To be called before a pool grows (not before each use of it): it finds a setting made
        since, where torch can't be asked at each `enter`. It may take a snapshot.
        """
        with self._lock:
            self._is_stale = True
            self._look()
            if self._on and self._depth:
                self._switch_off()

    def _look(self) -> None:
        settings = self._settings
        # a remembered "on" may be out of date too, and its text would be restored
        if not (settings.reads_at_once or self._is_stale or self._on):
            return
        text = settings.current()
        if self._is_stale or text != self._seen:
            self._remember(text, settings.expandable_segments())

    def _remember(self, text: str, on: bool) -> None:
        self._seen, self._on, self._is_stale = text, on, False

    def _switch_off(self) -> None:
        former = self._seen
        # the space, which torch drops, tells our text from the same one set by someone else
        ours = without_expandable_segments(former) + " "
        self._is_stale = True
        try:
            self._settings.set(ours)
        except Exception:
            self._switch_on(former)
            raise
        self._switched = (former, ours)
        self._remember(ours, False)

    def _restore(self, former: str, ours: str) -> None:
        self._switched = None
        self._is_stale = True
        text = self._settings.current()
        if text != ours and not self._has_warned:
            self._has_warned = True
            logger.warning("allocator settings changed to %r around a pool's use; kept", text)
        target = former if text == ours else text
        if text == ours or _stated_value(text) is None:
            self._switch_on(target)
            self._remember(target, True)

    def _switch_on(self, text: str) -> None:
        """Puts `text` in force, with expandable segments on unless it says otherwise."""
        if _stated_value(text) is None:
            self._settings.set(_with_value(text, True))
        self._settings.set(text)


expandable_segments_off = ExpandableSegmentsGuard()
"""This process's guard: ``with expandable_segments_off: ...``"""
