"""Batches as LSC4Rec's authors draw them: one of a user's few targets, and a history that begins at one of the first items.

Source: the authors' code (section 1.3 of the method's description there: targets i_{n-4} to i_{n-2} or i_{n-7} to i_{n-5}, a start s of 1,
2 or 3, a number of draws a user and epoch), as P5's loader does (arXiv 2203.13366). Our own choices, and the paper, know nothing of it.
"""

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.sequences import Fields, Log, WindowLoader, Windows, stretch

STARTS = 3
"""First items of a user at one of which a history begins."""


def drawn_windows(log: Log, targets: Tensor, users: Tensor, draws: int, generator: torch.Generator) -> Windows:
    """Windows of one target each, at their end [users * draws].

    Args:
        log: The log.
        targets: Flat positions, each user's together, users in the log's order [T].
        users: How many of them each user has [U].
        draws: How often each user is drawn.
        generator: Source of the draws.
    """
    first = (users.cumsum(0) - users).repeat(draws)
    count = users.repeat(draws)
    end = targets[first + (torch.rand(len(count), generator=generator) * count).long()]
    begin = log.offsets[log.user_index(end)]
    starts = (end - begin).clamp(max=STARTS)  # the target has at least one item before it
    start = begin + (torch.rand(len(end), generator=generator) * starts).long()
    return Windows(start, end, end)


class DrawnLoader(WindowLoader):
    """Batches of rows, each a history and its target, drawn anew for every epoch by the seed and the epoch's number.

    Args:
        log: The log.
        targets: Flat positions that may be drawn [T].
        fields: Column names of the batch.
        target_field: Column of the target.
        length: Columns of a history; its last items are kept.
        draws: Rows a user and epoch.
        rows_per_batch: Rows of a batch.
        seed: Seed of the draws and of the order.
        dataset: The RecBole dataset that the targets are of.

    A batch has, beside histories, their number and the user, the target `[B]` and `row_list [B]`, its flat position.
    """

    def __init__(
        self,
        log: Log,
        targets: Tensor,
        fields: Fields,
        target_field: str,
        length: int,
        draws: int,
        rows_per_batch: int,
        seed: int = 0,
        dataset=None,
    ):
        self.targets = targets.sort().values
        self.users = torch.unique_consecutive(log.user_index(self.targets), return_counts=True)[1]
        self.target_field, self.length, self.draws = target_field, length, draws
        none = self.targets[:0]
        super().__init__(log, Windows(none, none, none), fields, rows_per_batch, seed, True, dataset)

    def windows_of_epoch(self, generator: torch.Generator) -> Windows:
        """Windows of one target each."""
        return drawn_windows(self.log, self.targets, self.users, self.draws, generator)

    def batch(self, chosen: Tensor) -> Interaction:
        """The batch of some draws, given by their numbers `[B]`."""
        start, end = self.windows.start[chosen], self.windows.end[chosen]
        start = torch.maximum(start, end - self.length)
        return Interaction(
            {
                self.fields.user: self.log.users[self.log.user_index(end)],
                self.fields.items: stretch(self.log.items, start, end, self.length),
                self.fields.length: end - start,
                self.target_field: self.log.items[end],
                "row_list": end,
            }
        )
