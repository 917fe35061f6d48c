"""Small logs as real atomic files, and what RecBole makes of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, init_seed

PLAIN = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": 8,
    "hidden_size": 16,
    "embedding_size": 16,
    "inner_size": 32,
    "n_heads": 1,
    "epochs": 2,
    "train_batch_size": 64,
    "metrics": ["Hit", "NDCG"],
    "topk": [1, 5],
    "valid_metric": "NDCG@5",
    "metric_decimal_place": 8,
    "show_progress": False,
    "state": "error",
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "dropout_prob": 0.0}


def write_log(data_path: Path, name: str, sequences: Mapping[str, Sequence[str]], order=None) -> Path:
    """Write <name>/<name>.inter with each user's items in time order; `order` permutes the file's rows."""
    rows = [f"{user}\t{item}\t{1 + time}" for user, items in sequences.items() for time, item in enumerate(items)]
    rows = rows if order is None else [rows[row] for row in order]
    folder = Path(data_path) / name
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(["user_id:token\titem_id:token\ttimestamp:float", *rows])
    (folder / f"{name}.inter").write_text(text + "\n", encoding="utf-8")
    return Path(data_path)


def random_log(users: int = 25, items: int = 30, longest: int = 30, seed: int = 0) -> dict[str, list[str]]:
    """Random sequences of 4 to `longest` items, users named so that their order by number is not that by token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, longest + 1, (users,), generator=generator).tolist()
    return {
        str(user + 1): [f"i{item}" for item in torch.randint(items, (length,), generator=generator).tolist()]
        for user, length in enumerate(lengths)
    }


def stock(data_path: Path, name: str, model: str = "SASRec", make=create_dataset, **settings: Any) -> SimpleNamespace:
    """RecBole's own config, data set (or what `make` makes of the config), loaders and model, step by step."""
    loss_type = settings.get("loss_type", "CE")
    chosen = PLAIN | {"data_path": str(data_path), "loss_type": loss_type} | settings
    if loss_type == "CE":
        chosen["train_neg_sample_args"] = None
    config = Config(model=model, dataset=name, config_dict=chosen)
    init_seed(config["seed"], config["reproducibility"])
    dataset = make(config)
    train, valid, test = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    network = get_model(model)(config, train._dataset).to(config["device"])
    return SimpleNamespace(config=config, dataset=dataset, train=train, valid=valid, test=test, model=network)
