"""A teacher that knows the ring without any language model, and the shortest way to let it teach."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import InputType, get_model, init_seed

from recbole_llm.config import Config
from recbole_llm.knowledge import Knowledge, rows_to_label
from recbole_llm.processes import WHOLE
from recbole_llm.rows import at_random
from recbole_llm.sequences import Log
from recbole_llm.teacher import Teacher, sample_of_rows
from recbole_llm.trainer import trainer_class
from tests.ring import N_ITEMS, RING, TOKENS

SIZES = {
    "SASRec": {"hidden_size": 32, "inner_size": 32, "n_layers": 1, "n_heads": 1},
    "GRU4Rec": {"embedding_size": 32, "hidden_size": 32},
    "NARM": {"embedding_size": 32, "hidden_size": 32},
    "STAMP": {"embedding_size": 32},
    "Caser": {"embedding_size": 32},
    "LightSANs": {"hidden_size": 32, "inner_size": 32, "n_layers": 1, "n_heads": 1},
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
SMALL = {
    "load_col": RING["load_col"],
    "title_field": "title",
    "MAX_ITEM_LIST_LENGTH": 12,
    "epochs": 1,
    "train_batch_size": 128,
    "learning_rate": 0.01,
    "metrics": ["Hit", "NDCG"],
    "topk": [1, 5],
    "valid_metric": "NDCG@5",
    "show_progress": False,
    "state": "error",
    "distill_topk": 5,
}


class Killed(Exception):
    """Stands for a process that ends here."""


class Oracle(Teacher):
    """Scores an item by minus the number of steps that it stands behind the right one on the ring; no two items tie.

    Args:
        config: RecBole Config.
        dataset: A data set with the ring's items.
        tuned: On how many training rows it says that it was tuned.
        dies_at: Raises `Killed` at this call of full_sort_predict, counted from 0.
    """

    input_type = InputType.POINTWISE
    scores_are = "distance"

    def __init__(self, config, dataset, tuned=0, dies_at=None):
        super().__init__(config, dataset)
        tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
        self.place = torch.tensor([0, *[TOKENS.index(token) for token in tokens[1:]]])
        self.tuned, self.dies_at = tuned, dies_at
        self.labelled: list[int] = []

    @property
    def history_length(self):
        return 10

    def full_sort_predict(self, interaction):
        if self.dies_at == len(self.labelled):
            raise Killed
        self.labelled.append(len(interaction))
        history, length = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        right = self.place[history.gather(1, length.unsqueeze(1) - 1)] + 1
        return -((self.place - right) % N_ITEMS).float()

    def trained_on(self, n_rows):
        flags = torch.zeros(n_rows, dtype=torch.bool)
        flags[sample_of_rows(n_rows, self.tuned, 2024)] = self.tuned > 0
        return flags

    def item_embeddings(self):
        angle = self.place.unsqueeze(1) * torch.arange(1, 5) * (2 * torch.pi / N_ITEMS)
        table = torch.cat([angle.cos(), angle.sin()], dim=1)
        table[0] = 0
        return table


def prepared(data_path: Path, **settings: Any) -> SimpleNamespace:
    """Config, data set and loaders of a distilling run; the student is SASRec unless the settings say otherwise."""
    student = settings.get("student", "SASRec")
    chosen = SMALL | SIZES.get(student, {}) | {"data_path": str(data_path), "teacher": "BIGRec"} | settings
    config = Config("DLLM2Rec", chosen.pop("dataset", "ring"), None, chosen, read_argv=False)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    return SimpleNamespace(config=config, dataset=dataset, train=train, valid=valid, test=test)


def ask(parts: SimpleNamespace, folder: Path | str, teacher: Oracle | None = None, **options: Any) -> Knowledge:
    """What an oracle says about the training rows of `prepared`; `rows`, `k` and `part` are the count of rows, of candidates, and whose."""
    dataset = parts.train._dataset
    teacher = teacher or Oracle(parts.config, dataset)
    rows = rows_to_label(teacher, at_random(Log.from_dataset(dataset), (), 2024), options.pop("rows", 0))
    chosen = {"history": 10, "shard_rows": 64, "overlap": 10, "provenance": {"teacher": "Oracle"}, "progress": False}
    k, part = options.pop("k", 5), options.pop("part", WHOLE)
    return Knowledge.build(teacher, dataset, rows, k, folder, chosen | options, part=part)


def student(parts: SimpleNamespace) -> SimpleNamespace:
    """`parts` with a new model and its trainer, from the Config's seed."""
    init_seed(parts.config["seed"], parts.config["reproducibility"])
    parts.train.generator.manual_seed(parts.config["seed"])
    parts.model = get_model("DLLM2Rec")(parts.config, parts.train._dataset).to(parts.config["device"])
    parts.trainer = trainer_class(parts.config)(parts.config, parts.model)
    return parts


def distilled(data_path: Path, knowledge: Knowledge | None, saved: bool = False, **settings: Any) -> SimpleNamespace:
    """`parts` after the training of a student under some settings, taught from the folder of a Knowledge."""
    source = {"teacher_knowledge": str(knowledge.folder)} if knowledge else {}
    parts = student(prepared(data_path, **source | settings))
    parts.best = parts.trainer.fit(parts.train, parts.valid, saved=saved, show_progress=False)
    return parts
