"""Cross-fitting: every training row is labelled by a teacher that was trained on other users only.

A teacher with a vector per item is over-sure of the rows it was trained on. Users are dealt into folds; the teacher of a fold is
trained on the rows of all other users, and labels the fold's own.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.sequences import Log


def folds_of(users: Sequence[str], folds: int, seed: int) -> Tensor:
    """Which fold each user is in, equally many in each up to one; the order of the users means nothing [U].

    Args:
        users: Tokens of the users.
        folds: How many folds.
        seed: Key of the deal.
    """
    hashed = [hashlib.sha256(f"{seed}|{user}".encode()).digest() for user in users]
    fold = torch.empty(len(users), dtype=torch.long)
    fold[torch.tensor(sorted(range(len(users)), key=hashed.__getitem__), dtype=torch.long)] = (
        torch.arange(len(users)) % folds
    )
    return fold


def others(dataset: Any, users: Tensor) -> Any:
    """A training split without the rows of some users.

    Args:
        dataset: The split of all rows.
        users: Internal ids of the users that are left out [u].
    """
    kept = ~torch.isin(dataset.inter_feat[dataset.uid_field], users)
    return dataset.copy(dataset.inter_feat[kept.nonzero()[:, 0]])


def refuse_user_tables(model: nn.Module, users: int, folds: int) -> None:
    """Refuse a teacher of folds that learns users by their ids: of the users it is to label it would have learned nothing.

    Args:
        model: The teacher.
        users: Users of the data, padding included.
        folds: `teacher_folds`.

    Raises:
        ValueError: It does so.
    """
    table = user_table(model, users)
    learned = f"a vector of every user ({table})" if table else getattr(model, "learns_users", None)
    if learned:
        raise ValueError(
            f"teacher_folds={folds}: {type(model).__name__} learns {learned}, and a fold's users are not among those its teacher is "
            "trained on; there is teacher_folds=0. Set it, or choose a teacher that knows users by their histories."
        )


def user_table(model: nn.Module, users: int) -> str | None:
    """Name of a table or parameter of as many rows as there are users, padding included, that is called theirs; None if there is none.

    The number alone does not tell: a table of positions may be as long.
    """
    tables = {name: each.weight for name, each in model.named_modules() if isinstance(each, nn.Embedding)}
    # a layer's weight is none, whatever the layer is called
    tables |= {name: each for name, each in model.named_parameters() if is_of_users(name.rpartition(".")[2])}
    return next((name for name, table in tables.items() if is_of_users(name) and table.shape[:1] == (users,)), None)


def is_of_users(name: str) -> bool:
    """Whether a table's name is one for users; `UI_emb` is FPMC's."""
    return "user" in name.lower() or name.endswith("UI_emb")


def rows_of(log: Log, users: Tensor) -> Tensor:
    """Row numbers of some users, given by their places in the log [u] -> [m], ascending."""
    return torch.isin(log.user_index(log.rows()), users).nonzero()[:, 0]


def fault_of_folds(config: Any, teacher: Any, users: int) -> str | None:
    """Why `teacher_folds` cannot be done; None if it can.

    Args:
        config: The student's Config.
        teacher: The teacher's Config.
        users: How many users have training rows.
    """
    folds = config["teacher_folds"]
    if not isinstance(folds, int) or folds < 0 or folds == 1 or folds > users:
        return (
            f"teacher_folds={folds}: not possible; there is 0 (one teacher labels all rows) and 2 to {users} (the number of users). "
            "Set teacher_folds in a config file or on the command line."
        )
    if folds and config["teacher_checkpoint"]:
        return (
            f"teacher_folds={folds}: a teacher that is trained already was trained on rows it would label; there is teacher_folds=0. "
            "Set it, or leave teacher_checkpoint empty."
        )
    if folds and (sample := teacher["train_rows"] or teacher["p5_train_rows"]):
        return (
            f"teacher_folds={folds}: {config['teacher']} is tuned on a sample of {sample} rows, and all others are clean "
            "already; there is teacher_folds=0. Set it, or choose a teacher that is trained on every row."
        )
    return None
