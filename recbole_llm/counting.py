"""Baselines that count instead of train, as RecBole sequential models: what they share, and the trainer that tunes them.

What is counted are the training rows and nothing else. Every setting of counting is a list of choices (or one value); an epoch is one
combination of them, counted and evaluated on the validation rows as a trained model's epoch is, and RecBole's own loop keeps the best:
of equals the later one. Where there are many validation rows, combinations are compared on a seeded sample of them
(`counting_valid_rows`), and the score that is reported is that of the best on all. Without validation rows there is one epoch, the first
combination. Test rows are never looked at.

Most items share a score, most often none. A tie that followed internal ids would follow the order of the data's files, and those often
have targets in order; here popularity decides, and then a seeded order of the items' tokens.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor

from recbole_llm.config import check_range, check_topk, read_yaml
from recbole_llm.model import PROPERTIES
from recbole_llm.rows import chosen_rows, some_of
from recbole_llm.sequences import Log, latest, pack
from recbole_llm.trainer import SequenceTrainer

PAIRS_AT_ONCE = 1 << 22
"""Pairs of a history's item and a neighbour of it that exist at a time."""
BEHIND = 2.0
"""What is taken off the score of an item that shall stand behind all others."""


def grid(offered: Mapping[str, Any]) -> list[dict[str, float]]:
    """All combinations of settings, the last one named varying fastest. Args: each setting's choices, or its one value."""
    listed = [value if isinstance(value, list) else [value] for value in offered.values()]
    return [dict(zip(offered, values, strict=True)) for values in product(*listed)]


def combinations(config: Any) -> int:
    """How many combinations a counting model's Config offers, told without the model."""
    keys = read_yaml(PROPERTIES / "model" / f"{config['model']}.yaml")
    return prod(len(config[key]) for key in keys if isinstance(config[key], list))


def order_of_ties(popularity: Tensor, tokens: Sequence[str], seed: int) -> Tensor:
    """Place of each item among all, higher = sooner; by popularity, then in an order drawn from the seed and the tokens [n_items].

    Args:
        popularity: Number of interactions of each item [n_items].
        tokens: Names of the items; the first is the padding, which has place 0.
        seed: Of the order of items of equal popularity.
    """
    drawn = [hashlib.sha256(f"{seed}|{token}".encode()).digest() for token in tokens]
    times = popularity.tolist()
    order = sorted(range(1, len(tokens)), key=lambda item: (times[item], drawn[item]))
    place = torch.zeros(len(tokens), dtype=torch.long)
    place[torch.tensor(order, dtype=torch.long)] = torch.arange(1, len(tokens))
    return place


def sparse_rows(row: Tensor, column: Tensor, value: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of a matrix [n, n], those of one cell added up, as CSR: where rows begin [n + 1], columns [P] and values [P], ascending.

    Args:
        row: [E].
        column: [E].
        value: [E].
        n: Rows and columns.
    """
    cell, which = torch.unique(row * n + column, return_inverse=True)
    total = torch.zeros(len(cell), dtype=torch.float64, device=cell.device).index_add_(0, which, value.double())
    begin = torch.zeros(n + 1, dtype=torch.long, device=cell.device)
    begin[1:] = torch.bincount(cell // n, minlength=n).cumsum(0)
    return begin, cell % n, total


def combined(items: Tensor, weight: Tensor, begin: Tensor, column: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """Weighted sums of rows of a CSR matrix [n, n], one sum per history.

    Args:
        items: Rows of the matrix that each history takes [B, T].
        weight: Their weights [B, T].
        begin: Where rows begin [n + 1].
        column: [P].
        value: [P].

    Returns:
        The entries of the sums: history, column and value, each [E], ascending by history and column.
    """
    n = len(begin) - 1
    count = begin.diff()[items.flatten()]
    taken = torch.repeat_interleave(torch.arange(items.numel(), device=items.device), count)
    nth = torch.arange(len(taken), device=items.device) - (count.cumsum(0) - count)[taken]
    entry = begin[items.flatten()[taken]] + nth
    cell, which = torch.unique(taken // items.shape[1] * n + column[entry], return_inverse=True)
    total = torch.zeros(len(cell), dtype=torch.float64, device=items.device)
    total.index_add_(0, which, weight.flatten()[taken].double() * value[entry].double())
    return cell // n, cell % n, total


def without_ties(row: Tensor, value: Tensor) -> Tensor:
    """Positive numbers as float32 of which no two of a row are equal: of equals, each is the next float above the one before.

    Larger values are moved only where ties below have grown into them, and never past each other.

    Args:
        row: [E].
        value: [E], positive; of equals in a row, a later one shall be higher.

    Returns:
        [E], float32.
    """
    # the bits of positive floats, read as whole numbers, have the order of the floats, and the next float is one more
    key, order = torch.sort(row << 32 | value.float().view(torch.int32).long(), stable=True)
    step = torch.arange(len(key), device=key.device)
    bits = torch.cummax(key - step, 0).values + step if len(key) else key
    apart = torch.empty_like(bits, dtype=torch.int32)
    apart[order] = (bits & 0xFFFFFFFF).int()
    return apart.view(torch.float32)


class Counting(SequentialRecommender):
    """A recommender that is counted; a subclass says what, and how a history is scored by it.

    Every item has a score of its own in every row. Items that a count says nothing of have scores in [-1, 0), the popular ones first;
    with `counting_repeats: False` the items of the history stand behind all others. The state holds the counts and the combination of
    settings they were made by, so a saved model needs neither data nor a grid.

    Args:
        config: RecBole Config; the settings in `offered`.
        dataset: RecBole's dataset, or a saved catalogue.

    Raises:
        ValueError: A choice that is not possible.
    """

    input_type = InputType.POINTWISE
    of_counts: tuple[str, ...] = ()
    """Settings that change what is counted; the others change how it is read."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        check_topk(config, dataset.item_num)
        self.grid = grid(self.offered(config) | {"counting_repeats": config["counting_repeats"]})
        self.check()
        check_range(config, "counting_valid_rows", 0)
        self.log: Log | None = None
        self._counted: list[float] | None = None
        self.register_buffer("popularity", torch.zeros(self.n_items, dtype=torch.long))
        self.register_buffer("place", torch.arange(self.n_items))
        self.register_buffer("chosen", torch.zeros(len(self.grid[0]), dtype=torch.float64))
        self._choose(self.grid[0])

    def offered(self, config: Any) -> dict[str, Any]:
        """The choices of every setting; those of `of_counts` first, so that counts serve several combinations."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse choices that are not possible. Raises: ValueError."""
        if not self.grid:
            raise ValueError(
                f"model={type(self).__name__}: a setting has no choice. Set one value, or a list of values."
            )
        for combination in self.grid:
            if not isinstance(repeats := combination["counting_repeats"], bool):
                raise ValueError(
                    f"counting_repeats={repeats}: no such choice; there is True and False. Set counting_repeats."
                )

    def check_ranges(self, **ranges: tuple[float, ...]) -> None:
        """Refuse choices out of a range. Args: by setting, its least and, if there is one, its largest value. Raises: ValueError."""
        for combination in self.grid:
            for key, ends in ranges.items():
                check_range(combination, key, *ends)

    def counted(self, log: Log, settings: Mapping[str, float]) -> dict[str, Tensor]:
        """What is counted, as named buffers; `popularity` and `place` are there already."""
        raise NotImplementedError

    def scored(self, histories: Tensor) -> Tensor:
        """Scores [B, n_items] that the caller may change. Args: histories [B, L]."""
        raise NotImplementedError

    def meet(self, log: Log, tokens: Sequence[str], seed: int) -> None:
        """Take the training log. Args: the log; tokens of the items by internal id; seed of the order of ties."""
        self.log, self._counted = log, None
        popularity = torch.bincount(log.items, minlength=self.n_items)
        self.popularity = popularity.to(self.device)
        self.place = order_of_ties(popularity, tokens, seed).to(self.device)

    def count(self, combination: Mapping[str, float]) -> None:
        """Count the training log by one combination of settings; what was counted for the last one is kept if it is the same."""
        self._choose(combination)
        key = [combination[name] for name in self.of_counts]
        if self._counted != key:
            for name, tensor in self.counted(self.log, combination).items():
                setattr(self, name, tensor.to(self.device))
            self._counted = key

    def _choose(self, combination: Mapping[str, float]) -> None:
        self.chosen = torch.tensor(list(combination.values()), dtype=torch.float64).to(self.device)

    @property
    def settings(self) -> dict[str, float]:
        """The combination it was counted by."""
        return dict(zip(self.grid[0], self.chosen.tolist(), strict=True))

    def choices(self) -> dict[str, Any]:
        """What was chosen among the choices on validation rows, to be said beside results."""
        return {name: int(value) if value == int(value) else value for name, value in self.settings.items()}

    def unreached(self) -> Tensor:
        """Scores of items that a count says nothing of, by popularity, in [-1, 0) [n_items]."""
        return (self.place.double() / self.n_items - 1).float()

    def full_sort_predict(self, interaction):
        """Scores of every item [B, n_items], all different within a row."""
        histories = interaction[self.ITEM_SEQ]
        scores = self.scored(histories)
        if not self.settings["counting_repeats"]:
            # padding scatters into the padding item, which is no candidate
            scores.scatter_(1, histories, (self.unreached() - BEHIND)[histories])
        return scores

    def predict(self, interaction):
        """Score of each row's item [B]."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    def calculate_loss(self, interaction):
        """There is none."""
        raise NotImplementedError(
            f"model={type(self).__name__}: it counts and has no loss. Take the trainer that RecBole's get_trainer gives for it."
        )

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Like torch's, but a saved count may have another size than the one that is here."""
        for name, tensor in self.named_buffers():
            if name in state_dict and tensor.shape != state_dict[name].shape:
                setattr(self, name, torch.empty_like(state_dict[name], device=tensor.device))
        self._counted = None
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


class CountingNeighbours(Counting):
    """One that counts, for every item, a weight of some others, and sums these over a history, each item weighing less than the next.

    The table is a CSR matrix whose columns are places (see `order_of_ties`), so that entries of a row stand in the order of ties.
    """

    last: str
    """Setting: most last items of a history that are summed over."""
    decay: str
    """Setting: weight of an item as a share of that of the one after it; 0 looks at the last item alone."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.check_ranges(**{self.last: (1,), self.decay: (0.0, 1.0)})
        self.register_buffer("begin", torch.zeros(self.n_items + 1, dtype=torch.long))
        self.register_buffer("column", torch.zeros(0, dtype=torch.int32))
        self.register_buffer("value", torch.zeros(0))

    def table(self, row: Tensor, place: Tensor, value: Tensor) -> dict[str, Tensor]:
        """The buffers of a table. Args: items, places of their neighbours and weights [E]."""
        begin, column, value = sparse_rows(row, place, value, self.n_items)
        return {"begin": begin, "column": column.int(), "value": value.float()}

    def scored(self, histories):
        """Sums over the history where there are any, popularity where there are none."""
        settings = self.settings
        most = 1 if settings[self.decay] == 0 else int(settings[self.last])
        items, age = latest(histories, most)
        weight = settings[self.decay] ** (age - 1).clamp_min(0).double()
        scores = self.unreached().repeat(len(histories), 1)
        item_at = torch.empty_like(self.place)
        item_at[self.place] = torch.arange(self.n_items, device=self.place.device)
        pairs = self.begin.diff()[items].sum(dim=1).cpu()
        for rows in pack(torch.arange(len(items)), pairs, PAIRS_AT_ONCE):
            found, place, total = combined(items[rows], weight[rows], self.begin, self.column, self.value)
            scores[int(rows[0]) + found, item_at[place]] = without_ties(found, total)
        return scores


class CountingTrainer(SequenceTrainer):
    """Tries the combinations of a counting model's settings, an epoch each, and leaves it counted by the best.

    RecBole's loop, checkpoints and resume are used as they are; `epochs`, `stopping_step` and all that belongs to gradients mean nothing.

    Args:
        config: RecBole Config.
        model: A `Counting` model.
    """

    def __init__(self, config, model):
        super().__init__(config, model)
        self.best, self._epoch = 0, 0

    def _build_optimizer(self, **kwargs):
        # torch refuses an optimizer without parameters, but not one whose only group is empty
        return super()._build_optimizer(params=[{"params": []}], **kwargs)

    def fault_of_all(self) -> str | None:
        """It has no loss."""
        return f"{self.config['model']} counts and has no loss"

    def _log_or_fault(self):
        return None, f"{self.config['model']} counts them and trains nothing"

    def _prepare(self, train_data) -> None:
        super()._prepare(train_data)
        try:
            log = Log.from_dataset(self.dataset)
        except ValueError as error:
            if len(self.dataset) == 0:
                raise
            raise ValueError(
                f"model={self.config['model']}: counts sequences, and the training rows are not each user's earliest ones, so that their "
                "histories hold what validation and test ask for; there is leave-one-out, and any split in the order of time. Set "
                "eval_args."
            ) from error
        tokens = [str(token) for token in self.dataset.field2id_token[self.dataset.iid_field]]
        self.model.meet(log, tokens, self.config["seed"] or 0)

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """Count by every combination and validate it; by the first one alone without validation rows."""
        combinations = self.model.grid
        validates = bool(valid_data) and self.eval_step > 0
        self.epochs = len(combinations) if validates else 1
        self.eval_step, self.stopping_step = min(1, self.eval_step), len(combinations)
        if self._resumed is not None:
            self.best = self._resumed[1]["best"]
        some = self.some_of(valid_data) if validates else valid_data
        super().fit(train_data, some, verbose, saved, show_progress, callback_fn)
        self.model.count(combinations[self.best])
        if some is not valid_data:
            self.best_valid_score, self.best_valid_result = super()._valid_epoch(valid_data, show_progress)
            if saved:
                self._save_checkpoint(self.best, verbose=False)
        on = (
            f"best of {len(combinations)} on {len(some._dataset)} validation rows"
            if validates
            else "the first: no validation"
        )
        self.logger.info(f"{self.config['model']}: {said(combinations[self.best])} ({on}).")
        return self.best_valid_score, self.best_valid_result

    def some_of(self, valid_data: Any) -> Any:
        """The loader of `counting_valid_rows` validation rows; the same loader if there are no more, or it ranks sampled items only."""
        count = self.config["counting_valid_rows"]
        if not isinstance(valid_data, FullSortEvalDataLoader) or not 0 < count < len(valid_data._dataset):
            return valid_data
        return some_of(valid_data, chosen_rows(valid_data._dataset, count, self.config["seed"] or 0), self.config)

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        """Count by one combination; the loss is 0."""
        self._epoch = epoch_idx
        self.model.count(self.model.grid[epoch_idx])
        return 0.0

    def _valid_epoch(self, valid_data, show_progress=False):
        score, result = super()._valid_epoch(valid_data, show_progress)
        # as RecBole chooses the checkpoint it keeps
        if score >= self.best_valid_score if self.valid_metric_bigger else score <= self.best_valid_score:
            self.best = self._epoch
        return score, result

    def _generate_train_loss_output(self, epoch_idx, s_time, e_time, losses):
        return f"epoch {epoch_idx} counting [time: {e_time - s_time:.2f}s, {said(self.model.grid[epoch_idx])}]"

    def extra_meta(self) -> dict[str, Any]:
        """What was chosen, for readers; the model finds it in its state."""
        return {"choices": self.model.choices()}

    def resume_values(self) -> dict[str, Any]:
        """What an exact resume has to know besides."""
        return {"best": self.best}


def said(combination: Mapping[str, float]) -> str:
    """A combination of settings as text."""
    return ", ".join(f"{name}={value}" for name, value in combination.items())
