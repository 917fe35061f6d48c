"""What our trainers' evaluation adds to RecBole's: ranks row by row, histories of like length read together, seen items left out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.evaluator import Evaluator
from torch import Tensor

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


def by_length(batch: Interaction, items: str, length: str, limit: int = 16384) -> tuple[Tensor, list[Interaction]]:
    """A batch of padded histories as smaller ones of like length, each cut to its longest history.

    Args:
        batch: Rows with a padded history each.
        items: Column of the history `[B, L]`.
        length: Column of its length `[B]`.
        limit: Most items of the smaller batches.

    Returns:
        The rows in the order in which the smaller batches have them `[B]`, and these batches.
    """
    order = torch.sort(batch[length], stable=True).indices
    pieces = []
    for rows in pack(order, batch[length], limit):
        piece = batch[rows]
        pieces.append(Interaction(piece.interaction | {items: piece[items][:, : int(piece[length].max())]}))
    return order, pieces


def scored_by_length(batch: Interaction, items: str, length: str, score: Callable[[Interaction], Tensor]) -> Tensor:
    """Scores of a batch's rows [B, n_items], computed on `by_length`'s smaller batches by `score`."""
    order, pieces = by_length(batch, items, length)
    ranked = torch.cat([score(piece) for piece in pieces])
    scores = torch.empty_like(ranked)
    scores[order.to(scores.device)] = ranked
    return scores


@contextmanager
def seen_items_of(eval_data: Any) -> Iterator[Callable[[Interaction, Tensor], None]]:
    """While this lasts, batches of a loader tell their rows; gives the function that takes seen items out of their scores.

    A target that the user had met before is taken out, too: to leave it in would give it away. So it counts as not found.

    Args:
        eval_data: RecBole's loader for full ranking, of a `FlatSequentialDataset`.

    Raises:
        ValueError: The loader is of another kind.
    """
    dataset = eval_data._dataset
    fault = None
    if not isinstance(eval_data, FullSortEvalDataLoader):
        fault = "only a full ranking leaves seen items out, and eval_args asks for another one"
    elif not hasattr(dataset, "seen_items"):
        fault = (
            "the data set is RecBole's own, whose rows know the last items of a history only, until it is made by "
            "recbole_llm.create_dataset"
        )
    if fault:
        raise ValueError(
            f"seen_items=mask: {fault}; there is seen_items=keep. Set seen_items in a config file or on the command line."
        )

    def take_out(batch: Interaction, scores: Tensor) -> None:
        row, item = dataset.seen_items(batch[POINTER])
        scores[row.to(scores.device), item.to(scores.device)] = -torch.inf

    dataset.pointer_column = POINTER
    try:
        yield take_out
    finally:
        dataset.pointer_column = None
