"""Neighbours of the history's items: items that the same users met, wherever in their sequences.

score(i) = sum over the last n items j of the history of decay^age * sim(j, i); sim is the cosine of the two items' sets of users in the
training rows, with a shrinkage in the denominator, kept for each item's nearest neighbours. Items that are nobody's neighbour are ranked
by popularity.

RecBole's `ItemKNN` is a general recommender: it scores by all training items of a user id, under a loader of its own, and stays what it
is. This one scores the history that a row holds, which at test time is longer than what was trained on, and weighs it by age, so it
stands in the table of sequential models.
"""

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from recbole_llm.counting import CountingNeighbours, CountingTrainer
from recbole_llm.sequences import Log


class HistoryKNN(CountingNeighbours):
    """Item-to-item neighbours, summed over the history.

    Args:
        config: RecBole Config; keys `historyknn_*` and `counting_repeats`.
        dataset: RecBole's dataset, or a saved catalogue.
    """

    of_counts = ("historyknn_shrinkage", "historyknn_neighbours")
    last, decay = "historyknn_last", "historyknn_decay"

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.check_ranges(historyknn_shrinkage=(0.0,), historyknn_neighbours=(1,))
        self._together: tuple[Tensor, ...] | None = None

    def offered(self, config):
        """The settings `historyknn_*`."""
        return {
            "historyknn_shrinkage": config["historyknn_shrinkage"],
            "historyknn_neighbours": config["historyknn_neighbours"],
            "historyknn_last": config["historyknn_last"],
            "historyknn_decay": config["historyknn_decay"],
        }

    def meet(self, log, tokens, seed):
        """Take the training log."""
        super().meet(log, tokens, seed)
        self._together = None

    def counted(self, log, settings):
        """The table of neighbours."""
        if self._together is None:  # what all combinations share
            self._together = together(log)
        first, second, both, users = self._together
        similar = cosine(both, users[first], users[second], settings["historyknn_shrinkage"])
        place = self.place.cpu()[second]
        kept = nearest(first, place, similar, int(settings["historyknn_neighbours"]))
        return self.table(first[kept], place[kept], similar[kept])


def together(log: Log) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which items were met by the same users: pairs of different items, in both orders, and how many users met both, each [P]; and how
    many users met each item [n_items].
    """
    user = log.user_index(torch.arange(len(log.items)))
    met = torch.unique(user * log.n_items + log.items)
    user, item = (met // log.n_items).numpy(), (met % log.n_items).numpy()
    sets = csr_matrix((np.ones(len(met), np.int32), (user, item)), shape=(len(log.users), log.n_items))
    both = (sets.T @ sets).tocoo()
    apart = both.row != both.col
    pairs = (torch.from_numpy(each[apart].astype(np.int64)) for each in (both.row, both.col, both.data))
    return *pairs, torch.from_numpy(np.bincount(item, minlength=log.n_items))


def cosine(both: Tensor, first: Tensor, second: Tensor, shrinkage: float) -> Tensor:
    """Their common members over sqrt(first * second) + shrinkage, for pairs of sets. Args: common members; size of each [P]."""
    return both / ((first.double() * second).sqrt() + shrinkage)


def nearest(row: Tensor, place: Tensor, value: Tensor, count: int) -> Tensor:
    """Which entries are among the `count` largest of their row, of equals those of higher place [k].

    Args:
        row: [P].
        place: [P].
        value: [P]; equal if they are so as float32.
        count: Most of a row.
    """
    order = torch.argsort(place, descending=True)
    order = order[torch.sort(value[order].float(), stable=True, descending=True).indices]
    rows, by_row = torch.sort(row[order], stable=True)
    nth = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
    return order[by_row][nth < count]


class HistoryKNNTrainer(CountingTrainer):
    """See `CountingTrainer`."""
