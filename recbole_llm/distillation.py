"""DLLM2Rec's weights and losses, and the first table made of item vectors: pure functions on tensors.

Paper: Cui et al., "Distillation Matters", RecSys 2024 (arXiv 2405.00338), Eqs. 5-10; DROS for `robust_loss`.
Differs from the authors' code: the robust term's sum over all items is computed once and in logarithms; no weight meets a
loss through a [B,B] broadcast; the student's own top K never holds the padding item.
"""

import torch
from torch import Tensor
from torch.nn import functional


def position_weight(k: int, beta: float) -> Tensor:
    """Weight of a candidate's place: exp(-r / beta), r = 1..K, summing to 1 (Eq. 6). Returns [K]."""
    return torch.softmax(-torch.arange(1, k + 1, dtype=torch.float32) / beta, dim=0)


def truth_confidence(target_score: Tensor, temperature: float) -> Tensor:
    """How sure the teacher was of a row: exp(-d / T), d the distance from its text to the true item (Eq. 7). Returns [M].

    Divided by its mean over all labelled rows, since the paper leaves the normaliser open: a row of average confidence
    has 1, a bad row less.

    Args:
        target_score: Teacher's score of the true item, minus the distance for BIGRec [M].
        temperature: Scale of the distances.
    """
    confidence = torch.exp((target_score - target_score.max()) / temperature)
    return confidence / confidence.mean().clamp_min(1e-12)


def candidate_confidence(score: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """Confidence per candidate, softmax of -d / T within the row, as in the released code. Returns [R, K].

    Args:
        score: Minus the distance to each candidate [R, K].
        valid: Which candidates exist [R, K].
        temperature: Scale of the distances.
    """
    scaled = (score / temperature).masked_fill(~valid, torch.finfo(score.dtype).min)
    return torch.softmax(scaled, dim=1) * valid


def own_lists(scores: Tensor, k: int) -> Tensor:
    """The student's own top K of real items, without gradient [R, K]. Args: scores [R, n_items], row by row up to a shift; K."""
    return scores.detach()[:, 1:].topk(min(k, scores.shape[1] - 1), dim=1).indices + 1


def consistency(items: Tensor, own: Tensor) -> Tensor:
    """1 where a candidate is also in the student's own top K, else 0 (Eq. 8). Returns [R, K].

    Args:
        items: Candidates of the teacher, 0 for none [R, K].
        own: Items of the student's own lists, without the padding item [R, K].
    """
    return (items.unsqueeze(2) == own.unsqueeze(1)).any(dim=2).float()


def ranking_loss(scores: Tensor, weight: Tensor, total: Tensor | None = None, negative: Tensor | None = None) -> Tensor:
    """Importance-aware ranking distillation (Eq. 5) per labelled row. Returns [R].

    -sum_k w_k log sigma(s_k), the paper's, for a BCE base; with `total` -sum_k w_k log p_k, for a full-softmax base, whose logits
    are only known up to a shift, so that log sigma of one logit would mean nothing.

    Args:
        scores: Scores of the student of the teacher's candidates [R, K].
        weight: Importance of each candidate, 0 where there is none [R, K].
        total: Logarithm of the sum of exp(score) over all real items [R].
        negative: Score of a negative item per row, which is pushed below 1 with every candidate, as the released code does [R].
    """
    terms = functional.logsigmoid(scores) if total is None else scores - total.unsqueeze(1)
    if negative is not None:
        terms = terms + functional.logsigmoid(1 - negative).unsqueeze(1)
    return -(weight * terms).sum(dim=1)


def kl_loss(scores: Tensor, of_teacher: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """KL divergence from the teacher to the student over the teacher's candidates. Returns [R].

    Args:
        scores: Scores of the student of the teacher's candidates [R, K].
        of_teacher: The teacher's scores of them [R, K].
        valid: Which candidates exist [R, K].
        temperature: Scale of the teacher's scores.
    """
    teacher = torch.log_softmax((of_teacher / temperature).masked_fill(~valid, -1e9), dim=1)
    student = torch.log_softmax(scores.masked_fill(~valid, -1e9), dim=1)
    return (teacher.exp() * (teacher - student)).masked_fill(~valid, 0.0).sum(dim=1)


def robust_loss(logits: Tensor, items: Tensor, propensity: Tensor, beta: float) -> Tensor:
    """DROS: the worst case of a squared error over shifted item popularity, for each of some positive items. Returns [R, K].

    log( sum_j exp(pi_j s_j^2 / beta) - exp(pi_i s_i^2 / beta) + exp(pi_i (s_i - 1)^2 / beta) ); the sum over j is shared by
    the items of a row, and everything is kept in logarithms.

    Args:
        logits: Scores of the student [R, n_items].
        items: Positive items [R, K].
        propensity: pi over items [n_items], 0 for padding.
        beta: Radius.
    """
    energy = propensity * logits.square() / beta
    of_items = energy.gather(1, items)
    scores, pi = logits.gather(1, items), propensity[items]
    top = energy[:, 1:].max(dim=1, keepdim=True).values.detach()
    total = torch.exp(energy[:, 1:] - top).sum(dim=1, keepdim=True)
    rest = total - torch.exp(of_items - top)
    shifted = torch.exp(pi * (scores - 1).square() / beta - top)
    return torch.log((rest + shifted).clamp_min(1e-24)) + top


def propensity_scores(counts: Tensor) -> Tensor:
    """pi_j = ((n_j + 1) / sum(n + 1)) ** .05 over real items, 0 for padding. Args: counts [n_items]. Returns [n_items]."""
    smoothed = counts.float() + 1
    pi = (smoothed / smoothed[1:].sum()) ** 0.05
    pi[0] = 0
    return pi


def principal_components(
    vectors: Tensor, width: int, std: float, whiten: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """First principal components of the item vectors, scaled to one standard deviation. Returns [n_items, width].

    The scale matters: RecBole's .02 loses most of the gain, .1 keeps it. Hidden states of LLMs have a few huge directions;
    unless `whiten` makes all components equally large, those are the whole table.

    Args:
        vectors: One vector per item, row 0 padding [n_items, d].
        width: Components wanted; components that the vectors do not have are drawn at random.
        std: Standard deviation of the table.
        whiten: Whether every component has it, instead of the table as a whole.
        generator: Source of the random rest.
    """
    real = vectors[1:].double()
    centred = real - real.mean(dim=0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    # a direction that only the rounding of the vectors has is none
    directions = directions[sizes > torch.finfo(vectors.dtype).eps * max(real.shape) * sizes.max()]
    # The sign of a singular vector is the library's choice: fix it, so that the table is the same on every machine.
    signs = torch.sign(directions.gather(1, directions.abs().argmax(dim=1, keepdim=True)))
    parts = centred @ (directions * signs)[:width].T
    table = torch.zeros(len(vectors), width, dtype=torch.float64)
    table[1:, : parts.shape[1]] = parts / (parts.std(dim=0) if whiten else parts.std()).clamp_min(1e-12)
    if parts.shape[1] < width:
        table[1:, parts.shape[1] :] = torch.randn(
            len(real), width - parts.shape[1], generator=generator, dtype=torch.float64
        )
    return (table * std).float()
