"""RecBole's layers at the speed of a CPU: the same functions, computed faster.

torch draws the numbers of a dropout one by one on a CPU, which takes a sixth of an epoch of SASRec on one core and does not get
faster with more; RecBole composes GELU of five operations. On a GPU neither matters, so nothing is changed there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from recbole.model.layers import FeedForward
from torch import Tensor, nn
from torch.nn import functional

_BITS = 16


def dropout(inputs: Tensor, p: float) -> Tensor:
    """Dropout whose mask is drawn four numbers at a time, each of 16 bits: p is rounded to 1/65536.

    Args:
        inputs: Of any shape, on a CPU.
        p: Share that is set to 0.
    """
    count = inputs.numel()
    # the whole range of int64: by default `random_` leaves the sign out, which every fourth number would be without
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[:count].view(inputs.shape)
    threshold = round(p * 2**_BITS) - 2 ** (_BITS - 1)
    if threshold >= 2 ** (_BITS - 1):
        return inputs * 0.0
    # the comparison writes 0 and 1 as numbers: turning truth values into numbers would take twice as long as all of this
    kept = torch.ge(numbers, threshold, out=torch.empty(inputs.shape, dtype=inputs.dtype))
    return inputs * kept.mul_(1 / (1 - p))


def fuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam and AdamW make their step in one pass over each parameter, where torch can and RecBole has not asked for another way.

    Args:
        optimizer: Any optimizer; others are left as they are.
    """
    for group in optimizer.param_groups:
        plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and not group.get("amsgrad")
        if plain and all(parameter.device.type == "cpu" for parameter in group["params"]):
            group["fused"] = True


@contextmanager
def fast_layers(model: nn.Module) -> Iterator[None]:
    """While this lasts, the model's Dropout and RecBole's GELU on a CPU are computed by faster means.

    Args:
        model: Any model; on another device nothing changes, and its dropouts drop nothing outside of training mode.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    dropouts = [module for module in model.modules() if on_cpu and type(module) is nn.Dropout]
    gelus = [
        module
        for module in model.modules()
        if on_cpu and type(module) is FeedForward and module.intermediate_act_fn == module.gelu
    ]
    for module in dropouts:
        module.forward = partial(_forward, module)
    for module in gelus:
        module.intermediate_act_fn = functional.gelu
    try:
        yield
    finally:
        for module in dropouts:
            del module.forward
        for module in gelus:
            module.intermediate_act_fn = module.gelu


def _forward(module: nn.Dropout, inputs: Tensor) -> Tensor:
    return dropout(inputs, module.p) if module.training and module.p > 0 else inputs
