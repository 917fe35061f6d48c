"""What labelling costs on this machine, measured on some of the rows that a prompted LLM would label; nothing of it is kept.

The LLM is loaded and writes titles shard by shard, as labelling does, for half a minute; the rest is extrapolated by tokens. Of what
labelling does besides, new titles are embedded here too; the search in the catalogue is left out.
"""

import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from recbole.utils import get_model
from torch import Tensor

from recbole_llm import teacher
from recbole_llm.artifacts import file_digest
from recbole_llm.identity import Names
from recbole_llm.knowledge import Request, asked_rows
from recbole_llm.labelling import Labeller, rows_of_a_shard, whole_shard
from recbole_llm.sequences import Log

SECONDS = 30.0
"""How long a sample may take, the loading of the LLM aside."""
TABLES = 3
"""Copies of the item vectors that labelling holds: by title, as a table, in the index."""
PROMPTS_COUNTED = 4096
"""Rows whose prompts are cut into tokens to know how long all prompts are; that takes a second."""


@dataclass(frozen=True)
class Cost:
    """What it takes to write titles for some rows.

    Args:
        rows: How many rows.
        prompt_tokens: Tokens that are read.
        new_tokens: Tokens that are written.
        seconds: Time.
    """

    rows: int = 0
    prompt_tokens: float = 0
    new_tokens: float = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        parts = zip(vars(self).values(), vars(other).values(), strict=True)
        return Cost(*(one + another for one, another in parts))


@dataclass(frozen=True)
class Rehearsal:
    """A measured sample, and what follows from it for all rows.

    Args:
        sample: What was measured.
        whole: Extrapolated to all rows that are to be labelled.
        memory: Most bytes that the process (on CUDA: the device) held, and those of the item vectors and their index, which it did not;
            None where the system does not tell.
        disk: Bytes of the Knowledge.
        tuned: Whether the LLM was tuned already.
        rows: All rows of the Knowledge, those among them that are labelled already, or by other parts.
    """

    sample: Cost
    whole: Cost
    memory: int | None
    disk: int
    tuned: bool
    rows: int = 0

    def seconds_of(self, rows: int) -> float:
        """How long the same takes for another number of rows like these."""
        known = self.whole if self.whole.rows else self.sample
        return known.seconds * rows / known.rows

    def text(self) -> str:
        """What was measured and what follows, in a line or two."""
        sample, whole = self.sample, self.whole
        memory = "memory unknown" if self.memory is None else f"a peak of {self.memory / 1e9:.2f} GB of memory"
        others = (
            f" (of {self.rows}; the others are labelled already, or by other parts)" if whole.rows < self.rows else ""
        )
        said = (
            f"Measured here: {sample.rows} titles in {sample.seconds:.1f} s, {sample.prompt_tokens:.0f} prompt tokens and "
            f"{sample.new_tokens:.0f} new ones. So {whole.rows} rows{others}: {whole.prompt_tokens:.0f} prompt tokens and "
            f"{whole.new_tokens:.0f} new ones, {whole.seconds:.1f} s, {memory}, {self.disk / 1e6:.2f} MB on disk."
        )
        return said if self.tuned else f"{said} The LLM is not tuned yet; tuned, it may write longer or shorter titles."


def rehearse(config: Any, request: Request, data: Any, limit: float = SECONDS) -> Rehearsal | None:
    """Let the LLM write titles for some of the rows that it would label; None, and a warning, if the LLM is not to be had.

    Args:
        config: Of the distilling model.
        request: What it asks of its prompted teacher.
        data: RecBole's training, validation and test loaders.
        limit: Most seconds of the sample.
    """
    from recbole_llm.pretrained import ModelNotFound  # rule: only runs with an LLM import what finds one

    dataset = data.train._dataset
    tuned = bool(request.checkpoint) or teacher.is_ready(request.teacher_folder)
    if tuned:
        model = teacher.ready(request.config, dataset, data.valid, request.checkpoint)
    else:
        model = get_model(request.config["model"])(request.config, dataset).to(request.config["device"])
    try:
        lm, width = model.lm, model.encoder.width
    except ModelNotFound as error:
        reason = " ".join(str(error).split())
        logging.getLogger().warning(f"Nothing is measured, the times are counted: {reason}")
        return None
    log, rows = Log.from_dataset(dataset), asked_rows(config, model, dataset)
    size = rows_of_a_shard(config["teacher_shard_rows"], len(rows))
    labeller = Labeller(model, log, rows, config["distill_topk"], size, None, Names.of(dataset, log).number)
    plan = [shard for _, shard in labeller.shards()]
    left = plan if config["teacher_folds"] else left_of(plan, request)

    def histories(some: Tensor) -> Tensor:
        return log.history(log.rows()[some], model.history_length)[0]

    def prompt_tokens(some: Tensor) -> int:
        return tokens(lm, model.prompts(histories(some)))

    def write(some: Tensor) -> list[str]:
        titles = model.write_titles(histories(some))
        model.encoder.embed([title for title in titles if title and title not in model.catalogue])
        return titles

    def count(some: Tensor, titles: list[str]) -> tuple[int, int]:
        return prompt_tokens(some), tokens(lm, [f'"{title}"' for title in titles])

    sample = measured(left or plan, write, count, limit)
    asked = torch.cat(left).sort().values if left else rows[:0]
    some = asked[:: max(1, math.ceil(len(asked) / PROMPTS_COUNTED))]
    k = min(config["distill_topk"], dataset.item_num - 1)
    memory = peak_memory(model.device)
    return Rehearsal(
        sample,
        extrapolated(sample, len(asked), prompt_tokens(some) * len(asked) / max(1, len(some))),
        None if memory is None else memory + TABLES * 4 * dataset.item_num * width,
        bytes_of_knowledge(len(rows), k, dataset.item_num, width),
        tuned,
        len(rows),
    )


def left_of(plan: Sequence[Tensor], request: Request) -> list[Tensor]:
    """Shards of this process's part that are not on disk yet. Args: rows of each shard; what is asked of the teacher."""
    file = Path(request.checkpoint or request.teacher_folder / "model.safetensors")
    by = file_digest(file) if file.is_file() else None
    named = [(request.folder / f"shard-{number:05d}.safetensors", rows) for number, rows in enumerate(plan)]
    return [rows for shard, rows in request.part.shards(named) if whole_shard(shard, rows, by) is None]


def tokens(lm: Any, texts: Sequence[str]) -> int:
    """How many tokens some texts are, each with one that opens or ends it."""
    return sum(map(len, lm.answer_tokens(texts)))


def measured(
    shards: Sequence[Tensor],
    write: Callable[[Tensor], list[str]],
    count: Callable[[Tensor, list[str]], tuple[int, int]],
    limit: float,
    clock: Callable[[], float] = perf_counter,
) -> Cost:
    """Write titles for shards, as many as the time allows, long and short prompts alike.

    A single row comes first: it warms up, and tells how much of a shard is affordable. It is the sample itself where no more is.

    Args:
        shards: Row numbers of each shard, shards by the length of their prompts.
        write: Rows -> their titles; this is what takes time.
        count: Rows and titles -> tokens that were read and written.
        limit: Seconds in all.
        clock: Tells the time.
    """
    until = clock() + limit

    def cost(rows: Tensor) -> Cost:
        began = clock()
        titles = write(rows)
        seconds = clock() - began
        return Cost(len(rows), *count(rows, titles), seconds)

    order = from_the_middle(len(shards))
    latest = single = cost(shards[order[0]][:1])
    total = Cost()
    for number in order:
        rows = shards[number]
        affordable = int((until - clock()) * latest.rows / max(latest.seconds, 1e-9))
        # a part of a shard costs more per row than a whole one, so it has to be no less than what there is already
        if affordable < min(len(rows), max(1, total.rows)):
            break
        latest = cost(rows[:affordable])
        total += latest
    return total if total.rows else single


def from_the_middle(count: int) -> list[int]:
    """0 to count - 1, the middle first, then the middles of both halves, and so on: any first few are spread over all."""
    order, spans = [], [(0, count)]
    for begin, end in spans:  # which grows on the way
        if begin < end:
            middle = (begin + end) // 2
            order.append(middle)
            spans += [(begin, middle), (middle + 1, end)]
    return order


def extrapolated(sample: Cost, rows: int, prompt_tokens: float) -> Cost:
    """What other rows cost, if titles are as long as in the sample and a token takes as long.

    Args:
        sample: What was measured, of one row at least.
        rows: How many rows.
        prompt_tokens: Tokens of their prompts.
    """
    new_tokens = sample.new_tokens * rows / sample.rows
    per_token = sample.seconds / max(1, sample.prompt_tokens + sample.new_tokens)
    return Cost(rows, prompt_tokens, new_tokens, per_token * (prompt_tokens + new_tokens))


def bytes_of_knowledge(rows: int, k: int, n_items: int, width: int) -> int:
    """Bytes of a Knowledge's tensors: per row its number, k items and scores, the target's score and a flag; the item vectors.

    Args:
        rows: Labelled rows.
        k: Candidates of a row.
        n_items: Item ids, padding included.
        width: Of an item vector.
    """
    return rows * (8 + k * (4 + 4) + 4 + 1) + n_items * width * 4


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that this process has held: on CUDA those of the device, else its resident set; None where nobody knows."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Windows has none
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
