"""What a student gets of its teacher, in the terms of its own data set: labels, joined by what rows are, and item vectors.

A Knowledge of other data is refused, and the message says what differs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_llm.artifacts import cached_tensor, digest
from recbole_llm.identity import Names, fingerprint, titles_digest
from recbole_llm.item_text import ItemText
from recbole_llm.knowledge import Knowledge, ensure
from recbole_llm.sequences import Log
from recbole_llm.teacher import NOTHING_LEFT


@dataclass
class Attached:
    """Knowledge in the terms of one data set: internal ids, and where each flat position of the log finds its row.

    Args:
        index: Flat position of the log -> row of the tables below, -1 for none [N].
        items: Candidates by internal id, 0 for none [M, K].
        score: Their scores [M, K].
        target_score: Score of the true item [M].
        trained: Whether the teacher was tuned on the row [M].
        item_embedding: Vectors by internal id [n_items, d].
        scores_are: log-probability | distance (minus one).
    """

    index: Tensor
    items: Tensor
    score: Tensor
    target_score: Tensor
    trained: Tensor
    item_embedding: Tensor
    scores_are: str = "distance"

    @property
    def labelled(self) -> int:
        """How many positions have a label in use."""
        return int((self.index >= 0).sum())

    @property
    def total(self) -> int:
        """How many positions the log has, first items included."""
        return len(self.index)

    def treat_trained(self, how: str, target: Tensor) -> None:
        """Treat the teacher's own training rows, whose targets it has memorised.

        Args:
            how: drop (they are not used) | drop_target (the true item is no candidate there) | keep.
            target: Item of each flat position of the log, by internal id [N].

        Raises:
            ValueError: Nothing is left.
        """
        used = self.index >= 0
        memorised = self.trained[self.index.clamp_min(0)] & used
        if how == "drop_target":
            row = self.index[memorised]
            self.items[row] = self.items[row].masked_fill(self.items[row] == target[memorised].unsqueeze(1), 0)
        elif how == "drop":
            self.index = self.index.masked_fill(memorised, -1)
            if used.any() and not (self.index >= 0).any():
                raise ValueError(NOTHING_LEFT)

    def to(self, device: Any) -> None:
        """Move every table to a device."""
        for name, value in vars(self).items():
            setattr(self, name, value.to(device) if isinstance(value, Tensor) else value)


def attach(knowledge: Knowledge, dataset: Any, topk: int, history: int) -> Attached:
    """Join a Knowledge to a training split by the identity of its rows.

    Args:
        knowledge: What the teacher said.
        dataset: The training split of the student.
        topk: Candidates to use; fewer are there if the Knowledge has fewer.
        history: `teacher_history` of the student's settings.

    Raises:
        ValueError: The Knowledge is of other data; the message says which parts differ.
    """
    log = Log.from_dataset(dataset)
    names = Names.of(dataset, log)
    rows = knowledge.row
    there, wanted = knowledge.manifest["fingerprint"], {}
    if knowledge.manifest["history"] != history:
        differ = [f"teacher_history ({knowledge.manifest['history']}, not {history})"]
    elif len(rows) and int(rows.max()) >= len(log.rows()):
        differ = [f"number of training rows ({len(log.rows())} here, at least {int(rows.max()) + 1} there)"]
    else:
        wanted = fingerprint(log, names, rows, history)
        differ = [part for part in wanted if wanted[part] != there.get(part)]
        titles = titles_digest(dataset, names)
        if titles and titles != (knowledge.manifest.get("titles") or titles):
            differ.append("titles")
    if differ:
        raise ValueError(
            f"teacher_knowledge={knowledge.folder}: it is of other data than dataset={dataset.dataset_name}; what differs: "
            f"{', '.join(differ)}. Let it be built again (leave teacher_knowledge empty), or use the data and filters it was built on."
        )
    index = torch.full((len(log.items),), -1, dtype=torch.long)
    index[log.rows()[rows]] = torch.arange(len(rows))
    vectors = knowledge.item_embedding[names.number]
    items = names.internal[knowledge.items[:, :topk].long()]
    scores_are = knowledge.manifest.get("scores", "distance")
    score, trained = knowledge.score[:, :topk], knowledge.trained.bool()
    return Attached(index, items, score, knowledge.target_score, trained, vectors, scores_are)


def teacher_vectors(config: Any, train_data: Any, valid_data: Any) -> Tensor:
    """Item vectors z for the student's table, by internal id [n_items, d].

    `teacher_embedding: auto` takes the teacher's own from the Knowledge; a name takes that text encoder's vectors of the
    titles, which are kept on disk, too, so that the encoder is only loaded once.
    """
    dataset = train_data._dataset
    log = Log.from_dataset(dataset)
    if config["teacher_embedding"] == "auto":
        knowledge = ensure(config, train_data, valid_data)
        return attach(knowledge, dataset, config["distill_topk"], config["teacher_history"]).item_embedding
    names = Names.of(dataset, log)
    text = ItemText.from_dataset(dataset, config["title_field"])
    titles = [text.titles[item] for item in names.internal.tolist()]
    key = digest({"encoder": config["teacher_embedding"], "titles": titles, "format": 1})
    file = Path(config["checkpoint_dir"]) / "item_vectors" / f"{config['dataset']}-{key}.safetensors"
    vectors = cached_tensor(
        file, lambda: encode(config["teacher_embedding"], titles, config["device"], config["show_progress"])
    )
    return vectors[names.number]


def encode(name: str, titles: list[str], device: Any, progress: bool) -> Tensor:
    """Vectors of titles by a text encoder; the first title is the padding's, whose vector is 0 [n, d]."""
    from recbole_llm.lm import LanguageModel  # rule: with vectors on disk, no LLM library is imported

    vectors = LanguageModel.load(name, device=device, key="teacher_embedding").embed(
        titles[1:], progress=progress, description="Embed titles"
    )
    return torch.cat([torch.zeros_like(vectors[:1]), vectors])
