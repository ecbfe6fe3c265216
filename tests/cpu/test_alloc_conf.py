"""Expandable segments are off inside the guard, and the user's settings survive it verbatim."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distcomm.errors import DistcommError
from distcomm.memory.alloc_conf import (
    AllocatorSettings,
    ExpandableSegmentsGuard,
    block_settings,
    expandable_segments_in,
    expandable_segments_off,
    without_expandable_segments,
)

DIVISIONS = "roundup_power2_divisions:[256:1,512:2,>:4]"
VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class FakeSettings(AllocatorSettings):
    """Settings as torch keeps them: a rejected text is recorded, an omitted option stays on."""

    def __init__(self, text: str = "", *, reads_at_once: bool = True, on: bool = False) -> None:
        self.text = text
        self.on = on or expandable_segments_in(text)
        self.reads_at_once = reads_at_once
        self.sets: list[str] = []
        self.reads = 0
        self.looks = 0
        self.rejected: str | None = None

    def current(self) -> str:
        self.reads += 1
        return self.text

    def expandable_segments(self) -> bool:
        self.looks += 1
        return self.on

    def set(self, text: str) -> None:
        self.sets.append(text)
        self.text = text
        if self.rejected is not None and self.rejected in text:
            raise ValueError("rejected")
        if "expandable_segments" in text:
            self.on = expandable_segments_in(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        ("expandable_segments:True", ""),
        (" max_split_size_mb : 64,expandable_segments:True,", "max_split_size_mb:64"),
        (
            "roundup_power2_divisions:[64:8,>:1],garbage_collection_threshold:0.5",
            "garbage_collection_threshold:0.5,roundup_power2_divisions:[64:8,>:1]",
        ),
    ],
)
def test_block_settings(text: str, expected: str):
    assert block_settings(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        ("  ", False),
        ("expandable_segments:True", True),
        ("expandable_segments:False", False),
        ("expandable_segments:true", True),
        (" expandable_segments : True ,", True),
        ("expandable_segments:Tr ue\n,max_split_size_mb:256", True),
        (f"{DIVISIONS},expandable_segments:True,max_split_size_mb:256", True),
        (f"{DIVISIONS},max_split_size_mb:256", False),
        ("expandable_segments:False,expandable_segments:True", True),
        ("expandable_segments:True,max_split_size_mb:256,expandable_segments:False", False),
        ("not_expandable_segments:True", False),
        ("other:[1,expandable_segments:True,2]", False),
        ("expandable_segments", False),
        ("expandable_segments:[True]", False),
    ],
)
def test_expandable_segments_in(text: str, expected: bool):
    assert expandable_segments_in(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "expandable_segments:False"),
        ("expandable_segments:True", "expandable_segments:False"),
        ("max_split_size_mb:256,", "max_split_size_mb:256,expandable_segments:False"),
        (
            f"expandable_segments : True , {DIVISIONS}",
            f"expandable_segments:False, {DIVISIONS}",
        ),
        ("other:[1,,2],a:1", "other:[1,,2],a:1,expandable_segments:False"),
        (DIVISIONS, f"{DIVISIONS},expandable_segments:False"),
        (
            "expandable_segments:False,a:1,expandable_segments:True",
            "expandable_segments:False,a:1,expandable_segments:False",
        ),
    ],
)
def test_without_expandable_segments(text: str, expected: str):
    assert without_expandable_segments(text) == expected


OTHER_OPTIONS = st.one_of(
    st.integers(20, 4096).map("max_split_size_mb:{}".format),
    st.floats(0.01, 0.99).map("garbage_collection_threshold:{}".format),
    st.sampled_from(["backend:native", "pinned_use_background_threads:True", "x: [1]"]),
    st.lists(st.integers(0, 9).map("1:{}".format), min_size=1).map(
        lambda pairs: f"roundup_power2_divisions:[{','.join(pairs)}]"
    ),
)
EXPANDABLE = st.sampled_from(
    ["expandable_segments:True", " expandable_segments : False", "expandable_segments:true "]
)


@given(st.lists(st.one_of(OTHER_OPTIONS, EXPANDABLE)))
def test_all_other_options_survive_in_order(options: list[str]):
    text = ",".join(options)
    others = [option for option in options if "expandable" not in option]
    result = without_expandable_segments(text)
    assert not expandable_segments_in(result)
    kept = result.replace("expandable_segments:False,", "").replace("expandable_segments:False", "")
    assert kept.rstrip(",") == ",".join(others)
    mentions = [option for option in options if "expandable" in option]
    assert expandable_segments_in(text) is (bool(mentions) and "rue" in mentions[-1])


@pytest.fixture
def older_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch without the getter, in an environment without settings."""
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings", raising=False)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_environment_counts_in_torchs_order(older_torch: pytest.MonkeyPatch):
    settings = AllocatorSettings()
    assert not settings.reads_at_once
    assert settings.current() == ""
    for name in reversed(VARIABLES):
        older_torch.setenv(name, f"max_split_size_mb:32,x:{name}")
        assert settings.current() == f"max_split_size_mb:32,x:{name}"
    older_torch.setenv(VARIABLES[0], "")
    assert settings.current() == ""


def test_before_cuda_starts_the_text_last_set_counts(older_torch: pytest.MonkeyPatch):
    texts: list[str] = []
    older_torch.setattr(torch._C, "_accelerator_setAllocatorSettings", texts.append)
    older_torch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    settings = AllocatorSettings()
    with ExpandableSegmentsGuard(settings):
        assert settings.current().strip() == "expandable_segments:False"
        assert not settings.expandable_segments()
    assert settings.current() == "expandable_segments:True"
    assert [text.strip() for text in texts] == [
        "expandable_segments:False",
        "expandable_segments:True",
    ]


def test_the_oldest_setter_will_do(older_torch: pytest.MonkeyPatch):
    texts: list[str] = []
    older_torch.delattr(torch._C, "_accelerator_setAllocatorSettings", raising=False)
    older_torch.setattr(torch.cuda.memory, "_set_allocator_settings", texts.append)
    AllocatorSettings().set("max_split_size_mb:32")
    assert texts == ["max_split_size_mb:32"]


def test_a_snapshot_shows_settings_made_at_run_time(older_torch: pytest.MonkeyPatch):
    in_force: dict[str, Any] = {"PYTORCH_CUDA_ALLOC_CONF": "a:1", "expandable_segments": True}
    older_torch.setenv("PYTORCH_ALLOC_CONF", "b:1")
    older_torch.setattr(torch.cuda, "is_initialized", lambda: True)
    older_torch.setattr(torch.cuda.memory, "_snapshot", lambda: {"allocator_settings": in_force})
    settings = AllocatorSettings()
    assert settings.current() == "a:1"
    assert settings.expandable_segments()  # set before, and kept by a text that omits it
    in_force["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:False"
    assert not settings.expandable_segments()


def test_an_allocator_without_snapshots(older_torch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise RuntimeError("cudaMallocAsync does not yet support snapshot")

    older_torch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    older_torch.setattr(torch.cuda, "is_initialized", lambda: True)
    older_torch.setattr(torch.cuda.memory, "_snapshot", refuse)
    assert AllocatorSettings().current() == "expandable_segments:True"
    assert AllocatorSettings().expandable_segments()


@pytest.mark.parametrize("reads_at_once", [True, False])
def test_off_once_and_restored_once(reads_at_once: bool):
    original = f" {DIVISIONS}, expandable_segments : True ,"
    settings = FakeSettings(original, reads_at_once=reads_at_once)
    guard = ExpandableSegmentsGuard(settings)
    for _ in range(3):
        settings.sets.clear()
        with guard, guard:
            assert not settings.on
            with guard:
                assert DIVISIONS in settings.text
            assert not settings.on
        assert settings.on
        assert settings.sets == [f" {DIVISIONS},expandable_segments:False ", original]
    assert settings.looks == 1  # a text of our own needs no second look


def test_a_text_that_omits_what_is_on_is_restored_with_it_on():
    settings = FakeSettings("max_split_size_mb:32", on=True)
    guard = ExpandableSegmentsGuard(settings)
    for _ in range(2):
        with guard:
            assert not settings.on
        assert settings.on
        assert settings.text == "max_split_size_mb:32"


@pytest.mark.parametrize("reads_at_once", [True, False])
def test_nothing_is_set_or_looked_up_again_while_off(reads_at_once: bool):
    settings = FakeSettings(DIVISIONS, reads_at_once=reads_at_once)
    guard = ExpandableSegmentsGuard(settings)
    for _ in range(10):
        with guard:
            pass
    assert settings.sets == []
    assert settings.looks == 1
    assert settings.reads == (10 if reads_at_once else 1)


def test_refresh_finds_what_cannot_be_asked_at_once():
    settings = FakeSettings(reads_at_once=False)
    guard = ExpandableSegmentsGuard(settings)
    with guard:
        settings.set("expandable_segments:True")
        with guard:
            assert settings.on
        guard.refresh()
        assert not settings.on
    assert settings.text == "expandable_segments:True"
    settings.set("a:1,expandable_segments:True")
    guard.refresh()
    assert settings.on  # nobody is inside
    with guard:
        assert settings.text.strip() == "a:1,expandable_segments:False"
    settings.set("expandable_segments:False")
    with guard:  # a remembered "on" isn't relied upon
        pass
    assert settings.sets[-1] == "expandable_segments:False"
    assert not settings.on


def test_an_exception_inside_restores():
    settings = FakeSettings("expandable_segments:True")
    guard = ExpandableSegmentsGuard(settings)
    with pytest.raises(LookupError), guard:
        raise LookupError
    assert settings.text == "expandable_segments:True"


def test_a_text_set_inside_is_kept(caplog: pytest.LogCaptureFixture):
    settings = FakeSettings("expandable_segments:True")
    guard = ExpandableSegmentsGuard(settings)
    with caplog.at_level(logging.WARNING):
        for text in ("expandable_segments:True,a:1", "expandable_segments:False", "a:2"):
            settings.set("expandable_segments:True")
            with guard:
                settings.set(text)
            assert settings.text == text
            assert settings.on is (text != "expandable_segments:False")
    assert len(caplog.records) == 1
    assert "expandable_segments:True,a:1" in caplog.text


def test_whoever_enters_next_overrules_a_text_set_inside():
    settings = FakeSettings("expandable_segments:True")
    guard = ExpandableSegmentsGuard(settings)
    with guard:
        settings.set("a:1,expandable_segments:True")
        with guard:
            assert settings.text.strip() == "a:1,expandable_segments:False"
        assert not settings.on
    assert settings.text == "a:1,expandable_segments:True"
    assert settings.on


def test_a_rejected_text_changes_nothing():
    settings = FakeSettings("a:1,expandable_segments:True")
    guard = ExpandableSegmentsGuard(settings)
    settings.rejected = "expandable_segments:False"
    for _ in range(2):
        with pytest.raises(ValueError, match="rejected"):
            guard.enter()
        assert settings.text == "a:1,expandable_segments:True"
        assert settings.on
        with pytest.raises(DistcommError):
            guard.leave()
    settings.rejected = None
    with guard:
        assert not settings.on
    assert settings.on


def test_a_guard_whose_restore_fails_has_been_left():
    settings = FakeSettings("expandable_segments:True")
    guard = ExpandableSegmentsGuard(settings)
    guard.enter()
    settings.rejected = "True"
    with pytest.raises(ValueError, match="rejected"):
        guard.leave()
    settings.rejected = None
    with pytest.raises(DistcommError, match="without enter"):
        guard.leave()
    settings.set("expandable_segments:True")
    with guard:
        assert not settings.on
    assert settings.on


def test_leave_without_enter():
    with pytest.raises(DistcommError, match="without enter"):
        ExpandableSegmentsGuard(FakeSettings()).leave()


def test_threads_share_one_switch():
    settings = FakeSettings("expandable_segments:True")
    guard = ExpandableSegmentsGuard(settings)
    barrier = threading.Barrier(8, timeout=60)
    seen_on: list[bool] = []

    def work(seed: int) -> None:
        choice = random.Random(seed)
        for _ in range(50):
            barrier.wait()
            with guard:
                seen_on.append(settings.on)
                if choice.random() < 0.5:
                    with guard:
                        seen_on.append(settings.on)
                seen_on.append(settings.on)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(seen_on) >= 800
    assert not any(seen_on)
    assert settings.text == "expandable_segments:True"
    assert settings.sets[::2] == ["expandable_segments:False "] * (len(settings.sets) // 2)
    assert settings.sets[1::2] == ["expandable_segments:True"] * (len(settings.sets) // 2)


def test_restored_only_when_the_last_thread_leaves():
    settings = FakeSettings("expandable_segments:True")
    guard = ExpandableSegmentsGuard(settings)
    thread = threading.Thread(target=guard.enter)
    thread.start()
    thread.join(60)
    with guard:
        pass
    assert not settings.on
    guard.leave()
    assert settings.on
    assert len(settings.sets) == 2


def test_the_process_guard_uses_torchs_settings():
    assert isinstance(expandable_segments_off._settings, AllocatorSettings)


REAL_TORCH = """
import torch
from distcomm.memory.alloc_conf import AllocatorSettings, expandable_segments_off as guard

get = torch._C._accelerator_getAllocatorSettings
put = torch._C._accelerator_setAllocatorSettings

def check(text, inside):
    with guard:
        assert get().rstrip() == inside, get()
        with guard:
            assert get().rstrip() == inside, get()
    assert get() == text, get()

check("max_split_size_mb:64 , expandable_segments:True",
      "max_split_size_mb:64 ,expandable_segments:False")
check(get(), "max_split_size_mb:64 ,expandable_segments:False")
text = "expandable_segments:True,max_split_size_mb:256"
put(text)
check(text, "expandable_segments:False,max_split_size_mb:256")
text = " roundup_power2_divisions:[256:1,512:2,>:4], expandable_segments : True ,"
put(text)
check(text, " roundup_power2_divisions:[256:1,512:2,>:4],expandable_segments:False")
put("expandable_segments:False")
check("expandable_segments:False", "expandable_segments:False")
text = "expandable_segments:True,max_split_size_mb:1"
try:
    put(text)
except ValueError:
    assert get() == text
else:
    raise SystemExit("torch accepted a size that is too small")
try:
    guard.enter()
except ValueError:
    assert get() == text
else:
    raise SystemExit("entered with a text that torch rejects")
"""


@pytest.mark.skipif(
    not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="torch without the getter"
)
def test_with_the_real_torch():
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    # the process starts with the first variable's text in force, which omits nothing
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "max_split_size_mb:64 , expandable_segments:True"
    environment["PYTORCH_ALLOC_CONF"] = "max_split_size_mb:32"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REAL_TORCH],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
