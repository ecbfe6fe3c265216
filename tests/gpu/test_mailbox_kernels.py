"""Kernels that use mailboxes, or other ranks' tensors, on one GPU: each rank is a stream.

The ranks' blocks wait for each other, so all of them have to fit on the GPU at once. And so the
host mustn't wait for the GPU while only some have been launched, as CUDA may when it loads a
kernel: all ranks have run each kernel without work before.
"""

from __future__ import annotations

import random

import pytest
import torch

from distcomm import kernels
from distcomm.kernels import Mailboxes, PeerTensors, mailbox_bytes, signal_bytes
from tests.worker_pool import WorkerPool, fresh_init_method

MOST_VECTORS = 3000
OPS = ("one_shot_push", "two_shot_push", "reduce_scatter_push", "all_gather_push")
DIRECT = ("two_shot_direct", "all_gather_direct")
GATHERS = ("all_gather_push", "all_gather_direct")


class Ranks:
    """W ranks on one GPU, whose memory lies one after another."""

    def __init__(self, world: int) -> None:
        self.world = world
        room = mailbox_bytes() + signal_bytes(world, kernels.MAX_BLOCKS)
        self.at = room + -room % 4096
        self.stride = self.at + (2 * world * MOST_VECTORS * 16 + 4095) // 4096 * 4096
        self.memory = torch.zeros((world, self.stride), dtype=torch.uint8, device="cuda")
        self.memory[:, : mailbox_bytes()] = 0xFF
        base = self.memory.data_ptr()
        flags = [base + rank * self.stride + mailbox_bytes() for rank in range(world)]
        signals = torch.tensor(flags, device="cuda")
        overlaps = torch.cuda.get_device_capability() >= (9, 0)
        self.boxes = [
            Mailboxes(
                base=base,
                stride=self.stride,
                turns=torch.zeros(kernels.MOST_BLOCKS, dtype=torch.int32, device="cuda"),
                rank=rank,
                world_size=world,
                overlaps=overlaps,
            )
            for rank in range(world)
        ]
        self.peers = [PeerTensors(signals, self.stride, rank, world) for rank in range(world)]
        self.streams = [torch.cuda.Stream() for _ in range(world)]
        torch.cuda.synchronize()

    def tensors(self, rank: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of so many bytes each, at the same place of each rank's memory."""
        own = self.memory[rank, self.at :]
        half = len(own) // 2
        return own[:inputs].view(torch.bfloat16), own[half:][:outputs].view(torch.bfloat16)

    def run(self, op: str, num_vectors: int) -> list[torch.Tensor]:
        """Inputs that the ranks have, and what has become of them: outputs by rank."""
        inputs = num_vectors * 16 * (self.world if "scatter" in op else 1)
        outputs = num_vectors * 16 * (self.world if op in GATHERS else 1)
        torch.cuda.synchronize()
        results = []
        for rank, stream in enumerate(self.streams):
            x, output = self.tensors(rank, inputs, outputs)
            results.append(output)
            with torch.cuda.stream(stream):
                first = output.data_ptr() - rank * self.stride
                if op == "two_shot_direct":
                    kernels.two_shot_direct(x, first, self.boxes[rank], self.peers[rank])
                elif op == "all_gather_direct":
                    kernels.all_gather_direct(x.data_ptr(), first, x.nbytes, self.peers[rank])
                else:
                    getattr(kernels, op)(x, output, self.boxes[rank])
        torch.cuda.synchronize()
        return results

    def fill(self, op: str, num_vectors: int, seed: int) -> list[torch.Tensor]:
        shares = self.world if "scatter" in op else 1
        generator = torch.Generator("cuda").manual_seed(seed)
        xs = []
        for rank in range(self.world):
            x, _ = self.tensors(rank, num_vectors * 16 * shares, 0)
            x.copy_(torch.randn(x.shape, generator=generator, device="cuda"))
            self.memory[rank, self.at :][(self.stride - self.at) // 2 :] = 0x77
            xs.append(x.clone())
        return xs

    def check(self, op: str, num_vectors: int, seed: int) -> None:
        xs = self.fill(op, num_vectors, seed)
        results = self.run(op, num_vectors)
        total = xs[0].float()
        for x in xs[1:]:
            total = total + x.float()
        size = num_vectors * 8
        for rank, result in enumerate(results):
            wanted = total.bfloat16()
            if op in GATHERS:
                wanted = torch.cat(xs)
            elif "scatter" in op:
                wanted = wanted[rank * size :][:size]
            assert torch.equal(result, wanted), (op, num_vectors, rank)

    def check_rest(self) -> None:
        assert (self.memory[:, : mailbox_bytes()] == 0xFF).all()
        assert not self.memory[:, mailbox_bytes() : self.at].any()
        first = self.boxes[0].turns
        assert all(torch.equal(boxes.turns, first) for boxes in self.boxes)
        assert (first == first[0]).all()


def pose_as_ranks(rank: int, _world: int, _url: str, world: int) -> None:
    torch.cuda.set_device(rank)
    ranks = Ranks(world)
    for op in (*OPS, *DIRECT):
        ranks.run(op, 0)
    choose = random.Random(world)
    for seed in range(120):
        op = choose.choice((*OPS, *DIRECT))
        ranks.check(op, choose.choice((1, 2, 9, 64, 65, 500, MOST_VECTORS // world)), seed)
    ranks.check_rest()


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < kernels.LEAST_CAPABILITY,
    reason="the GPU is too old for Triton, or simulated",
)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_streams_pose_as_ranks(gpus: WorkerPool, world: int) -> None:
    gpus.run(pose_as_ranks, fresh_init_method(), world, ranks=1)
