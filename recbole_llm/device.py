"""A small sequential model on a device: it scores a few candidates of a history, at every step of the way.

Most of RecBole's models score by the product of a state with an item table; a state then serves any list. Others are asked for the
whole catalogue, and those that read the candidate itself (DIN) for one candidate at a time.
"""

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.causality import fault_of_scores, forward_arguments, undisturbed
from recbole_llm.sequences import Log

ROWS_AT_ONCE = 1 << 11
"""Histories that are read at a time."""
SMALLEST = 1e-6  # of a probability whose log-odds are taken
Seen = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Positions [B] -> of each pair the number of its row within them [P], and an item that was met before [P]."""


class Device:
    """A RecBole sequential model as a scorer of candidate lists.

    Args:
        model: The model.

    """

    def __init__(self, model: Any):
        self.model = model
        self.by_state = fault_of_scores(model) is None
        self.ranks_all = self.by_state or type(model).full_sort_predict is not AbstractRecommender.full_sort_predict
        # RecBole's models of single items end in a sigmoid when they predict, and have it as a part
        self.gives_probability = not self.ranks_all and isinstance(getattr(model, "sigmoid", None), nn.Sigmoid)

    def batch(self, log: Log, positions: Tensor) -> Interaction:
        """The rows whose targets stand at some positions of a log, with histories of the model's length. Args: positions [B]."""
        model = self.model
        items, length = log.history(positions, model.max_seq_length)
        columns = {
            model.ITEM_SEQ: items,
            model.ITEM_SEQ_LEN: length,
            model.USER_ID: log.users[log.user_index(positions)],
            model.ITEM_ID: log.items[positions],
        }
        return Interaction(columns).to(model.device)

    def scores(self, batch: Interaction, items: Tensor, states: Tensor | None = None) -> Tensor:
        """Scores of a list for each history, with a gradient where there is one to be had; log-odds of models of probabilities.

        Args:
            batch: B histories in the model's columns.
            items: [B, K], 0 for no candidate.
            states: What the model makes of the histories [B, d], if that is known.

        Returns:
            [B, K].
        """
        model = self.model
        if self.by_state:
            states = model(**forward_arguments(model, batch)) if states is None else states
            # not by the module, which would keep the vector of 0 from being trained where that is asked for
            vectors = functional.embedding(items, model.item_embedding.weight)
            return (vectors * states.unsqueeze(1)).sum(dim=2)
        if self.ranks_all:
            return model.full_sort_predict(batch).view(len(items), -1).gather(1, items)
        count = items.shape[1]
        columns = {
            name: batch[name].repeat_interleave(count, dim=0)
            for name in (model.ITEM_SEQ, model.ITEM_SEQ_LEN, model.USER_ID)
        }
        one = Interaction(columns | {model.ITEM_ID: items.flatten()})
        scores = model.predict(one).view(items.shape)
        return scores.clamp(SMALLEST, 1 - SMALLEST).logit() if self.gives_probability else scores

    @torch.no_grad()
    def rerank(self, log: Log, positions: Tensor, items: Tensor) -> Tensor:
        """Scores of a list for each of many positions of a log, in evaluation mode. Args: [R], [R, K]. Returns: [R, K] on the CPU."""
        self.model.eval()
        at_once = ROWS_AT_ONCE if self.ranks_all else max(1, ROWS_AT_ONCE // items.shape[1])
        parts = [
            self.scores(self.batch(log, some), list_.to(self.model.device)).float().cpu()
            for some, list_ in zip(positions.split(at_once), items.split(at_once), strict=True)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def states(self, log: Log, positions: Tensor) -> Tensor:
        """What the model makes of the history before each position [R, d], where a state serves any list; on the CPU."""
        self.model.eval()
        parts = []
        for some in positions.split(ROWS_AT_ONCE):
            batch = self.batch(log, some)
            parts.append(self.model(**forward_arguments(self.model, batch)).float().cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def of_states(self, states: Tensor, items: Tensor) -> Tensor:
        """Scores of lists from states, both on the CPU. Args: [R, d], [R, K]. Returns: [R, K]."""
        vectors = self.item_vectors()
        pairs = zip(states.split(ROWS_AT_ONCE), items.split(ROWS_AT_ONCE), strict=True)
        return torch.cat([(vectors[list_] * state.unsqueeze(1)).sum(dim=2) for state, list_ in pairs])

    @torch.no_grad()
    def rank_of(self, log: Log, positions: Tensor, seen: Seen | None = None) -> Tensor | None:
        """Rank of the item that stands at each position among the whole catalogue, from 0 [R]; None for a model of single items.

        Args:
            log: The log.
            positions: [R].
            seen: Gives what was met before some positions, which then is not ranked; a target among it has rank -1.
        """
        if not self.ranks_all:
            return None
        self.model.eval()
        ranks = []
        for batch, scores in self._ranked(log, positions, seen):
            own = scores.gather(1, batch[self.model.ITEM_ID].unsqueeze(1))
            rank = (scores > own).sum(dim=1)
            ranks.append(torch.where(own[:, 0] > float("-inf"), rank, -1).cpu())
        return torch.cat(ranks)

    @torch.no_grad()
    def best(self, log: Log, positions: Tensor, k: int, seen: Seen | None = None) -> tuple[Tensor, Tensor]:
        """The k best of the whole catalogue at each position, and their scores, as `best_of` has them; on the CPU.

        Args:
            log: The log.
            positions: [R].
            k: How many.
            seen: Gives what was met before some positions, which then is not ranked.
        """
        self.model.eval()
        parts = [best_of(scores, k) for _, scores in self._ranked(log, positions, seen)]
        items, scores = (torch.cat([each.cpu() for each in column]) for column in zip(*parts, strict=True))
        return items, scores

    def whole(self, batch: Interaction, seen: Callable[[Interaction], tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Scores of the whole catalogue, -inf for the padding item and what was seen [B, n_items].

        Args:
            batch: B histories in the model's columns.
            seen: Gives for a batch pairs of a row's number and an item that is not ranked there.
        """
        scores = self.model.full_sort_predict(batch).view(len(batch), -1).float()
        scores[:, 0] = float("-inf")
        if seen is not None:
            row, item = (each.to(scores.device) for each in seen(batch))
            scores[row, item] = float("-inf")
        return scores

    def _ranked(self, log: Log, positions: Tensor, seen: Seen | None) -> Iterator[tuple[Interaction, Tensor]]:
        """Batches of rows, and their scores of the whole catalogue."""
        for some in positions.split(ROWS_AT_ONCE // 4):
            batch = self.batch(log, some)
            yield batch, self.whole(batch, seen and (lambda _, some=some: seen(some)))

    def item_vectors(self) -> Tensor | None:
        """The model's own vectors of items [n_items, d]; None if it has no such table."""
        weight = getattr(getattr(self.model, "item_embedding", None), "weight", None)
        return weight.detach().cpu() if weight is not None and len(weight) == self.model.n_items else None

    def size(self) -> int:
        """Bytes of its weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())

    def latency_ms(self, log: Log, position: Tensor, items: Tensor, own: int = 0, repeats: int = 100) -> float:
        """Median time of one re-ranking, the history included, in milliseconds.

        Args:
            log: The log.
            position: Of the row [1].
            items: Its list [1, K].
            own: How many of the model's own best items of the whole catalogue are found besides.
            repeats: How often it is measured.
        """
        batch, items = self.batch(log, position), items.to(self.model.device)
        spent = []
        with undisturbed(self.model):
            for _ in range(repeats):
                began = perf_counter()
                if own:
                    whole = self.whole(batch)
                    best_of(whole, own)[0].cpu(), whole.gather(1, items).cpu()
                else:
                    self.scores(batch, items).cpu()
                spent.append(perf_counter() - began)
        return 1e3 * median(spent)


def best_of(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items of the catalogue, fewer if it is smaller, 0 where the score is -inf, and their scores, each [B, k].

    Args:
        scores: Of the whole catalogue [B, n_items].
        k: How many.
    """
    found = scores.topk(min(k, scores.shape[1] - 1), dim=1)
    return found.indices.masked_fill(found.values == float("-inf"), 0), found.values


def draw_by_token(model: Any, dataset: Any) -> None:
    """Deal the initial vectors of an item table out by the order of the items' tokens, so that the order of a file changes nothing.

    Args:
        model: With a table of one row per item, or it is left alone.
        dataset: RecBole's dataset; one that knows no tokens leaves the table as it is.
    """
    table, tokens = getattr(model, "item_embedding", None), getattr(dataset, "field2id_token", None)
    if not isinstance(table, nn.Embedding) or tokens is None or table.num_embeddings != dataset.item_num:
        return
    names = [str(token) for token in tokens[dataset.iid_field]]
    order = sorted(range(1, len(names)), key=names.__getitem__)
    drawn = table.weight.data.clone()
    table.weight.data[order] = drawn[1:]
