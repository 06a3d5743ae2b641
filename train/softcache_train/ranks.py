"""The processes of a run: one, or those that torchrun started."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process's place, and its device."""

    rank: int
    world: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks of ``values``, which is left alone."""
        values = values.clone()
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any rank."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def parallel(self, model: nn.Module, parts: bool = False) -> nn.Module:
        """The model, its gradients averaged over ranks after every backward pass; ``parts`` of it may have none."""
        return model if self.world == 1 else DistributedDataParallel(model, find_unused_parameters=parts)


@contextmanager
def join() -> Iterator[Ranks]:
    """Take the place that torchrun's environment gives; alone without it.

    Keep what lives on the ranks in the locals of a function called inside: a model or a tensor that still
    holds the group when the process ends aborts it, now and then, though all its work is done.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if world == 1:
        yield Ranks(rank, world, device)
        return
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Ranks(rank, world, device)
    except BaseException as e:
        traceback.clear_frames(e.__traceback__)
        raise
    finally:
        gc.collect()
        dist.destroy_process_group()
