"""What is known of every test row before a model ranks it, and metrics by it: popularity, length of history, repeats, the teacher's
confidence; and how alike the lists of two models are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Facts:
    """What is known of the R test rows of a split.

    Args:
        user: Whose row it is, by token [R].
        popularity: How often its target is a target or a first item in the training rows [R].
        history: How many items the user had met before, those beyond `MAX_ITEM_LIST_LENGTH` too [R].
        repeat: Whether the target is one of them [R].
        seen: Each row's items met before, row by row, as row * n_items + item, ascending.
        n_items: Number of item ids.
    """

    user: np.ndarray
    popularity: np.ndarray
    history: np.ndarray
    repeat: np.ndarray
    seen: np.ndarray
    n_items: int

    def met(self, items: np.ndarray) -> np.ndarray:
        """Whether one item of every row is among those that its user had met before [R]. Args: items [R]."""
        return np.isin(np.arange(len(items)) * self.n_items + items, self.seen)

    @classmethod
    def of(cls, train: Any, test: Any) -> "Facts":
        """Read them off a split.

        Args:
            train: The training part, a `FlatSequentialDataset`.
            test: The test part.
        """
        from recbole_llm.sequences import Log

        tokens = np.asarray(test.field2id_token[test.uid_field]).astype(str)
        target = test.inter_feat[test.iid_field].long()
        number, item = test.seen_items(test.row_pointers)
        seen = item.long() == target[number]
        repeat = torch.zeros(len(target), dtype=torch.bool)
        repeat[number[seen]] = True
        counts = torch.bincount(Log.from_dataset(train).items, minlength=train.item_num)
        return cls(
            tokens[test.inter_feat[test.uid_field].long().numpy()],
            counts[target].numpy(),
            torch.bincount(number, minlength=len(target)).numpy(),
            repeat.numpy(),
            np.unique(number.numpy().astype(np.int64) * test.item_num + item.numpy()),
            test.item_num,
        )


def thirds(values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Groups of rows of about equal size by a value, the lowest first, rows of one value together; an empty one is left out.

    Returns:
        What the values of a group are, in words, and which rows it has [R].
    """
    bounds = np.quantile(values, [1 / 3, 2 / 3], method="lower")
    low, high = values <= bounds[0], values > bounds[1]
    groups = [low, ~low & ~high, high]
    return [(span(values[group]), group) for group in groups if group.any()]


def span(values: np.ndarray) -> str:
    """From where to where some values go, as a table says it."""
    form = "d" if np.issubdtype(values.dtype, np.integer) else ".2f"
    low, high = (format(value, form) for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def slices_of(facts: Facts, sure: Mapping[str, np.ndarray]) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Groups of test rows by each thing that is known of them.

    Args:
        facts: Of the rows.
        sure: Teacher -> how sure it is of the first of its list in every row [R]; teachers that were asked about a sample are left
            out by the caller.
    """
    groups = {
        "training interactions of the target": thirds(facts.popularity),
        "length of the history": thirds(facts.history),
        "the target is": [
            (name, rows)
            for name, rows in (("new", ~facts.repeat), ("a repeat", facts.repeat))
            if rows.any() and facts.repeat.any()
        ],
    }
    for teacher, values in sure.items():
        shares = np.exp(values)  # of the softmax
        groups[f"what {teacher} gives to its first item"] = thirds(shares)
    return {name: parts for name, parts in groups.items() if len(parts) > 1}


def overlap(first: Tensor, second: Tensor) -> float:
    """Mean share of items that two lists of a row have in common.

    Args:
        first: Items, best first, none twice [R, k].
        second: The other lists [R, k].
    """
    k = min(first.shape[1], second.shape[1])
    first, second = first[:, :k], second[:, :k]
    total = 0
    for part in range(0, len(first), 4096):
        total += int((first[part : part + 4096, :, None] == second[part : part + 4096, None]).sum())
    return total / (len(first) * k)
