"""What our trainers' evaluation adds to RecBole's: ranks row by row, histories of like length read together, seen items left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator import Collector, Evaluator
from torch import Tensor
from torch.nn import functional

from recbole_llm.hooks import replaced
from recbole_llm.sequences import pack

POINTER = "row_pointer"
"""Column that tells an evaluated row's place in the log, while seen items are masked."""


class KeepsRanks(Evaluator):
    """RecBole's Evaluator that also keeps the rank of each row's target, for intervals and paired comparisons."""

    def __init__(self, config):
        super().__init__(config)
        self.ranks: list[int] = []

    def evaluate(self, dataobject):
        """Like RecBole's."""
        if "rec.topk" in dataobject:
            hits = dataobject.get("rec.topk")[:, :-1].bool()  # the last column counts the relevant items
            self.ranks = torch.where(hits.any(dim=1), hits.int().argmax(dim=1), -1).tolist()
        return super().evaluate(dataobject)


class CollectsHits(Collector):
    """RecBole's Collector that looks a row's one target up in its best items, instead of in a table of zeros [B, n_items]."""

    def eval_batch_collect(self, scores_tensor, interaction, positive_u, positive_i):
        """Like RecBole's."""
        each_one = torch.equal(positive_u.cpu(), torch.arange(len(scores_tensor)))
        if not each_one or not self.register.need("rec.topk"):
            return super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
        best = scores_tensor.topk(max(self.topk), dim=1).indices
        hits = (best == positive_i.to(best.device)[:, None]).long()
        # the last column counts the relevant items
        self.data_struct.update_tensor("rec.topk", functional.pad(hits, (0, 1), value=1))
        with replaced(self.register, "rec.topk", False):
            super().eval_batch_collect(scores_tensor, interaction, positive_u, positive_i)
        return None


class TopLists:
    """The best items of every evaluated row, and how sure the model was of the first of them.

    Args:
        k: Items of a list; all real items where there are fewer.
    """

    def __init__(self, k: int):
        self.k = k
        self._items: list[Tensor] = []
        self._sure: list[Tensor] = []

    def add(self, scores: Tensor) -> None:
        """Take the lists of some further rows; scores [B, n_items] as they are ranked, padding item and seen items last."""
        best = scores.topk(min(self.k, scores.shape[1] - 1), dim=1)
        self._items.append(best.indices.int().cpu())
        self._sure.append((best.values[:, 0] - scores.logsumexp(dim=1)).float().cpu())

    def tensors(self) -> dict[str, Tensor]:
        """`items` [R, k], best first, and `sure` [R], the log of the first one's share of the softmax over the catalogue."""
        return {"items": torch.cat(self._items), "sure": torch.cat(self._sure)}


def by_length(batch: Interaction, items: str, length: str, limit: int = 16384) -> Iterator[tuple[Tensor, Interaction]]:
    """A batch of padded histories as smaller ones of like length, each cut to its longest history.

    Args:
        batch: Rows with a padded history each.
        items: Column of the history `[B, L]`.
        length: Column of its length `[B]`.
        limit: Most items of the smaller batches.

    Yields:
        Which rows they are `[b]`, and these rows as a batch.
    """
    for rows in pack(torch.sort(batch[length], stable=True).indices, batch[length], limit):
        piece = batch[rows]
        yield rows, Interaction(piece.interaction | {items: piece[items][:, : int(piece[length].max())]})


def scored_by_length(batch: Interaction, items: str, length: str, score: Callable[[Interaction], Tensor]) -> Tensor:
    """Scores of a batch's rows [B, n_items], computed on `by_length`'s smaller batches by `score`."""
    scores = None
    for rows, piece in by_length(batch, items, length):
        ranked = score(piece)
        if scores is None:
            scores = ranked.new_empty(len(batch), ranked.shape[1])
        scores[rows.to(scores.device)] = ranked
    return scores


def refuse_unmaskable(eval_data: Any) -> None:
    """Refuse `seen_items: mask` where it cannot be done.

    Args:
        eval_data: The loader of an evaluation.

    Raises:
        ValueError: It is not RecBole's loader for full ranking, or not of a `FlatSequentialDataset`.
    """
    fault = None
    if not isinstance(eval_data, FullSortEvalDataLoader):
        fault = "only a full ranking leaves seen items out, and eval_args asks for another one"
    elif not hasattr(eval_data._dataset, "seen_items"):
        fault = (
            "the data set is RecBole's own, whose rows know the last items of a history only, until it is made by "
            "recbole_llm.create_dataset"
        )
    if fault:
        raise ValueError(
            f"seen_items=mask: {fault}; there is seen_items=keep. Set seen_items in a config file or on the command line."
        )


@contextmanager
def seen_items_of(eval_data: Any) -> Iterator[Callable[[Interaction, Tensor, Tensor], Tensor]]:
    """While this lasts, batches of a loader tell their rows; gives the function that ranks seen items last.

    That function takes a batch, its scores [B, n_items], which it changes, and the targets [B], and returns the targets as they are
    to be looked for: a target that the user had met before cannot be found, since to leave it in would give it away; the padding
    item, which stands behind everything, takes its place.

    Args:
        eval_data: RecBole's loader for full ranking, of a `FlatSequentialDataset`.

    Raises:
        ValueError: The loader is of another kind.
    """
    refuse_unmaskable(eval_data)
    dataset = eval_data._dataset

    def rank_last(batch: Interaction, scores: Tensor, targets: Tensor) -> Tensor:
        row, item = (each.to(scores.device) for each in dataset.seen_items(batch[POINTER]))
        # not -inf, which the padding has: where few items are left unseen, the seen ones come before it
        scores[row, item] = torch.finfo(scores.dtype).min
        again = torch.zeros(len(targets), dtype=torch.bool, device=scores.device)
        again[row[item == targets.to(scores.device)[row]]] = True
        return targets.masked_fill(again.to(targets.device), 0)

    with replaced(dataset, "pointer_column", POINTER):
        yield rank_last
