"""The interaction log as flat arrays; prefix rows and training windows are views of it.

RecBole writes every prefix of every user as a padded row and runs the network once per target. A window is a stretch of
a user's sequence that the network reads once, with a loss at every position; which models may be trained that way,
`causality.py` finds out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

POOL = 16
"""Batches' worth of windows among which those of like length come together: less padding, and still a new mix every epoch."""

_MIX = 0x9E3779B97F4A7C15  # odd 64-bit constant: neighbouring (seed, epoch) pairs must not share an order


@dataclass(frozen=True)
class Log:
    """All users' items in time order, one after the other, users in the order of their tokens.

    Args:
        users: Internal user ids `[U]`, sorted by token, so that permuting the interaction file changes nothing.
        items: Internal item ids `[N]`, each user's in time order.
        offsets: Where each user's items begin and end `[U + 1]`.
        n_items: Number of internal item ids, padding included.
    """

    users: Tensor
    items: Tensor
    offsets: Tensor
    n_items: int

    @classmethod
    def from_dataset(cls, dataset) -> "Log":
        """Recover the log from a split of RecBole's SequentialDataset that holds each user's earliest prefix rows.

        A prefix longer than `MAX_ITEM_LIST_LENGTH` is cut in its row; its items are all there as targets of earlier
        rows.

        Args:
            dataset: The training split, as in `train_data._dataset`.

        Raises:
            ValueError: The rows are not what RecBole's own augmentation makes of a log (such as hand-made rows of
                `benchmark_filename`).
        """
        present, code, order = _by_user_token(dataset)
        rows = dataset.inter_feat
        target = rows[dataset.iid_field].long()[order]
        first = torch.ones(len(code), dtype=torch.bool)
        first[1:] = code[1:] != code[:-1]
        read = _read_by_list if getattr(dataset, "flat_log", None) is None else _read_by_pointer
        are_prefixes, first_item = read(dataset, order, first, target)
        if not are_prefixes:
            raise ValueError(
                f"dataset={dataset.dataset_name}: its training rows are not all the prefixes of each user's earliest "
                "items, so the sequences cannot be put together again; such rows can be trained on as they are. "
                "Set positions=last."
            )

        # a user's k-th row gives item k + 1; item 0 stands only in the first row's history
        position = torch.arange(len(code)) + code + 1
        items = torch.empty(len(code) + len(present), dtype=torch.long)
        items[position] = target
        items[position[first] - 1] = first_item.long()
        offsets = torch.zeros(len(present) + 1, dtype=torch.long)
        offsets[1:] = torch.cumsum(torch.bincount(code, minlength=len(present)) + 1, 0)
        return cls(present, items, offsets, dataset.item_num)

    def rows(self) -> Tensor:
        """Flat positions `[M]` of every target, ascending; a target is any item but its user's first."""
        is_target = torch.ones(len(self.items), dtype=torch.bool)
        is_target[self.offsets[:-1]] = False
        return is_target.nonzero()[:, 0]

    def user_index(self, position: Tensor) -> Tensor:
        """Which user (as an index into `users`) each flat position belongs to."""
        return torch.searchsorted(self.offsets, position, right=True) - 1

    def history(self, position: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """What a user had read before some flat positions.

        Args:
            position: Flat positions `[P]`.
            length: Most items to look back.

        Returns:
            Items `[P, length]`, oldest first, padded on the right with 0, and how many of them are real `[P]`.
        """
        start = torch.maximum(self.offsets[self.user_index(position)], position - length)
        return stretch(self.items, start, position, length), position - start


def _read_by_list(dataset, order: Tensor, first: Tensor, target: Tensor) -> tuple[bool, Tensor]:
    """Whether rows in `order` are all the prefixes of each user's earliest items, told from their histories.

    Args:
        dataset: The split.
        order: Its rows `[M]`, user by user.
        first: Which of them are a user's first `[M]`.
        target: Their targets `[M]`.

    Returns:
        The answer, and the first item of each user `[U]`.
    """
    rows = dataset.inter_feat
    length = rows[dataset.item_list_length_field].long()[order]
    history = rows[getattr(dataset, f"{dataset.iid_field}_list_field")]
    last_read = history[order, length - 1]
    grown = torch.clamp(length[:-1] + 1, max=history.shape[1])
    follows = (length[1:] == grown) & (last_read[1:] == target[:-1])
    are_prefixes = bool((length[first] == 1).all()) and bool((follows | first[1:]).all())
    return are_prefixes, history[order[first], 0]


def _read_by_pointer(dataset, order: Tensor, first: Tensor, target: Tensor) -> tuple[bool, Tensor]:
    """Like `_read_by_list`, but told from the pointers of a FlatSequentialDataset; no history is gathered."""
    log, pointer, begin = dataset.flat_log, dataset.row_pointers[order], dataset.row_begins[order]
    expected = torch.where(first, begin, pointer.roll(1)) + 1
    are_prefixes = torch.equal(pointer, expected) and torch.equal(log.item[pointer].long(), target)
    return are_prefixes, log.item[begin[first]]


def row_positions(dataset) -> Tensor:
    """Flat position in `Log.from_dataset(dataset)` of the target of each row `[M]`, in the data set's own order."""
    _, code, order = _by_user_token(dataset)
    positions = torch.empty_like(order)
    positions[order] = torch.arange(len(order)) + code + 1
    return positions


def _by_user_token(dataset) -> tuple[Tensor, Tensor, Tensor]:
    """A split's users `[U]` by token, and its rows in that order: each row's user as an index, and its number `[M]`."""
    user = dataset.inter_feat[dataset.uid_field].long()
    if len(user) == 0:
        raise ValueError(
            f"dataset={dataset.dataset_name}: the training split has no row, since no user has enough items; "
            "there must be one user with four or more under leave-one-out. Add data or change eval_args."
        )
    tokens = np.asarray(dataset.field2id_token[dataset.uid_field]).astype(str)
    present, code = torch.unique(user, return_inverse=True)
    by_token = torch.from_numpy(np.argsort(tokens[present.numpy()], kind="stable"))
    rank = torch.empty_like(by_token)
    rank[by_token] = torch.arange(len(by_token))
    code, order = torch.sort(rank[code], stable=True)
    return present[by_token], code, order


class Windows(NamedTuple):
    """Stretches of a log: inputs `items[start:end]`, targets `items[start + 1:end + 1]`, loss from position `first` on.

    Shapes: each `[W]`, flat positions of the log.
    """

    start: Tensor
    end: Tensor
    first: Tensor

    def targets(self) -> Tensor:
        """Number of targets with loss in each window `[W]`."""
        return self.end + 1 - self.first


def windows(log: Log, length: int, overlap: int) -> Windows:
    """Cut every user into windows such that each target of the log carries loss in exactly one of them.

    A user's later windows begin with `overlap` items that were targets of the window before and now are context only,
    so that every target sees at least its last `overlap + 1` items, if there are as many.

    Args:
        log: The log.
        length: Most input items of a window.
        overlap: Input items at the beginning of a later window that carry no loss; 0 <= overlap < length.

    Raises:
        ValueError: `overlap` does not fit into `length`.
    """
    if not 0 <= overlap < length:
        raise ValueError(
            f"window_overlap={overlap}: does not fit into windows of {length} items; "
            f"there is 0 to {length - 1}. Change it or MAX_ITEM_LIST_LENGTH in a config file or on the command line."
        )
    step = length - overlap
    beyond = (log.offsets.diff() - 1 - length).clamp(min=0)  # targets that the first window does not reach
    count = torch.where(log.offsets.diff() > 1, 1 + torch.div(beyond + step - 1, step, rounding_mode="floor"), 0)
    user = torch.repeat_interleave(torch.arange(len(log.users)), count)
    nth = torch.arange(len(user)) - (torch.cumsum(count, 0) - count)[user]
    start = log.offsets[user] + nth * step
    end = torch.minimum(start + length, log.offsets[user + 1] - 1)
    first = start + 1 + torch.where(nth > 0, overlap, 0)
    return Windows(start, end, first)


def fitting(overlap: int, length: int) -> int:
    """The overlap for windows of `length` items that was meant for longer ones: half of one where it would fill one."""
    return overlap if overlap < length else length // 2


class Fields(NamedTuple):
    """Names of the columns that a model reads from a batch."""

    items: str
    length: str
    user: str

    @classmethod
    def of(cls, model) -> "Fields":
        """The names a RecBole sequential model was built with."""
        return cls(model.ITEM_SEQ, model.ITEM_SEQ_LEN, model.USER_ID)


class WindowLoader:
    """Batches of windows in the form that RecBole's `Trainer._train_epoch` iterates.

    A batch is an Interaction of B windows, l being the longest of them: items `[B, l]` padded with 0, their number
    `[B]`, the user `[B]`, `target_list [B, l]` (0 = no loss at this position) and `row_list [B, l]`, the flat position
    of each target with loss, else -1.

    The order of an epoch is a function of the seed and the epoch's number alone; the number goes up when an epoch has
    been iterated to its end. Windows are shuffled, then sorted by length within pools, cut into batches, and the batches shuffled.

    Args:
        log: The log.
        windows: Its windows.
        fields: Column names of the batch.
        targets_per_batch: Most targets with loss in a batch; a window that has more is a batch of its own.
        seed: Seed of the order.
        shuffle: Whether the order changes from epoch to epoch; otherwise the log's order.
        dataset: The RecBole dataset that the log came from, for those who ask the loader for it.
    """

    def __init__(
        self,
        log: Log,
        windows: Windows,
        fields: Fields,
        targets_per_batch: int,
        seed: int = 0,
        shuffle: bool = True,
        dataset=None,
    ):
        self.log, self.windows, self.fields = log, windows, fields
        self.targets_per_batch = targets_per_batch
        self.seed, self.shuffle = seed, shuffle
        self.dataset = self._dataset = dataset
        self.epoch = 0
        self._plan: tuple[int, list[Tensor]] | None = None

    def __len__(self) -> int:
        """Number of batches of the epoch that comes next, or is under way."""
        return len(self.plan())

    def __iter__(self) -> Iterator[Interaction]:
        for chosen in self.plan():
            yield self.batch(chosen)
        self.epoch += 1

    def plan(self) -> list[Tensor]:
        """Window numbers of each batch of the current epoch."""
        if self._plan is None or self._plan[0] != self.epoch:
            generator = torch.Generator().manual_seed((self.seed * _MIX + self.epoch) % 2**63)
            self.windows = self.windows_of_epoch(generator)
            order, targets = torch.arange(len(self.windows.start)), self.windows.targets()
            if self.shuffle:
                order = torch.randperm(len(order), generator=generator)
                pool = max(1, POOL * self.targets_per_batch * len(order) // max(1, int(targets.sum())))
                order = pooled(order, self.windows.end - self.windows.start, pool)
            runs = pack(order, targets, self.targets_per_batch)
            if self.shuffle:
                runs = [runs[run] for run in torch.randperm(len(runs), generator=generator).tolist()]
            self._plan = self.epoch, runs
        return self._plan[1]

    def windows_of_epoch(self, generator: torch.Generator) -> Windows:
        """The windows of the epoch that comes next: always the same. Args: generator, the epoch's own."""
        return self.windows

    def batch(self, chosen: Tensor) -> Interaction:
        """The batch of some windows, given by their numbers `[B]`."""
        start, end, first = (column[chosen] for column in self.windows)
        longest = int((end - start).max())
        row = start[:, None] + 1 + torch.arange(longest)
        row = torch.where((row >= first[:, None]) & (row <= end[:, None]), row, -1)
        user = self.log.users[self.log.user_index(start)]
        return Interaction(
            {
                self.fields.user: user,
                self.fields.items: stretch(self.log.items, start, end, longest),
                self.fields.length: end - start,
                "target_list": torch.where(row >= 0, self.log.items[row], 0),
                "row_list": row,
            }
        )

    def state(self) -> dict[str, int]:
        """What `set_state` needs to go on exactly here, between two epochs."""
        return {"epoch": self.epoch, "seed": self.seed}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken."""
        self.epoch, self.seed = state["epoch"], state["seed"]
        self._plan = None


def pooled(order: Tensor, length: Tensor, pool: int) -> Tensor:
    """Sort every `pool` elements of an order by length; elements of one length keep their order.

    Args:
        order: Element numbers `[W]`.
        length: Length of each element `[W]`, by its number.
        pool: Elements that are sorted among themselves.
    """
    by_length = torch.sort(length[order], stable=True).indices
    return order[by_length[torch.sort(by_length // pool, stable=True).indices]]


def pack(order: Tensor, weight: Tensor, limit: int) -> list[Tensor]:
    """Cut `order` into runs whose weights add up to at most `limit`, or that are a single element.

    Args:
        order: Element numbers `[W]`.
        weight: Weight of each element `[W]`, by its number.
        limit: Largest sum of a run.
    """
    total = torch.cumsum(weight[order], 0).numpy()
    runs, begin = [], 0
    while begin < len(order):
        before = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, before + limit, side="right")))
        runs.append(order[begin:end])
        begin = end
    return runs


def stretch(items: Tensor, start: Tensor, end: Tensor, width: int) -> Tensor:
    """`items[start:end]` of each pair as a row `[len(start), width]`, padded on the right with 0."""
    position = start[:, None] + torch.arange(width)
    return torch.where(position < end[:, None], items[position.clamp(max=len(items) - 1)], 0)


def latest(histories: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The last items of histories that are padded on the right with 0.

    Args:
        histories: [B, L].
        most: Most items to keep.

    Returns:
        Items [B, T], oldest first, padded on the right, T being the longest; and each one's place counted from the newest, which is 1;
        padding has 0.
    """
    there = (histories > 0).sum(dim=1, keepdim=True)
    kept = there.clamp(max=most)
    column = torch.arange(int(kept.max()), device=histories.device)
    place = (kept - column).clamp_min(0)
    items = histories.gather(1, (there - kept + column).clamp(max=histories.shape[1] - 1))
    return items * (place > 0), place
