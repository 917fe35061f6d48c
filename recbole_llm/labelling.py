"""How a teacher labels training rows: whole windows at once where it may, otherwise row by row; shard after shard.

A causal teacher whose scores are its states times its item table says at every position of a window what it would say after that
prefix, so one pass over the log labels all rows. Scores are log-probabilities over the catalogue, except for teachers that say
something else (BIGRec: minus a distance).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.artifacts import DamagedArtifact, digest, read_metadata, read_tensors, tensors_digest
from recbole_llm.causality import fault_of_scores, is_causal, states
from recbole_llm.losses import rows_at_a_time
from recbole_llm.sequences import Fields, Log, WindowLoader, Windows, fitting, pack, windows
from recbole_llm.teacher import Teacher, log_probability, rank

LEAST_ROWS_OF_A_SHARD = 1 << 10
"""Of a shard that is labelled by windows, or by RecBole's own models row by row: these take less than a second."""
MOST_ROWS_OF_A_SHARD = 1 << 14
"""Of a shard that is labelled by windows."""
TARGETS_AT_ONCE = 1 << 12


@dataclass
class Labeller:
    """A teacher at work on some rows of a log, cut into shards that are a function of rows and settings alone.

    Args:
        teacher: A trained sequential recommender.
        log: The training log.
        rows: Row numbers to label, ascending [M].
        k: Candidates per row.
        shard_rows: Rows of a shard, where an LLM labels them one by one.
        overlap: Items of context of further windows, as in the teacher's training; None reads every history on its own, so that each
            row is labelled on as many items as the teacher can read.
        numbers: Internal item id -> its number by the order of tokens, so that the shards do not depend on the order of a file
            [n_items]; None takes the ids.
    """

    teacher: Any
    log: Log
    rows: Tensor
    k: int
    shard_rows: int
    overlap: int | None
    numbers: Tensor | None = None

    def __post_init__(self):
        self.windows: Windows | None = None
        if self.overlap is not None and reads_windows(self.teacher):
            length = self.teacher.max_seq_length
            self.windows = windows(self.log, length, fitting(self.overlap, length))
        self._wanted = torch.zeros(len(self.log.items), dtype=torch.bool)
        self._wanted[self.log.rows()[self.rows]] = True

    def shards(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What each shard is made of (windows, or rows), and its rows in their order."""
        if self.windows is None:
            size = self.shard_rows if isinstance(self.teacher, Teacher) else max(self.shard_rows, LEAST_ROWS_OF_A_SHARD)
            for rows in self._rows_by_work().split(max(1, size)):
                yield rows, rows
            return
        before = torch.cat([torch.zeros(1, dtype=torch.long), self._wanted.cumsum(0)])
        count = before[self.windows.end + 1] - before[self.windows.first]
        used = count.nonzero()[:, 0]
        order = used[torch.sort((self.windows.end - self.windows.start)[used], stable=True).indices]
        one_percent = min(MOST_ROWS_OF_A_SHARD, len(self.rows) // 100)
        for chosen in pack(order, count, max(self.shard_rows, LEAST_ROWS_OF_A_SHARD, one_percent)):
            positions = [
                torch.arange(first, end + 1)
                for first, end in zip(
                    self.windows.first[chosen].tolist(), self.windows.end[chosen].tolist(), strict=True
                )
            ]
            position = torch.cat(positions)
            yield chosen, torch.searchsorted(self.log.rows(), position[self._wanted[position]])

    def _rows_by_work(self) -> Tensor:
        """Rows such that those of about equal work come together, and equal histories, which are asked once; then by number."""
        if not isinstance(self.teacher, Teacher):
            return self.rows
        seen, _ = self.log.history(self.log.rows()[self.rows], self.teacher.history_length)
        items = seen if self.numbers is None else self.numbers[seen]
        keys = [*items.T.flip(0), self.teacher.work(seen)]  # the last one comes first
        return self.rows[torch.from_numpy(np.lexsort([key.numpy() for key in keys]))]

    @torch.no_grad()
    def label(self, chosen: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """Columns of one shard: `row [m]`, `items [m, K]` by internal id, `score [m, K]`, `target_score [m]`."""
        if self.windows is None:
            items, score, target_score = rank(self.teacher, self._batch(rows), self.k)
        else:
            items, score, target_score = self._label_windows(chosen)
        parts = {"items": items.cpu(), "score": score.float().cpu(), "target_score": target_score.float().cpu()}
        return {"row": rows.clone(), **parts}

    def _batch(self, rows: Tensor) -> Interaction:
        teacher, log = self.teacher, self.log
        position = log.rows()[rows]
        length = teacher.history_length if isinstance(teacher, Teacher) else teacher.max_seq_length
        seen, lengths = log.history(position, length)
        columns = {
            teacher.USER_ID: log.users[log.user_index(position)],
            teacher.ITEM_SEQ: seen,
            teacher.ITEM_SEQ_LEN: lengths,
            teacher.ITEM_ID: log.items[position],
        }
        return Interaction(columns).to(teacher.device)

    def _label_windows(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        teacher = self.teacher.eval()
        cut = Windows(*(column[chosen] for column in self.windows))
        loader = WindowLoader(self.log, cut, Fields.of(teacher), TARGETS_AT_ONCE, shuffle=False)
        table = teacher.item_embedding.weight
        at_once = rows_at_a_time(0, len(table), table.device)
        found = []
        for batch in loader:
            wanted = (batch["row_list"] >= 0) & self._wanted[batch["row_list"].clamp_min(0)]
            batch = batch.to(teacher.device)
            hidden = states(teacher, batch)[wanted.to(teacher.device)]
            targets = batch["target_list"][wanted.to(teacher.device)]
            for some, target in zip(hidden.split(at_once), targets.split(at_once), strict=True):
                scores = log_probability(some @ table.T)
                score, items = scores.topk(self.k, dim=1)
                found.append((items, score, scores.gather(1, target.unsqueeze(1)).squeeze(1)))
        return tuple(torch.cat(column) for column in zip(*found, strict=True))


def rows_of_a_shard(most: int, rows: int) -> int:
    """Rows of a shard where they are labelled one by one: `most`, but no more than 1 % of all, which is what a kill may cost.

    A shard is also the largest batch, so labels of less than a thousand rows are made in small ones. Shards of cheap teachers have
    `LEAST_ROWS_OF_A_SHARD` at least.
    """
    return max(1, min(most, rows // 100))


def reads_windows(teacher: Any) -> bool:
    """Whether one pass over a window gives a teacher's scores at every position of it."""
    return is_causal(teacher)[0] and fault_of_scores(teacher) is None


def whole_shard(file: Path, rows: Tensor, teacher: str | None) -> dict[str, Tensor] | None:
    """A shard that was written earlier, if it is byte for byte what was written, of these rows, and by this teacher.

    Args:
        file: The shard.
        rows: What it has to be of.
        teacher: Digest of the checkpoint that labels.
    """
    try:
        shard = read_tensors(file)
        unchanged = read_metadata(file).get("seal") == seal(shard, teacher)
    except (FileNotFoundError, DamagedArtifact):
        return None
    return shard if unchanged and torch.equal(shard["row"], rows) else None


def seal(shard: dict[str, Tensor], teacher: str | None) -> str:
    """A digest of what a shard holds and of whose labels these are; one, since safetensors writes several in any order."""
    return digest({"tensors": tensors_digest(shard), "teacher": teacher})
