"""Losses over the catalogue from states and an item table, chunk by chunk: pure functions on tensors, and a choice of one.

RecBole scores every target against every item at once, [targets, items], and keeps several such tables until the gradients are
there. Here a chunk of targets is scored, its gradient taken, and its scores forgotten, so that memory is bounded and the scores
stay in the processor's cache; the three matrix products are what is left of the time.

Papers: sampled softmax, Bengio and Senécal 2008; gBCE, Petrov and Macdonald, "gSASRec", RecSys 2023.
Differs from the gSASRec authors' code: negatives are drawn once per batch and shared by its targets, so that they are scored by a
matrix product instead of a gather; the expectation is the same.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_LOG2_E = math.log2(math.e)
_TINY = torch.finfo(torch.float32).tiny
_MEBIBYTE = 2**20
RECORDED = 10
"""Tables of a chunk's scores that autograd holds while it finds the gradient of many terms (`chunked_loss`)."""


def rows_at_a_time(memory: float, n_items: int, device: torch.device | str) -> int:
    """How many targets may be scored at a time.

    Args:
        memory: Mebibytes of scores that may exist at a time; 0 takes what stays in a processor's cache on a CPU (8), and
            enough to keep a GPU busy (256).
        n_items: Scores of a target.
        device: Where they are computed.
    """
    memory = memory or (256 if torch.device(device).type == "cuda" else 8)
    return max(1, int(memory * _MEBIBYTE / (4 * n_items)))


def full_softmax_loss(states: Tensor, table: Tensor, targets: Tensor, rows: int) -> Tensor:
    """Mean cross entropy of each target against all items; equal to `cross_entropy(states @ table.T, targets)`.

    The scores of `rows` targets exist at a time, in float32, also under autocast.

    Args:
        states: Outputs of the network [T, d].
        table: Item table [n_items, d].
        targets: Item ids [T].
        rows: Targets that are scored at a time.

    Relations:
        Like `chunked_loss` with a cross entropy, but the gradient is written down instead of recorded: no pass over the scores
        is made for it.
    """
    return _FullSoftmax.apply(states, table, targets, rows, None)[0]


Wanted = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]


def soft_target_loss(
    states: Tensor, table: Tensor, targets: Tensor | None, rows: int, wanted: Wanted
) -> tuple[Tensor, Tensor]:
    """`full_softmax_loss`, and beside it a weighted cross entropy of further items, in the same pass over the scores.

    Args:
        states: Outputs of the network [T, d].
        table: Item table, row 0 padding [n_items, d].
        targets: Item ids [T], or None: no loss of targets.
        rows: States that are scored at a time.
        wanted: Called with scores [r, n_items], up to a factor and a shift of each row, and which of the T rows they are; gives
            some of these r rows, ascending [l], and for each the items that are wanted of it and their weights [l, K]. The
            weights are constants: no gradient goes through them.

    Returns:
        The loss of the targets, and -sum w log p(item) over all that is wanted, p being over the real items; as numbers. The
        gradient of their sum comes with the first one.
    """
    return _FullSoftmax.apply(states, table, targets, rows, wanted)


class _FullSoftmax(torch.autograd.Function):
    """Value and gradient of cross entropies in one pass over the states."""

    @staticmethod
    def forward(ctx, states: Tensor, table: Tensor, targets: Tensor | None, rows: int, wanted: Wanted | None):
        count, n_items = len(states), len(table)
        loss, further = (states.new_zeros((), dtype=torch.float32) for _ in range(2))
        to_states = torch.empty(states.shape, dtype=torch.float32, device=states.device)
        to_table = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
        scores = torch.empty(min(rows, count), n_items, dtype=torch.float32, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            items = table.detach().float()
            for begin in range(0, count, rows):
                chunk = slice(begin, min(begin + rows, count))
                state = states[chunk].detach().float()
                # powers of 2 are about twice as fast as powers of e, and the factor is cheapest on the states
                score = torch.mm(state * _LOG2_E, items.T, out=scores[: len(state)])
                if targets is None:
                    score[:, 0] = -torch.inf  # what is wanted is wanted among real items
                score.sub_(score.amax(dim=1, keepdim=True))
                target = None if targets is None else targets[chunk, None]
                of_target = None if target is None else score.gather(1, target)
                which, also, weight = wanted(score, chunk) if wanted else (None, None, None)
                of_also = None if which is None else score[which].gather(1, also)
                score.exp2_()
                real = score[:, 1:].sum(dim=1, keepdim=True) if wanted else None
                total = score.sum(dim=1, keepdim=True) if real is None else real + score[:, :1]
                # the probabilities are score / total: the division is cheaper on what is d wide than on what is n_items wide
                share = 1 / (total * count) if target is not None else torch.zeros_like(total)
                if which is not None:
                    real, whole = real[which].clamp_min(_TINY), weight.sum(dim=1, keepdim=True)
                    further += (weight * (real.log2() - of_also)).sum() / _LOG2_E
                    more = share.index_add(0, which, whole / real)
                    # the padding has a part in the targets' probabilities only
                    score[:, :1] *= (share / more).nan_to_num(0.0)
                    share = more
                to_state = torch.mm(score, items, out=to_states[chunk]).mul_(share)
                to_table.addmm_(score.T, state * share)
                if target is not None:
                    loss += (total.log2() - of_target).sum() / _LOG2_E
                    to_state.sub_(items[target[:, 0]], alpha=1 / count)
                    to_table.index_add_(0, target[:, 0], state, alpha=-1 / count)
                if which is not None:
                    to_state.index_add_(0, which, torch.einsum("lk,lkd->ld", weight, items[also]), alpha=-1)
                    back = weight.unsqueeze(2) * state[which].unsqueeze(1)
                    to_table.index_add_(0, also.flatten(), back.flatten(0, 1), alpha=-1)
        ctx.save_for_backward(to_states, to_table)
        ctx.types = states.dtype, table.dtype
        ctx.mark_non_differentiable(further)
        return loss / count, further

    @staticmethod
    def backward(ctx, gradient: Tensor, *_):
        to_states, to_table = ctx.saved_tensors
        of_states, of_table = ctx.types
        # a loss scaler's factor comes before the narrow type, so that small gradients are not lost
        return (to_states * gradient).to(of_states), (to_table * gradient).to(of_table), None, None, None


Terms = Callable[[Tensor, slice], tuple[Tensor, ...]]


def chunked_loss(states: Tensor, table: Tensor, terms: Terms, rows: int) -> tuple[Tensor, ...]:
    """A sum of loss terms of scores over all items, of which only some rows exist at a time.

    Args:
        states: Outputs of the network [T, d].
        table: Item table [n_items, d].
        terms: Called with scores [r, n_items] and which of the T rows they are; gives one scalar per term, such that the sums over
            all calls are the terms of the loss.
        rows: Targets that are scored at a time.

    Returns:
        The terms, as numbers; the gradient of their sum comes with the first one, so add them up before `backward`.
    """
    return _Chunked.apply(states, table, terms, rows)


class _Chunked(torch.autograd.Function):
    """Each term as a number; the first one has the gradient of their sum, which is known when the terms are."""

    @staticmethod
    def forward(ctx, states: Tensor, table: Tensor, terms: Terms, rows: int) -> tuple[Tensor, ...]:
        to_states = torch.empty(states.shape, dtype=torch.float32, device=states.device)
        to_table = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
        sums: list[Tensor] = []
        with torch.autocast(states.device.type, enabled=False):
            items = table.detach().float()
            for begin in range(0, len(states), rows):
                chunk = slice(begin, min(begin + rows, len(states)))
                state = states[chunk].detach().float()
                scores = (state @ items.T).requires_grad_()
                with torch.enable_grad():
                    parts = terms(scores, chunk)
                    (to_scores,) = torch.autograd.grad(sum(parts), scores)
                torch.mm(to_scores, items, out=to_states[chunk])
                to_table.addmm_(to_scores.T, state)
                now = [part.detach() for part in parts]
                sums = now if not sums else [a + b for a, b in zip(sums, now, strict=True)]
        ctx.save_for_backward(to_states, to_table)
        ctx.types = states.dtype, table.dtype
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    def backward(ctx, gradient: Tensor, *_):
        return _FullSoftmax.backward(ctx, gradient)[:4]


def scores_of(states: Tensor, table: Tensor, items: Tensor) -> Tensor:
    """Scores of a few items of each state, in float32 [T, K]. Args: states [T, d]; table [n_items, d]; items [T, K]."""
    with torch.autocast(states.device.type, enabled=False):
        return torch.einsum("td,tkd->tk", states.float(), functional.embedding(items, table).float())


def sampled_scores(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of the targets [T] and of negatives that all targets share [T, N], and which negatives are the target [T, N]."""
    of_target = (states * functional.embedding(targets, table)).sum(dim=1)
    of_negatives = states @ functional.embedding(negatives, table).T
    return of_target, of_negatives, negatives == targets[:, None]


def sampled_softmax_loss(
    states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, probability: Tensor
) -> Tensor:
    """Mean cross entropy of each target against drawn items that stand for the whole catalogue (logQ correction).

    exp(s_j) / (N q_j) of drawn items estimates the rest of the full softmax's denominator; the target stands in it as itself, since
    it is not drawn. A draw that is the target does not count.

    Args:
        states: Outputs of the network [T, d].
        table: Item table [n_items, d].
        targets: Item ids [T].
        negatives: Item ids drawn with replacement [N].
        probability: q, with which an item is drawn [n_items].
    """
    of_target, of_negatives, same = sampled_scores(states, table, targets, negatives)
    corrected = of_negatives.float() - torch.log(len(negatives) * probability[negatives])
    corrected = corrected.masked_fill(same, float("-inf"))
    own = of_target.float()
    return (torch.logsumexp(torch.cat([own[:, None], corrected], dim=1), dim=1) - own).mean()


def gbce_loss(states: Tensor, table: Tensor, targets: Tensor, negatives: Tensor, t: float) -> Tensor:
    """Generalised binary cross entropy, as in gSASRec: -(beta log s(s+) + sum_j log(1 - s(s_j))) / (N + 1), averaged.

    beta = a (t (1 - 1/a) + 1/a), a = N / (n_items - 1) the share of the catalogue that is drawn: t = 0 is binary cross entropy,
    t = 1 takes all over-confidence out that drawing so few negatives brings in.

    Args:
        states: Outputs of the network [T, d].
        table: Item table, row 0 padding [n_items + 1, d].
        targets: Item ids [T].
        negatives: Item ids drawn uniformly [N].
        t: Calibration, 0 to 1.
    """
    of_target, of_negatives, same = sampled_scores(states, table, targets, negatives)
    share = min(1.0, len(negatives) / (len(table) - 2))
    beta = share * (t * (1 - 1 / share) + 1 / share)
    against = functional.logsigmoid(-of_negatives.float()).masked_fill(same, 0.0).sum(dim=1)
    return -(beta * functional.logsigmoid(of_target.float()) + against).mean() / (len(negatives) + 1)


def draw_negatives(probability: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Item ids drawn with replacement [count]. Args: probability of each [n_items], on the generator's device."""
    return torch.multinomial(probability, count, replacement=True, generator=generator)


def uniform(n_items: int) -> Tensor:
    """The same probability for every item, 0 for padding [n_items]."""
    probability = torch.full((n_items,), 1 / (n_items - 1))
    probability[0] = 0
    return probability


def by_popularity(counts: Tensor) -> Tensor:
    """Probability in proportion to (n + 1), 0 for padding [n_items]. Args: how often each item is a target [n_items]."""
    probability = counts.float() + 1
    probability[0] = 0
    return probability / probability.sum()


@dataclass
class CatalogueLoss:
    """The loss that `loss_*` ask for, of states whose targets are known.

    Args:
        over: all (full softmax) | sampled (softmax) | gbce.
        count: Negatives drawn per batch.
        sampling: uniform | popularity; gbce is defined for uniform negatives.
        t: Calibration of gbce.
        memory: Mebibytes of scores that may exist at a time, see `rows_at_a_time`.
        generator: Source of the negatives.

    Raises:
        ValueError: A number that means nothing; the message names its setting and what there is instead.
    """

    over: str
    count: int
    sampling: str
    t: float
    memory: float
    generator: torch.Generator
    probability: Tensor | None = None

    def __post_init__(self):
        checks = [
            ("loss_negatives", self.count, self.count >= 1 and self.count == int(self.count), "1 or more"),
            ("loss_gbce_t", self.t, 0 <= self.t <= 1, "0 to 1"),
            ("loss_memory", self.memory, self.memory >= 0, "0 (what suits the device) or a number of mebibytes"),
        ]
        for key, value, fits, there_is in checks:
            if not fits:
                raise ValueError(
                    f"{key}={value}: not possible; there is {there_is}. Set {key} in a config file or on the command line."
                )

    def prepare(self, counts: Tensor) -> None:
        """Say how often each item is a target [n_items], padding included, before the first loss."""
        popular = self.sampling == "popularity" and self.over == "sampled"
        self.probability = by_popularity(counts.cpu()) if popular else uniform(len(counts))

    def __call__(self, states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of states [T, d] whose targets are items [T], with an item table [n_items, d]."""
        if self.over == "all":
            rows = rows_at_a_time(self.memory, len(table), states.device)
            return full_softmax_loss(states, table, targets, rows)
        negatives = draw_negatives(self.probability, int(self.count), self.generator).to(targets.device)
        if self.over == "gbce":
            return gbce_loss(states, table, targets, negatives, self.t)
        return sampled_softmax_loss(states, table, targets, negatives, self.probability.to(targets.device))
