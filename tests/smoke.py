"""What the benchmark `smoke` needs beside what RecBole carries: the ring, and a tiny random LLM, called that."""

import shutil
import tempfile
from pathlib import Path

from tests.ring import write_ring
from tests.tiny_lm import make_tiny_lm

FOLDER = Path("saved/smoke")


def prepare() -> None:
    """Write the ring to saved/smoke/data and the LLM to saved/smoke/tiny-lm as this version makes them."""
    write_ring(FOLDER / "data")
    with tempfile.TemporaryDirectory() as made:
        make_tiny_lm(made)
        # runs know a folder of an LLM by the times of its files, so one that is the same is left alone
        if not all(same(file, FOLDER / "tiny-lm" / file.name) for file in Path(made).iterdir()):
            shutil.copytree(made, FOLDER / "tiny-lm", dirs_exist_ok=True)


def same(one: Path, other: Path) -> bool:
    """Whether two files have the same content; a missing one has not."""
    return other.is_file() and one.read_bytes() == other.read_bytes()
