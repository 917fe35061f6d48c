"""What happened when: which interactions the cloud was trained on, which came after, and which nobody has seen yet.

A user's last S interactions are shown one after the other at the end (S = 1 in static mode). The one before them is the validation
target; the three before that are real-time data; all earlier ones are historical, the last of them being the historical validation
target of those who have more than one. Everything else of LSC4Rec asks this file what it may look at.

Differs from the authors' code: there the cloud's validation target is a real-time interaction already, the device's "independent"
training sees real-time data, and Yelp is wired the other way round.
"""

from dataclasses import dataclass
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from torch import Tensor

from recbole_llm.sequences import Log, row_positions

REAL_TIME = 3
"""Interactions of a user between the historical ones and the validation target."""


@dataclass(frozen=True)
class Timeline:
    """Whose interactions are what, as flat positions of a log of all of them, users in the order of their tokens.

    Args:
        log: Every interaction of every user.
        steps: S, how many of a user's last interactions are shown at the end.
        users: Users who have enough interactions, as indices into `log.users` [U].
        left_out: How many users have fewer than S + 6.
        train: Historical targets that are trained on [H].
        history_valid: Historical targets that trainings on them stop by [V].
        valid: The validation target of each user [U].
        dataset: A split of the data set that the log is of.
        pointer: Flat position -> position in the data set's own log, -1 for a user's first item [N].
    """

    log: Log
    steps: int
    users: Tensor
    left_out: int
    train: Tensor
    history_valid: Tensor
    valid: Tensor
    dataset: Any
    pointer: Tensor

    @classmethod
    def of(cls, dataset: Any, steps: int = 1) -> "Timeline":
        """Cut every user's interactions.

        Args:
            dataset: Any split of a FlatSequentialDataset, whose log has all of them.
            steps: S.

        Raises:
            ValueError: The data set has no such log, or no user has enough interactions.
        """
        if getattr(dataset, "flat_log", None) is None:
            raise ValueError(
                f"dataset={dataset.dataset_name}: its rows were not made of one log of all interactions, so nobody can say what "
                "happened when; there is recbole_llm.create_dataset, on data that are not split by benchmark_filename."
            )
        flat = dataset.flat_log
        pointers = torch.arange(len(flat))
        pointers = pointers[flat.begin(pointers) < pointers]
        whole = dataset.with_rows(pointers)
        log = Log.from_dataset(whole)
        pointer = torch.full((len(log.items),), -1, dtype=torch.long)
        pointer[row_positions(whole)] = pointers
        count, there = (
            log.offsets.diff(),
            int((flat.offsets.diff() > 0).sum()),
        )  # who has one interaction is in no log of rows
        users = (count >= steps + 6).nonzero()[:, 0]
        if not len(users):
            raise ValueError(
                f"lsc_steps={steps}: no user has the {steps + 6} interactions it takes ({steps} to be shown, one to validate on, "
                f"{REAL_TIME} in real time, two historical ones); the longest has {int(count.max())}. Set lsc_steps, or use other data."
            )
        first, valid = log.offsets[users], log.offsets[users + 1] - 1 - steps
        last = valid - REAL_TIME - 1  # the last historical item
        validates = last - first > 1
        train = torch.cat(
            [torch.arange(a, b) for a, b in zip((first + 1).tolist(), (last + ~validates).tolist(), strict=True)]
        )
        return cls(
            log, steps, users, there - len(users), train, last[validates], valid, whole, pointer
        )  # fmt: skip

    @property
    def real_time(self) -> Tensor:
        """Targets of the real-time data [U, 3]."""
        return self.valid.unsqueeze(1) + torch.arange(-REAL_TIME, 0)

    @property
    def last_historical(self) -> Tensor:
        """The last three historical targets [U, 3], -1 for one that a user has not; the authors' code trains on these alone."""
        found = self.valid.unsqueeze(1) - REAL_TIME + torch.arange(-REAL_TIME, 0)
        return torch.where(found > self.log.offsets[self.users].unsqueeze(1), found, -1)

    @property
    def shown(self) -> Tensor:
        """Targets of the end [U, S]; no training, and no choice of a setting, knows them."""
        return self.valid.unsqueeze(1) + torch.arange(1, self.steps + 1)

    def view(self, target: Tensor, lag: int) -> Tensor:
        """What the cloud has seen of a user, `lag` interactions behind: the position whose history that is; at least one item."""
        first = self.log.offsets[self.log.user_index(target)] + 1
        return torch.maximum(target - lag, first)

    def seen(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """All items that users had met before some positions [B]: of each pair the number of its row [P], and the item [P]."""
        return self.dataset.seen_items(self.pointer[positions])

    def split(self, targets: Tensor) -> Any:
        """A split of the data set whose rows have these targets, in the order of the positions."""
        return self.dataset.with_rows(self.pointer[targets])

    def loader(self, config: Any, targets: Tensor, like: Any) -> FullSortEvalDataLoader:
        """A loader for full ranking of these targets.

        Args:
            config: Of the model that is to be evaluated.
            targets: Flat positions [R].
            like: A loader of RecBole's for evaluation, whose sampler it takes.
        """
        split = self.split(targets)
        wanted = config["MAX_ITEM_LIST_LENGTH"]
        split = split if split.flat_log.width == wanted else split.cut_to(wanted)
        return FullSortEvalDataLoader(config, split, like._sampler, shuffle=False)

    def places(self, log: Log) -> Tensor:
        """Flat positions here of the items of another log of the same users' earliest interactions [n]."""
        index = torch.full((int(self.log.users.max()) + 1,), -1, dtype=torch.long)
        index[self.log.users] = torch.arange(len(self.log.users))
        user = log.user_index(torch.arange(len(log.items)))
        return torch.arange(len(log.items)) - log.offsets[user] + self.log.offsets[index[log.users]][user]

    def of_pointers(self, pointers: Tensor) -> Tensor:
        """Flat positions of rows that are told by their place in the data set's own log [B]."""
        there = (self.pointer >= 0).nonzero()[:, 0]
        position = torch.empty(len(self.dataset.flat_log), dtype=torch.long)
        position[self.pointer[there]] = there
        return position[pointers]
