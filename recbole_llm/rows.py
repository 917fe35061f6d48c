"""Which rows a teacher is asked about that cannot be asked about all: training rows to label, and a sample of an evaluation's.

The policies of labelling are orders of the training rows, the most wanted first, as pure functions. A policy takes a log, the tokens of its
users in the log's order, and a seed, and returns all row numbers [M]. No policy reads a row's target: where a row is chosen because its
target surprises, the labels teach what is true of surprising targets only, and the share of rows on which the teacher is right is no longer
that of all rows. Rows of equal worth stand in a seeded order.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from torch import Tensor

from recbole_llm.folds import folds_of
from recbole_llm.sequences import Log
from recbole_llm.teacher import sample_of_rows

FOLDS = 10
"""Parts of the users, each of which is judged by counts of all others; more would change little and cost more."""


def at_random(log: Log, users: Sequence[str], seed: int) -> Tensor:
    """All rows in a seeded order [M]; see the module for the arguments."""
    return torch.randperm(len(log.rows()), generator=torch.Generator().manual_seed(seed + 1))


def recent(log: Log, users: Sequence[str], seed: int) -> Tensor:
    """The last row of every user before all last but one, and so on [M]: they are nearest to what is ranked at the end."""
    position = log.rows()
    to_the_end = log.offsets[log.user_index(position) + 1] - position
    return _by(to_the_end, at_random(log, users, seed))


def disagreement(log: Log, users: Sequence[str], seed: int) -> Tensor:
    """The rows first in which a cheap student and the popularity of items leave most doubt of what follows [M].

    The student counts what followed the last item of the history (a Markov chain): on sparse catalogues that ranks about as well as a
    trained SASRec, costs one sort, and has nothing to tune. It is asked about users whom it did not count (`FOLDS`), so neither a row's
    own target nor what its user did later has a part in it. `doubt` says how its list and that of the popular items become one number.
    """
    position = log.rows()
    last, target = log.items[position - 1], log.items[position]
    fold = folds_of(users, FOLDS, seed)[log.user_index(position)]
    found = torch.zeros(len(position), dtype=torch.float64)
    for number in range(FOLDS):
        own = fold == number
        found[own] = doubt(last[~own], target[~own], log.n_items)[last[own]]
    # rounded, so that what is equal but for the order of a sum is a tie
    return _by(-found.round(decimals=9), at_random(log, users, seed))


def doubt(before: Tensor, after: Tensor, n_items: int) -> Tensor:
    """How little is known of what follows each item: the entropy of counts and popularity as one distribution [n_items].

    p(j | i) = (n_ij + T_i q_j) / (n_i + T_i): n_ij times j followed i, n_i in all, T_i different items did, q_j is the share of j among
    all that followed anything (Witten and Bell's smoothing, which has no parameter). The entropy of such a mixture is the doubt within
    each of its two parts plus how far they disagree (their Jensen-Shannon divergence). After an item that nothing followed, p is q.

    Args:
        before: Items [P].
        after: What followed each of them [P].
        n_items: Number of item ids.
    """
    pair, times = torch.unique(before * n_items + after, return_counts=True)
    before, after = pair // n_items, pair % n_items
    different = torch.bincount(before, minlength=n_items).double()
    whole = torch.bincount(before, times.double(), n_items) + different
    popular = torch.bincount(after, times.double(), n_items) / max(1, int(times.sum()))
    share = torch.where(whole > 0, different / whole, 1.0)  # of popularity in the mixture
    # first as if nothing had been counted, then what was counted in its stead
    entropy = share * torch.special.entr(popular).sum() + torch.special.entr(share) * popular.sum()
    smoothed = share[before] * popular[after]
    gain = torch.special.entr(times / whole[before] + smoothed) - torch.special.entr(smoothed)
    return entropy + torch.bincount(before, gain, n_items)


POLICIES: dict[str, Callable[[Log, Sequence[str], int], Tensor]] = {
    "random": at_random,
    "recent": recent,
    "disagreement": disagreement,
}
"""What `teacher_rows_by` may be."""


def first(order: Tensor, count: int, late: Tensor) -> Tensor:
    """The first rows of an order, ascending; `late` ones only where there are no others.

    Args:
        order: Row numbers [M].
        count: How many are wanted.
        late: Rows that come last, bool [M] by row number.

    Returns:
        [count].
    """
    return _by(late, order)[:count].sort().values


def _by(worth: Tensor, ties: Tensor) -> Tensor:
    """Row numbers by ascending worth [M], those of equal worth in the order of `ties` [M]."""
    return ties[torch.sort(worth[ties], stable=True).indices]


def row_order(dataset: Any) -> Tensor:
    """Rows of an evaluation split in the order of their users' tokens, which no file order changes."""
    tokens = dataset.field2id_token[dataset.uid_field]
    users = dataset.inter_feat[dataset.uid_field].tolist()
    return torch.tensor(sorted(range(len(users)), key=lambda row: (str(tokens[users[row]]), row)))


def chosen_rows(dataset: Any, count: int, seed: int) -> Tensor:
    """Which rows of an evaluation split are looked at, ascending; all if `count` is 0 [count]."""
    order = row_order(dataset)
    return order[sample_of_rows(len(order), count, seed)].sort().values


def eval_rows(loader: Any, count: int, seed: int) -> Any:
    """A seeded sample of a loader's rows as one batch."""
    dataset = loader._dataset
    return dataset[chosen_rows(dataset, count, seed)]


def some_of(loader: Any, rows: Tensor, config: Any) -> Any:
    """A loader over some rows of another full-ranking loader, in the batches of `config`.

    Raises:
        ValueError: A part of the rows is asked for, and the loader ranks sampled items only.
    """
    if isinstance(loader, FullSortEvalDataLoader):
        dataset = loader._dataset.copy(loader._dataset.inter_feat[rows])
        return FullSortEvalDataLoader(config, dataset, loader._sampler, shuffle=False)
    if len(rows) < len(loader._dataset):
        raise ValueError(
            "teacher_eval_rows: a sample of rows needs full ranking. Set eval_args mode to full or teacher_eval_rows to 0."
        )
    return loader
