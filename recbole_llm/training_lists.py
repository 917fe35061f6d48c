"""What a device model learns from a list: its loss, and negatives that look like what a decoder of digits might write.

Paper: LSC4Rec (arXiv 2501.05647), cooperative training; the method is told by the authors' code alone (the paper's text was not at hand).
"""

import torch
from torch import Tensor
from torch.nn import functional


def list_loss(scores: Tensor, there: Tensor, kind: str, positive: Tensor | None = None) -> Tensor:
    """Mean loss of lists whose first item is the target.

    Args:
        scores: [T, C].
        there: Which places count; the first column always does [T, C].
        kind: listwise (softmax over the list) | bce (binary cross entropy, averaged over the places of each list).
        positive: Which places are the target's, for bce [T, C]; None is the first column.
    """
    if kind == "listwise":
        target = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        return functional.cross_entropy(scores.float().masked_fill(~there, float("-inf")), target)
    if positive is None:
        positive = torch.zeros_like(there)
        positive[:, 0] = True
    each = functional.binary_cross_entropy_with_logits(scores.float(), positive.float(), reduction="none") * there
    return (each.sum(dim=1) / there.sum(dim=1)).mean()


def digit_neighbours(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Numbers made of the pieces of other ones, as a decoder of digits might confuse them [T, count]; a row without any gives 0.

    A number is cut from the right into two pieces of two digits and what remains; each new one takes its pieces from three members of
    the list drawn at random, or 0 for what remains. The authors take the whole product of the pieces and shuffle it.

    Args:
        candidates: Numbers, 0 for none [T, K].
        count: How many are made.
        generator: Source of the draws.
    """
    if not candidates.shape[1]:
        return candidates.new_zeros(len(candidates), count)
    there = (candidates > 0).float()
    some = there.sum(dim=1) > 0
    weight = torch.where(some.unsqueeze(1), there, 1.0)
    first, middle, last = (
        candidates.gather(1, torch.multinomial(weight, count, replacement=True, generator=generator)) for _ in range(3)
    )
    keeps = torch.rand(first.shape, generator=generator) * (there.sum(dim=1, keepdim=True) + 1) >= 1
    made = first // 10_000 * keeps * 10_000 + middle // 100 % 100 * 100 + last % 100
    return made * some.unsqueeze(1)
