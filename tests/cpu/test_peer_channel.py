"""What a group's channel claims of the symmetric pool. GPU tests have what it does with that."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distcomm import GroupMember
from distcomm.errors import SymmetricMemoryError
from distcomm.memory import PeerChannel
from tests.cpu.push_ranks import native_library

PAGE = 0x7000_0000_0000
PAGE_BYTES = 1 << 20


class Pool:
    """The page of a `SymmetricPool`."""

    device = torch.device("cuda", 0)
    signal_page_bytes = PAGE_BYTES

    def __init__(self) -> None:
        self.signal_claims = [(0, 4096)]  # another group's

    def claim_signals(self, start: int, num_bytes: int) -> int:
        self.signal_claims.append((start, start + num_bytes))
        return PAGE + start

    def release_signals(self, address: int) -> None:
        self.signal_claims = [each for each in self.signal_claims if each[0] != address - PAGE]


class Windows:
    """Those of a group whose other rank leaves at a certain exchange."""

    def __init__(self, num_exchanges: int, error: BaseException) -> None:
        self.member = GroupMember("tp", (0, 1), 0)
        self.comm: Any = SimpleNamespace(native=native_library())
        self._num_exchanges = num_exchanges
        self._error = error

    def count_common(self) -> None:
        pass

    def register_common(self) -> None:
        pass

    def find(self, address: int) -> None:
        return None

    def exchange(self, report: Any) -> list[Any]:
        self._num_exchanges -= 1
        if self._num_exchanges < 0:
            raise self._error
        return [report, report]


@pytest.mark.parametrize("num_exchanges", [0, 1, 2])
@pytest.mark.parametrize("error", [SymmetricMemoryError, KeyboardInterrupt])
def test_a_channel_that_was_never_made_claims_nothing(
    num_exchanges: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    pool: Any = Pool()
    leaving: Any = Windows(num_exchanges, error("gone"))
    staying: Any = Windows(3, error("gone"))
    sizes = {"num_kernel_bytes": 256, "num_mailbox_bytes": 4096, "timeout_s": 1.0}
    with pytest.raises(error):
        PeerChannel(pool, leaving, **sizes)
    assert pool.signal_claims == [(0, 4096)]
    PeerChannel(pool, staying, **sizes)
    assert len(pool.signal_claims) == 2
