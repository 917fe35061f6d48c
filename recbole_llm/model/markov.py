"""What followed the last items: a Markov chain with gaps and decay, counted on the training sequences.

score(i) = sum over the last n items j of the history of decay^age * T(j, i), T(j, i) = sum of 1 / gap over all times that i stood gap
items after j, divided by a power of the row's sum. Items that nothing leads to are ranked by popularity. RecBole's FPMC factorises such
transitions and trains; this one has nothing to train.
"""

import torch
from torch import Tensor

from recbole_llm.counting import CountingNeighbours, CountingTrainer
from recbole_llm.sequences import Log


class Markov(CountingNeighbours):
    """Transitions out of the last items, counted.

    Args:
        config: RecBole Config; keys `markov_*` and `counting_repeats`.
        dataset: RecBole's dataset, or a saved catalogue.
    """

    of_counts = ("markov_gap", "markov_power")
    last, decay = "markov_last", "markov_decay"

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.check_ranges(markov_gap=(1,), markov_power=(0.0, 1.0))

    def offered(self, config):
        """The settings `markov_*`."""
        return {
            "markov_gap": config["markov_gap"],
            "markov_power": config["markov_power"],
            "markov_last": config["markov_last"],
            "markov_decay": config["markov_decay"],
        }

    def counted(self, log, settings):
        """The table of transitions."""
        before, after, times = transitions(log, int(settings["markov_gap"]))
        out_of = torch.bincount(before, times, self.n_items) ** settings["markov_power"]
        return self.table(before, self.place.cpu()[after], times / out_of[before])


def transitions(log: Log, gap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of items of one user that stand at most `gap` apart: the earlier, the later and 1 / (how far apart), each [P].

    Args:
        log: The log.
        gap: Most steps from the one to the other.
    """
    user = log.user_index(torch.arange(len(log.items)))
    parts = []
    for step in range(1, gap + 1):
        same = user[:-step] == user[step:]
        before, after = log.items[:-step][same], log.items[step:][same]
        parts.append((before, after, torch.full((len(before),), 1 / step, dtype=torch.float64)))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


class MarkovTrainer(CountingTrainer):
    """See `CountingTrainer`."""
