"""The most popular items, whatever the history: what a ranking is worth that knows nothing of the user.

RecBole's `Pop` is a general recommender on rows of user and item, under a loader and trainer of its own, and stays what it is. This one
ranks the same rows as sequential models do, from the training part of the same split, and so stands in the same table. Ties are broken
by the items' tokens.
"""

import torch
from torch import Tensor

from recbole_llm.counting import Counting, CountingTrainer, without_ties
from recbole_llm.sequences import Log


class Popularity(Counting):
    """Scores an item by the number of its training interactions, the same for every history.

    Args:
        config: RecBole Config; keys `popularity_last` and `counting_repeats`.
        dataset: RecBole's dataset, or a saved catalogue.
    """

    of_counts = ("popularity_last",)

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.check_ranges(popularity_last=(0,))
        self.register_buffer("times", torch.ones(self.n_items))

    def offered(self, config):
        """`popularity_last`."""
        return {"popularity_last": config["popularity_last"]}

    def counted(self, log, settings):
        """One more than the interactions of each item, made different by the order of ties."""
        times = interactions(log, int(settings["popularity_last"]))
        item_at = torch.argsort(self.place.cpu())
        apart = torch.empty(self.n_items)
        apart[item_at] = without_ties(torch.zeros_like(item_at), times[item_at] + 1)
        return {"times": apart}

    def scored(self, histories):
        """The same for every history."""
        return self.times.repeat(len(histories), 1)


def interactions(log: Log, last: int) -> Tensor:
    """How often each item stands in a log [n_items]. Args: the log; most last items of each user that are counted, 0 for all."""
    to_the_end = torch.repeat_interleave(log.offsets[1:], log.offsets.diff()) - torch.arange(len(log.items))
    counted = log.items[to_the_end <= last] if last else log.items
    return torch.bincount(counted, minlength=log.n_items)


class PopularityTrainer(CountingTrainer):
    """See `CountingTrainer`."""
