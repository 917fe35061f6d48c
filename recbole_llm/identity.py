"""What makes rows, items and data the same ones: tokens and titles, never internal ids or the order of a file.

A row is (user token, target position, the last `teacher_history` item tokens, target token).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.artifacts import digest, tensors_digest
from recbole_llm.item_text import ItemText, filled_in
from recbole_llm.sequences import Log

TITLE_ALONE = "{title}"


@dataclass(frozen=True)
class Names:
    """Items and users of a data set by the order of their tokens, which no file order changes.

    Args:
        items: Item tokens, sorted; item number i + 1 is items[i], 0 is "no item".
        number: Internal item id -> item number [n_items].
        internal: Item number -> internal item id [n_items].
        users: User tokens in the order of the log.
    """

    items: list[str]
    number: Tensor
    internal: Tensor
    users: list[str]

    @classmethod
    def of(cls, dataset: Any, log: Log) -> "Names":
        """Names of a RecBole dataset."""
        tokens = np.asarray(dataset.field2id_token[dataset.iid_field]).astype(str)
        order = np.argsort(tokens[1:], kind="stable") + 1
        internal = torch.from_numpy(np.concatenate([[0], order]))
        number = torch.empty_like(internal)
        number[internal] = torch.arange(len(internal))
        users = dataset.field2id_token[dataset.uid_field]
        return cls(tokens[order].tolist(), number, internal, [str(users[user]) for user in log.users.tolist()])


def fingerprint(log: Log, names: Names, rows: Tensor, history: int) -> dict[str, str]:
    """Hashes of the parts that make rows what they are.

    Args:
        log: The log the rows are of.
        names: Tokens of its users and items.
        rows: Row numbers, indices into `log.rows()` [M].
        history: How many last items belong to a row's identity.

    Returns:
        Part -> hash: `users`, `items` (all tokens), `rows` (which rows, their user and position), `histories`, `targets`.
    """
    position = log.rows()[rows]
    user = log.user_index(position)
    seen, length = log.history(position, history)
    numbers = {
        "rows": {"row": rows, "user": user, "place": position - log.offsets[user]},
        "histories": {"items": names.number[seen], "length": length},
        "targets": {"items": names.number[log.items[position]]},
    }
    return {
        "users": digest(names.users),
        "items": digest(names.items),
        **{part: tensors_digest(tensors) for part, tensors in numbers.items()},
    }


def model_folders(settings: Mapping[str, Any]) -> dict[str, dict[str, list[int]]]:
    """Files, sizes and times of every folder by which settings name a language model: its content can change under its name."""
    named = {key: value for key, value in settings.items() if key.endswith("llm") or key == "teacher_embedding"}
    folders = {key: Path(value) for key, value in named.items() if isinstance(value, str) and Path(value).is_dir()}
    return {
        key: {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.iterdir())}
        for key, folder in folders.items()
    }


def titles_digest(dataset: Any, names: Names) -> str | None:
    """Hash of the titles by item number; None where no title column is loaded."""
    field = dataset.config["title_field"]
    if not field or dataset.item_feat is None or field not in dataset.item_feat:
        return None
    titles = ItemText.from_dataset(dataset, field).titles
    return digest([titles[item] for item in names.internal.tolist()])


def data_digest(log: Log, dataset: Any, config: Any) -> str:
    """Hash of the training log by tokens, and of what a teacher reads of the items: two files in another order have the same.

    Args:
        log: The log.
        dataset: The dataset it is of.
        config: The teacher's; `title_field` and, where it has one, `lite_item_template` or `textknn_template` say what is read.
    """
    template = config["lite_item_template"] or config["textknn_template"] or TITLE_ALONE
    title_field = config["title_field"]
    items = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    users = dataset.field2id_token[dataset.uid_field]
    texts: Sequence[str] = ()
    if template != TITLE_ALONE:
        texts = filled_in(template, dataset, title_field)
    elif title_field:
        texts = ItemText.from_dataset(dataset, title_field).titles
    return digest(
        {
            "users": [str(users[user]) for user in log.users.tolist()],
            "offsets": log.offsets.tolist(),
            "items": [items[item] for item in log.items.tolist()],
            "titles": sorted(zip(items, texts, strict=False)),
        }
    )


def log_digest(log: Log, dataset: Any) -> str:
    """Hash of a log by tokens: who met what, in which order. Args: the log; the dataset it is of."""
    items = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
    users = dataset.field2id_token[dataset.uid_field]
    return digest(
        {
            "users": [str(users[user]) for user in log.users.tolist()],
            "offsets": log.offsets.tolist(),
            "items": [items[item] for item in log.items.tolist()],
        }
    )


def order_digest(dataset: Any) -> str:
    """Hash of what the internal ids stand for: users' and items' tokens in their order, which the order of the files gives."""
    fields = dataset.uid_field, dataset.iid_field
    return digest([[str(token) for token in dataset.field2id_token[field]] for field in fields])
