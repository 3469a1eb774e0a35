"""Sums over the ranks of a `torch.distributed` group, each of which has a share of the batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..errors import ModeError
from ..model import BatchNorm, ConvWaveNet


def rank_and_count() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first_rank(value: Any) -> Any:
    """The first rank's value of something that can be pickled; it comes from a process of the same program."""
    if dist.is_initialized():
        values = [value]
        dist.broadcast_object_list(values)
        (value,) = values
    return value


def batch_norm_over_ranks(norm: BatchNorm, x: Tensor, multiplicity: Tensor) -> Tensor:
    """`norm(x, multiplicity)` with the batch statistics of all ranks; differentiable."""
    if not norm.training:
        return norm(x, multiplicity)
    from torch.distributed.nn.functional import all_reduce  # not in every build of PyTorch

    total = all_reduce(multiplicity.sum())
    if total <= 1:
        raise ModeError("batch norm cannot compute a variance from one window; train on more than one at a time")
    mean = all_reduce((multiplicity * x).sum(0)) / total
    var = all_reduce((multiplicity * (x - mean) ** 2).sum(0)) / (total - 1)
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var, norm.momentum)
    return (x - mean) / torch.sqrt(var + norm.eps) * norm.weight + norm.bias


def sum_over_ranks(loss: Tensor, model: ConvWaveNet) -> Tensor:
    """The loss summed over the ranks; sums the gradients in place, all in one message."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([loss.view(1), parameters_to_vector(gradients)])
    dist.all_reduce(flat)
    vector_to_parameters(flat[1:], gradients)
    return flat[0].clone()
