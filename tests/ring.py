"""The ring: 24 items and 60 users in real atomic files, where item t + 1 (modulo 24) always follows item t.

Whoever learns anything of the order of a history reaches hit@1 = 1 here.
"""

import random
import shutil
from pathlib import Path

N_ITEMS = 24
N_USERS = 60
ITEMS_PER_USER = 12

_COLOURS = ("amber", "blue", "coral", "green", "ivory", "violet")
_ANIMALS = ("falcon", "otter", "salmon", "tiger")

TOKENS = tuple(f"i{item:02d}" for item in range(N_ITEMS))
TITLES = tuple(f"{colour} {animal}" for animal in _ANIMALS for colour in _COLOURS)

# What a dataset yaml would say; tests add data_path.
RING = {
    "dataset": "ring",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]},
    "title_field": "title",
    "prompt_instruction": "Given the animals that a user has met, name the animal that comes next.",
    "prompt_lead": "The user has met these animals, oldest first:",
}


def following(token: str) -> str:
    """The token of the item that comes after an item on the ring."""
    return TOKENS[(TOKENS.index(token) + 1) % N_ITEMS]


def write_ring(data_path: Path) -> Path:
    """Write ring/ring.inter and ring/ring.item under `data_path` and return it.

    User u starts at item u modulo 24; timestamps are whole, small enough for float32, and never tie.
    """
    folder = Path(data_path) / "ring"
    folder.mkdir(parents=True, exist_ok=True)
    inter = ["user_id:token\titem_id:token\ttimestamp:float"]
    for step in range(ITEMS_PER_USER):
        for user in range(N_USERS):
            inter.append(f"u{user:02d}\t{TOKENS[(user + step) % N_ITEMS]}\t{step * N_USERS + user + 1}")
    item = ["item_id:token\ttitle:token_seq", *map("\t".join, zip(TOKENS, TITLES, strict=True))]
    (folder / "ring.inter").write_text("\n".join(inter) + "\n", encoding="utf-8")
    (folder / "ring.item").write_text("\n".join(item) + "\n", encoding="utf-8")
    return Path(data_path)


def shuffled(data_path: Path, target: Path, files: tuple[str, ...] = ("inter", "item"), seed: int = 0) -> Path:
    """Copy a data folder to `target` with the rows of the named atomic files in another order; returns `target`.

    Args:
        data_path: Folder that holds ring/ring.inter and ring/ring.item.
        target: Folder that does not exist yet.
        files: Suffixes of the files whose rows move; their headers stay.
        seed: Seed of the order.
    """
    shutil.copytree(data_path, target)
    for suffix in files:
        for path in sorted(Path(target).glob(f"*/*.{suffix}")):
            head, *rows = path.read_text(encoding="utf-8").splitlines()
            random.Random(seed).shuffle(rows)
            path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    return Path(target)
