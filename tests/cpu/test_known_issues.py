"""The table of known NCCL issues: what each row says, which row decides, what the user can undo."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest

from distcomm.errors import ArgumentError
from distcomm.nccl import known_issues
from distcomm.nccl.known_issues import (
    ACTIONS,
    FEATURES,
    KNOWN_ISSUES,
    KnownIssue,
    KnownIssues,
    Topology,
)

PAIR, FOUR, EIGHT = Topology(2, 1), Topology(4, 1), Topology(8, 1)
PAIR_APART, PAIRS, TWO_HOSTS = Topology(2, 2), Topology(4, 2), Topology(16, 2)
TOPOLOGIES = (PAIR, FOUR, EIGHT, PAIR_APART, PAIRS, TWO_HOSTS, Topology(3, 3), Topology(1, 1))

RACE, REGISTER = "captured-symmetric-race", "window-register-in-capture"
COPY_ENGINE, REPLAY, PXN = "copy-engine-pair-hang", "cross-host-replay-hang", "cross-host-pxn-hang"

# The table itself


def test_rows_are_well_formed():
    assert len({issue.name for issue in KNOWN_ISSUES}) == len(KNOWN_ISSUES)
    assert {issue.feature for issue in KNOWN_ISSUES} == set(FEATURES), "no feature without a row"
    for issue in KNOWN_ISSUES:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)+", issue.name)
        assert issue.name != "all"
        assert issue.action in ACTIONS
        assert issue.action != "fence" or issue.feature == "symmetric_capture"
        assert re.fullmatch(r"[\w-]+/[\w-]+#\d+|https://\S+", issue.reference)
        assert re.fullmatch(r"[A-Z][^\n]*[^.]\.", issue.summary)
        assert 22700 <= issue.since < (issue.fixed_in or 99999)
        assert any(issue.where(topology) for topology in TOPOLOGIES)


@pytest.mark.parametrize("issue", KNOWN_ISSUES, ids=lambda issue: issue.name)
def test_a_row_holds_from_its_first_version_to_the_one_before_its_fix(issue: KnownIssue):
    for topology in TOPOLOGIES:
        here = issue.where(topology)
        assert not issue.affects(issue.since - 1, topology)
        assert issue.affects(issue.since, topology) == here
        if issue.fixed_in is None:
            assert issue.affects(99999, topology) == here
        else:
            assert issue.affects(issue.fixed_in - 1, topology) == here
            assert not issue.affects(issue.fixed_in, topology)


def test_a_row_without_a_fix_holds_for_ever():
    issue = replace(KNOWN_ISSUES[0], fixed_in=None)
    assert issue.affects(99999, FOUR)
    assert not issue.affects(issue.since - 1, FOUR)


# What releases have, independently of the table

RELEASES: dict[tuple[int, Topology], dict[str, str]] = {
    (22605, TWO_HOSTS): {},
    (22703, FOUR): {REGISTER: "off"},
    (22707, PAIR): {REGISTER: "off"},
    (22707, TWO_HOSTS): {REGISTER: "off"},
    (22803, FOUR): {RACE: "fence", REGISTER: "off"},
    (22803, PAIR): {RACE: "fence", REGISTER: "off", COPY_ENGINE: "off"},
    (22807, TWO_HOSTS): {RACE: "fence", REGISTER: "off"},
    (22809, FOUR): {RACE: "fence", REGISTER: "off"},
    (22809, PAIR): {RACE: "fence", REGISTER: "off", COPY_ENGINE: "off"},
    (22809, TWO_HOSTS): {RACE: "fence", REGISTER: "off", REPLAY: "warn"},
    (22809, PAIRS): {RACE: "fence", REGISTER: "off", COPY_ENGINE: "off", REPLAY: "warn"},
    (22902, TWO_HOSTS): {RACE: "fence", REGISTER: "off", REPLAY: "warn"},
    (22907, EIGHT): {RACE: "fence", REGISTER: "off"},
    (22907, TWO_HOSTS): {RACE: "fence", REGISTER: "off", REPLAY: "warn", PXN: "warn"},
    (23003, TWO_HOSTS): {RACE: "fence", REGISTER: "off", REPLAY: "warn", PXN: "warn"},
    (23004, TWO_HOSTS): {RACE: "fence", REGISTER: "off", PXN: "warn"},
    (23004, PAIR): {RACE: "fence", REGISTER: "off", COPY_ENGINE: "off"},
    (23007, EIGHT): {},
    (23007, PAIR): {COPY_ENGINE: "off"},
    (23007, PAIR_APART): {COPY_ENGINE: "off"},
    (23007, PAIRS): {COPY_ENGINE: "off"},
    (23007, TWO_HOSTS): {},
    (23102, PAIR): {},
    (23102, PAIRS): {},
    (23206, TWO_HOSTS): {},
}


@pytest.mark.parametrize(("version", "topology"), RELEASES)
def test_what_a_release_has_where(version: int, topology: Topology):
    found = KnownIssues(version).affecting(topology)
    assert {issue.name: issue.action for issue in found} == RELEASES[version, topology]


@pytest.mark.parametrize(
    ("feature", "version", "topology", "expected"),
    [
        ("symmetric_capture", 22809, FOUR, RACE),
        ("symmetric_capture", 22707, FOUR, None),
        ("symmetric_capture", 23007, FOUR, None),
        ("window_register_in_capture", 22809, FOUR, REGISTER),
        ("window_register_in_capture", 23007, FOUR, None),
        ("copy_engine_collectives", 22809, PAIR, COPY_ENGINE),
        ("copy_engine_collectives", 22809, FOUR, None),
        ("capture_across_hosts", 22809, TWO_HOSTS, REPLAY),
        ("capture_across_hosts", 22809, EIGHT, None),
        ("communicators_across_hosts", 22907, TWO_HOSTS, PXN),
        ("communicators_across_hosts", 22809, TWO_HOSTS, None),
    ],
)
def test_which_issue_decides_about_a_feature(
    feature: str, version: int, topology: Topology, expected: str | None
):
    issue = KnownIssues(version).strictest(feature, topology)
    assert (issue and issue.name) == expected


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_the_strictest_issue_decides(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    rows = [replace(KNOWN_ISSUES[0], name=f"row-{action}", action=action) for action in ACTIONS]
    monkeypatch.setattr(known_issues, "KNOWN_ISSUES", tuple(rows[i] for i in order))
    for count, expected in enumerate(("off", "fence", "warn")):
        ignored = [row.name for row in rows[:count]]
        issue = KnownIssues(22809, ignored).strictest("symmetric_capture", FOUR)
        assert issue is not None
        assert issue.action == expected
    assert KnownIssues(22809, ["all"]).strictest("symmetric_capture", FOUR) is None


def test_an_unknown_feature_is_refused():
    with pytest.raises(ArgumentError, match=r"feature must be one of symmetric_capture, .*'nvls'"):
        KnownIssues(22809).strictest("nvls", FOUR)  # type: ignore[arg-type]


# Ignoring


@pytest.mark.parametrize("name", [issue.name for issue in KNOWN_ISSUES])
def test_an_ignored_issue_is_gone_and_the_others_stay(name: str):
    for (version, topology), expected in RELEASES.items():
        found = KnownIssues(version, (name,)).affecting(topology)
        assert {issue.name for issue in found} == expected.keys() - {name}


@pytest.mark.parametrize("ignored", [("all",), ["all"], {"all", RACE}])
def test_all_ignores_every_issue(ignored: tuple[str, ...] | list[str] | set[str]):
    for version, topology in RELEASES:
        assert KnownIssues(version, ignored).affecting(topology) == ()


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ArgumentError) as caught:
        KnownIssues(22809, (RACE, "captured-race", "pxn"))
    assert str(caught.value) == (
        "ignore_known_issues must be a collection of names out of captured-symmetric-race, "
        "window-register-in-capture, copy-engine-pair-hang, cross-host-replay-hang, "
        "cross-host-pxn-hang, all; got 'captured-race', 'pxn'"
    )


@pytest.mark.parametrize("text", ["all", RACE, ""])
def test_a_bare_string_is_refused(text: str):
    with pytest.raises(ArgumentError, match=f"all; got the string '{text}'"):
        KnownIssues(22809, text)


# The log line


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def test_one_line_names_all_issues_of_all_topologies(caplog: pytest.LogCaptureFixture):
    KnownIssues(22809, (REGISTER,)).log([FOUR, TWO_HOSTS, PAIR, PAIR])
    assert logged(caplog) == [
        (
            logging.WARNING,
            "NCCL 2.28.9 has known issues: "
            "captured-symmetric-race (symmetric_capture: fence; fixed in 2.30.7; "
            "sgl-project/sglang#37768); "
            "window-register-in-capture (window_register_in_capture: ignored; fixed in 2.30.7; "
            "NVIDIA/nccl#2209); "
            "copy-engine-pair-hang (copy_engine_collectives: off; fixed in 2.31.2; "
            "NVIDIA/nccl#2241); "
            "cross-host-replay-hang (capture_across_hosts: warn; fixed in 2.30.4; "
            "vllm-project/vllm#52504). "
            "A newer NCCL, or ignore_known_issues, changes that.",
        )
    ]


def test_what_is_ignored_everywhere_is_still_logged(caplog: pytest.LogCaptureFixture):
    KnownIssues(23007, ("all",)).log([PAIR])
    ((_, line),) = logged(caplog)
    assert "copy-engine-pair-hang (copy_engine_collectives: ignored;" in line
    assert RACE not in line


def test_an_issue_without_a_fix_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(known_issues, "KNOWN_ISSUES", (replace(KNOWN_ISSUES[0], fixed_in=None),))
    caplog.set_level(logging.INFO)
    KnownIssues(23206).log([FOUR])
    ((level, line),) = logged(caplog)
    assert level == logging.INFO  # there is nothing for the user to do
    assert "(symmetric_capture: fence; not fixed yet; sgl-project/sglang#37768)" in line


def test_nothing_is_logged_without_an_issue(caplog: pytest.LogCaptureFixture):
    KnownIssues(23206).log([PAIR, TWO_HOSTS])
    KnownIssues(22809).log([])
    assert logged(caplog) == []
