"""What the benchmark `smoke` needs beside what RecBole carries: the ring, and a tiny random LLM, called that."""

from pathlib import Path

from tests.ring import write_ring
from tests.tiny_lm import make_tiny_lm

FOLDER = Path("saved/smoke")


def prepare() -> None:
    """Write the ring to saved/smoke/data and the LLM to saved/smoke/tiny-lm, unless they are there."""
    if not (FOLDER / "data/ring/ring.item").is_file():
        write_ring(FOLDER / "data")
    if not (FOLDER / "tiny-lm/config.json").is_file():
        make_tiny_lm(FOLDER / "tiny-lm")
