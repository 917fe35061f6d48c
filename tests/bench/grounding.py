"""Grounding alone: the ten nearest items of vectors by FAISS, and as BIGRec's authors do it, by torch.cdist and a double argsort.

`python -m tests.bench.grounding`; two minutes. Each side in a process of its own, one after the other. Vectors are drawn, with one
dimension that all have in common, as hidden states of LLMs do; torch.cdist loses digits by it, so a few of its lists are wrong.
"""

import argparse
import multiprocessing
from pathlib import Path
from time import perf_counter

import torch

from recbole_llm.artifacts import write_json
from recbole_llm.grounding import Grounder

RESULTS = Path(__file__).parent / "grounding.json"
K, WIDTH = 10, 576


def most_held() -> int:
    """Most bytes that this process has held since `forget`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def forget() -> int:
    """Forget how much this process has held, and say how much it holds."""
    Path("/proc/self/clear_refs").write_text("5")
    return most_held()


def side(name: str, queries: int, items: int) -> tuple[float, int, list]:
    """Seconds, bytes that the process held more at its largest, and the ten best items of each vector, sorted."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(items + 1, WIDTH, generator=generator)
    table[:, 3] += 300
    noise = 0.5 * torch.randn(queries, WIDTH, generator=generator)
    vectors = table[torch.randint(1, items + 1, (queries,), generator=generator)] + noise
    grounder = Grounder().fit(table)
    grounder.search(vectors[:4], K)
    before, began = forget(), perf_counter()
    if name == "ours":
        found = grounder.search(vectors, K)[0]
    else:
        rank = torch.cdist(vectors, table[1:]).argsort(dim=1).argsort(dim=1)
    seconds, held = perf_counter() - began, most_held() - before
    if name == "peer":
        found = (rank < K).nonzero()[:, 1].view(queries, K) + 1
    return seconds, held, found.sort(dim=1).values.tolist()


def main() -> None:
    """Measure both sides, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=17_000)
    asked = parser.parse_args()
    sides = {}
    for name in ("ours", "peer"):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            sides[name] = pool.apply(side, (name, asked.queries, asked.items))
    (fast, little, found), (slow, much, expected) = sides["ours"], sides["peer"]
    results = {
        "threads": torch.get_num_threads(), "queries": asked.queries, "items": asked.items, "ours s": fast, "peer s": slow,
        "peer / ours": slow / fast, "ours MB": little / 1e6, "peer MB": much / 1e6, "peer / ours, memory": much / max(1, little),
        "equal lists": sum(map(list.__eq__, found, expected)) / asked.queries,
    }  # fmt: skip
    write_json(RESULTS, results)
    for key, value in results.items():
        print(f"{key:20} {value:,.3f}" if isinstance(value, float) else f"{key:20} {value:,}")


if __name__ == "__main__":
    main()
