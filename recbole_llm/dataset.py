"""RecBole's SequentialDataset at the memory of the raw log: a row is a pointer, its padded lists are gathered when read.

RecBole writes every prefix of every user as a padded row, and builds these rows and their splits in Python loops. Here
the sorted log stands once, `FlatLog`; the rows of a split, `Rows`, hold their 1-D columns and the position of each
target in the log; a padded list, `ListColumn`, is a tensor without storage that knows how to gather itself. Rows,
splits and batches are RecBole's, value for value.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from recbole.data import create_dataset as recbole_create_dataset
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from torch import Tensor
from torch.utils import _pytree as pytree

from recbole_llm.compat import parse_in_c
from recbole_llm.hooks import sequential_dataset

_aten = torch.ops.aten


def create_dataset(config: Any) -> Any:
    """RecBole's `create_dataset`, which takes `FlatSequentialDataset` where it would take its own SequentialDataset.

    Models that bring a Dataset class of their own (DIEN, GRU4RecKG, KSR) and models of other types get what RecBole
    gives them.

    Args:
        config: A RecBole Config.
    """
    with sequential_dataset(FlatSequentialDataset):
        return recbole_create_dataset(config)


class FlatLog:
    """Every interaction of every user, users in the order of their internal ids, each user's in time order.

    Args:
        columns: The interaction fields, each `[N]` or `[N, ...]`, in that order.
        user_field: Name of the user column.
        item_field: Name of the item column.
        n_users: Number of internal user ids, padding included.
        width: Most items of a row's history, L.
    """

    def __init__(self, columns: Mapping[str, Tensor], user_field: str, item_field: str, n_users: int, width: int):
        # one more interaction, of zeros: what a padded place of a list reads
        self._padded = {
            name: torch.cat([values, values.new_zeros(1, *values.shape[1:])]) for name, values in columns.items()
        }
        self.user_field, self.item_field, self.width = user_field, item_field, width
        self.offsets = torch.zeros(n_users + 1, dtype=torch.long)
        self.offsets[1:] = torch.bincount(columns[user_field], minlength=n_users).cumsum(0)

    def __len__(self) -> int:
        return len(self.user)

    def __deepcopy__(self, memo: dict) -> "FlatLog":
        return self  # never written to, so that copies of rows may share it

    @property
    def fields(self) -> list[str]:
        """Names of its columns."""
        return list(self._padded)

    def cut_to(self, width: int) -> "FlatLog":
        """The same log, whose rows read at most `width` items."""
        other = copy.copy(self)
        other.width = width
        return other

    def column(self, field: str) -> Tensor:
        """A field of all interactions `[N, ...]`."""
        return self._padded[field][:-1]

    @property
    def user(self) -> Tensor:
        """Internal user ids `[N]`, ascending; user u's interactions are `offsets[u]` to `offsets[u + 1]`."""
        return self.column(self.user_field)

    @property
    def item(self) -> Tensor:
        """Internal item ids `[N]`."""
        return self.column(self.item_field)

    def begin(self, position: Tensor) -> Tensor:
        """Position at which the user of each position begins, of the same shape."""
        return self.offsets[self.user[position]]

    def length(self, position: Tensor) -> Tensor:
        """How many items the row has whose target is at each position: those before it, but at most L."""
        return (position - self.begin(position)).clamp(max=self.width)

    def history(self, position: Tensor) -> Tensor:
        """Positions that the rows with these targets read, oldest first, padded on the right with N.

        Args:
            position: `[B]`.

        Returns:
            `[B, L]`.
        """
        length, column = self.length(position)[:, None], torch.arange(self.width)
        return (position[:, None] - length + column).masked_fill_(column >= length, len(self))

    def gather(self, field: str, history: Tensor) -> Tensor:
        """A field at the positions that `history` gave, 0 at padded ones `[B, L, ...]`."""
        values = self._padded[field]
        return values.index_select(0, history.flatten()).view(*history.shape, *values.shape[1:])

    def before(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """All items of a user before some positions, however long ago.

        Args:
            position: `[B]`.

        Returns:
            For each of P pairs, the number of its position within `position` `[P]`, and the item `[P]`; oldest first.
        """
        begin = self.begin(position)
        count = position - begin
        number = torch.repeat_interleave(torch.arange(len(position)), count)
        nth = torch.arange(len(number)) - (count.cumsum(0) - count)[number]
        return number, self.item[begin[number] + nth]


class ListColumn(Tensor):
    """A padded list column `[M, L, ...]` without storage, gathered from the log where it is read.

    An integer or an index of rows gives these rows, dense; a slice of rows gives a column of the same kind; any other
    operation sees the whole column, dense. It cannot be written to.

    Args:
        log: The log.
        field: The field whose lists these are.
        pointer: Position of each row's target in the log `[M]`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, log: FlatLog, field: str, pointer: Tensor):
        """Tell torch shape, dtype and device; there is no storage."""
        values = log.column(field)
        shape = (len(pointer), log.width, *values.shape[1:])
        column = Tensor._make_wrapper_subclass(cls, shape, dtype=values.dtype, device=values.device)
        column.log, column.field, column.pointer = log, field, pointer
        return column

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        written = [given for given in (*args[:1], kwargs.get("out")) if isinstance(given, cls)]
        if written and operation._schema.is_mutable:
            written[0]._refuse()
        column, *rest = args if args and isinstance(args[0], cls) else (None,)
        if operation is _aten.detach.default and column is not None:
            return cls(column.log, column.field, column.pointer)
        if operation is _aten.slice.Tensor and column is not None and (rest[0] if rest else 0) == 0:
            return cls(column.log, column.field, operation(column.pointer, *rest))
        if operation is _aten.select.int and column is not None and rest[0] == 0:
            return column.dense(operation(column.pointer, *rest)[None])[0]
        if operation is _aten.index.Tensor and column is not None and chooses_rows(rest[0]):
            chosen = column.pointer[rest[0][0]]
            return column.dense(chosen.flatten()).view(*chosen.shape, *column.shape[1:])
        args, kwargs = pytree.tree_map_only(cls, cls.dense, (args, kwargs))
        return operation(*args, **kwargs)

    def dense(self, pointer: Tensor | None = None) -> Tensor:
        """The rows with these targets, or all rows, as a plain tensor `[B, L, ...]`."""
        return self.log.gather(self.field, self.log.history(self.pointer if pointer is None else pointer))

    def _refuse(self) -> None:
        raise TypeError(
            f"{self.field}: its list column is read from the log and cannot be written to; "
            "put a tensor of your own in its place, as in inter_feat[name] = inter_feat[name].dense()."
        )

    def __setitem__(self, index, value):
        self._refuse()

    def __deepcopy__(self, memo: dict) -> "ListColumn":
        return type(self)(self.log, self.field, self.pointer)

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"ListColumn({self.field}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """All rows as an array."""
        return self.dense().numpy(force=force)

    def tolist(self) -> list:
        """All rows as nested lists."""
        return self.dense().tolist()


class Rows(Interaction):
    """The rows of a split: an Interaction whose list columns are `ListColumn`s; parts of it are of the same kind.

    Args:
        log: The log.
        pointer: Position of each row's target in the log `[M]`.
        columns: All columns; `ListColumn`s among them are pointed anew when rows are chosen or moved.
    """

    def __init__(self, log: FlatLog, pointer: Tensor, columns: Mapping[str, Tensor]):
        self.log, self.pointer, self.length = log, pointer, len(pointer)
        self.interaction = dict(columns)

    def __getitem__(self, index):
        if isinstance(index, str):
            return super().__getitem__(index)
        index = as_index(index)
        if isinstance(index, int):
            return Interaction({name: values[index] for name, values in self.interaction.items()})
        pointer, columns = self._chosen(index)
        return Rows(self.log, pointer, columns)

    def _reindex(self, index):
        self.pointer, self.interaction = self._chosen(as_index(index))

    def _chosen(self, index: slice | Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        pointer = self.pointer[index]
        return pointer, {
            name: ListColumn(self.log, values.field, pointer) if isinstance(values, ListColumn) else values[index]
            for name, values in self.interaction.items()
        }

    def dense(self) -> Interaction:
        """The same rows as RecBole has them: all columns as plain tensors, in the same order."""
        history = self.log.history(self.pointer)
        return Interaction(
            {
                name: self.log.gather(values.field, history) if isinstance(values, ListColumn) else values
                for name, values in self.interaction.items()
            }
        )


def chooses_rows(indices: list[Tensor | None]) -> bool:
    """Whether an index as torch hands it on is one of rows alone: a mask of several dimensions chooses elements."""
    return len(indices) == 1 and (indices[0].dtype != torch.bool or indices[0].dim() == 1)


def as_index(index: Any) -> int | slice | Tensor:
    """An index of rows in a form that torch takes fast: a long list of Python integers is slow on every column anew."""
    if isinstance(index, list | tuple | range | np.ndarray):
        index = np.asarray(index)
        index = torch.from_numpy(index if index.dtype == bool else index.astype(np.int64, copy=False))
    is_number = isinstance(index, np.integer) or (isinstance(index, Tensor) and index.dim() == 0)
    return int(index) if is_number else index


class FlatSequentialDataset(SequentialDataset):
    """RecBole's SequentialDataset with the same rows, splits and batches, at the memory of the raw log.

    Rows that come from files (`benchmark_filename`) stay as RecBole has them.

    Attributes:
        pointer_column: If it is a name, every batch (`dataset[index]`) of this split has a column `[B]` of that name with
            the rows' `row_pointers`; None, the default, leaves batches as RecBole's.
    """

    pointer_column: str | None = None

    @property
    def flat_log(self) -> FlatLog | None:
        """The log that the rows point into; None before they are made, and for rows that came from files."""
        return self.inter_feat.log if isinstance(self.inter_feat, Rows) else None

    @property
    def row_pointers(self) -> Tensor:
        """Position of each row's target in `flat_log` `[M]`, in the order of this split's rows; without a log, their numbers."""
        return self.inter_feat.pointer if self.flat_log is not None else torch.arange(len(self))

    @property
    def row_begins(self) -> Tensor:
        """Position in `flat_log`, which must be there, at which the user of each row begins `[M]`."""
        return self.flat_log.begin(self.inter_feat.pointer)

    def seen_items(self, pointers: Tensor) -> tuple[Tensor, Tensor]:
        """All items that users had met before the targets of some rows; of rows from files, what their history shows.

        Args:
            pointers: Which rows: `row_pointers` of this data set or a part of it, or a batch's `pointer_column` `[B]`.

        Returns:
            For each of P pairs, the number of its row within `pointers` `[P]`, and an item `[P]`; row by row, oldest first.
        """
        pointers = pointers.cpu()
        if self.flat_log is not None:
            return self.flat_log.before(pointers)
        history = self.inter_feat[getattr(self, f"{self.iid_field}_list_field")][pointers]
        length = self.inter_feat[self.item_list_length_field][pointers]
        number, place = (torch.arange(history.shape[1]) < length[:, None]).nonzero(as_tuple=True)
        return number, history[number, place]

    def cut_to(self, width: int) -> "FlatSequentialDataset":
        """The same rows with histories of at most `width` items, shorter or longer than here; there must be a log."""
        rows, log = self.inter_feat, self.flat_log.cut_to(width)
        columns = {
            field: ListColumn(log, values.field, rows.pointer) if isinstance(values, ListColumn) else values
            for field, values in rows.interaction.items()
        }
        columns[self.item_list_length_field] = log.length(rows.pointer)
        return self.copy(Rows(log, rows.pointer, columns))

    def _load_feat(self, filepath, source):
        with parse_in_c():
            return super()._load_feat(filepath, source)

    def data_augmentation(self):
        """Sort the log and point at every interaction but each user's first, instead of writing all histories out."""
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        columns, width = self.inter_feat.interaction, self.config["MAX_ITEM_LIST_LENGTH"]
        log = FlatLog(columns, self.uid_field, self.iid_field, self.user_num, width)
        is_target = torch.ones(len(log), dtype=torch.bool)
        is_target[log.offsets[:-1][log.offsets.diff() > 0]] = False
        lists = {field: getattr(self, f"{field}_list_field") for field in columns if field != self.uid_field}
        self.inter_feat = self._rows_of(log, is_target.nonzero()[:, 0], columns, lists)

    def _rows_of(self, log: FlatLog, pointer: Tensor, fields: Iterable[str], lists: Mapping[str, str]) -> Rows:
        """The rows with these targets. Args: log; pointer [M]; fields of the target; fields of the history -> their columns."""
        rows = {field: log.column(field)[pointer] for field in fields}
        rows[self.item_list_length_field] = log.length(pointer)
        rows |= {column: ListColumn(log, field, pointer) for field, column in lists.items()}
        return Rows(log, pointer, rows)

    def with_rows(self, pointer: Tensor) -> "FlatSequentialDataset":
        """A split whose rows are those with these targets, with the columns of this one; there must be a log.

        Args:
            pointer: Positions of the targets in `flat_log` [M].
        """
        columns, log = self.inter_feat.interaction, self.flat_log
        lists = {values.field: name for name, values in columns.items() if isinstance(values, ListColumn)}
        fields = [name for name in columns if name in log.fields and name not in lists.values()]
        return self.copy(self._rows_of(log, pointer, fields, lists))

    def __getitem__(self, index, join=True):
        batch = super().__getitem__(index, join=False)
        pointer = self.row_pointers[as_index(index)] if self.pointer_column else None
        if isinstance(batch, Rows):
            batch = batch.dense()
        if pointer is not None:
            batch[self.pointer_column] = pointer
        return self.join(batch) if join else batch

    def _grouped_index(self, group_by_list):
        order, sizes = grouped(np.asarray(group_by_list))
        return np.split(order, np.cumsum(sizes)[:-1]) if len(order) else []

    def _split_index_by_leave_one_out(self, grouped_index, leave_one_num):
        return leave_out(grouped_index, leave_one_num)


def share_of_ties(log: Any, user_field: str, time_field: str) -> float:
    """Share of the interactions whose time another one of the same user has, too, so that the file decides their order.

    Counted on what RecBole sorts by: it keeps floats in single precision, where unix seconds move in steps of 64 or 128.

    Args:
        log: The interactions as a pandas DataFrame, before RecBole makes tensors of it.
        user_field: Name of the user column.
        time_field: Name of the time column.

    Returns:
        0 to 1; nan for a log without times, as rows from files may be.
    """
    if time_field not in log:
        return float("nan")
    times = log[time_field]
    times = times.astype(np.float32) if times.dtype.kind == "f" else times
    return float(log[[user_field]].assign(time=times).duplicated(keep=False).mean())


def grouped(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of equal keys, groups in the order of their first key.

    Args:
        keys: Small non-negative integers `[N]`.

    Returns:
        The places, group by group, ascending in each `[N]`, and the size of each group `[G]`.
    """
    first = np.full(int(keys.max(initial=-1)) + 1, len(keys))
    np.minimum.at(first, keys, np.arange(len(keys)))
    order = stable_order(first[keys])
    sizes = np.bincount(keys)[keys[np.sort(first[first < len(keys)])]]
    return order, sizes


def stable_order(keys: np.ndarray) -> np.ndarray:
    """`argsort(keys, kind="stable")` of integers in [0, 2^32) `[N]`; numpy sorts 16 bits at a time many times faster."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    high = (keys >> 16).astype(np.uint16)
    return order[np.argsort(high[order], kind="stable")] if high.any() else order


def leave_out(groups: list[np.ndarray], count: int) -> list[np.ndarray]:
    """Split every group's last `count` members off, one to each of the later parts; at least one stays in the first part.

    A group of `count` members or fewer gives to the last parts only.

    Args:
        groups: Arrays of members, none empty.
        count: Number of later parts.

    Returns:
        `count + 1` arrays of members, each in the order of the groups.
    """
    sizes = np.fromiter(map(len, groups), np.int64, len(groups))
    members = np.concatenate([np.empty(0, np.int64), *groups])
    from_end = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(members))  # 1 is a group's last member
    part = np.where(from_end <= np.minimum(count, np.repeat(sizes, sizes) - 1), count + 1 - from_end, 0)
    return [members[part == each] for each in range(count + 1)]
