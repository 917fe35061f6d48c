"""Grounding in a catalogue of 1,000,000 items: an approximate index against the exact one, by speed and by what it finds.

`python -m tests.bench.million`; four minutes, two more to read the titles first, 8 GB, needs ../shared/data. No catalogue at hand is
so large, and vectors drawn independently have no neighbours worth the name. So the MiniLM vectors of the titles of four catalogues
are the seeds, and the rest lies between and around them, as far from the nearest seed as seeds are from each other. Queries are
titles held out.
"""

import argparse
import statistics
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from recbole_llm.artifacts import write_json
from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset
from recbole_llm.grounding import INDEXES, Grounder, recipe
from recbole_llm.item_reader import item_vectors
from recbole_llm.item_text import filled_in
from tests.bench.grounding import forget, most_held

RESULTS = Path(__file__).parent / "million.json"
CATALOGUES = ("amazon-beauty", "amazon-games", "ml-1m", "ml-100k")
K, NEAR, TURNS = 10, 10, 3
AT_A_TIME, SAMPLE = 100_000, 2000
SAME = 1 - 5e-5
"""Cosine from which on two vectors are one: titles that differ in capitals are read alike, up to rounding."""


def title_vectors(data_path: str) -> Tensor:
    """MiniLM vectors of the different titles of the four catalogues, as TextKNN reads them, of length one [n, d]."""
    texts = set()
    for name in CATALOGUES:
        settings = {"state": "error", "show_progress": False}
        if name != "ml-100k":  # RecBole carries that one
            settings["data_path"] = data_path
        config = Config("TextKNN", name, None, settings, read_argv=False)
        texts |= set(filled_in(config["textknn_template"], create_dataset(config), config["title_field"])[1:])
    folder = Path(config["checkpoint_dir"]) / "item_vectors"
    reading = config["textknn_pool"], config["textknn_tokens"], folder, config["device"], True
    vectors = item_vectors(config["llm"], config["llm_revision"], ["", *sorted(texts)], *reading)
    return functional.normalize(vectors[1:].float(), dim=1)


def different(vectors: Tensor) -> Tensor:
    """Unit vectors without those that an earlier one equals but for rounding [m, d]."""
    repeats = torch.zeros(len(vectors), dtype=torch.bool)
    for begin in range(0, len(vectors), 1024):
        alike = vectors[begin : begin + 1024] @ vectors[: begin + 1024].T > SAME
        repeats[begin : begin + 1024] = alike.tril(begin - 1).any(dim=1)
    return vectors[~repeats]


def held_out(vectors: Tensor, queries: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A drawn part of the vectors [queries, d], and the others [n - queries, d]."""
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))
    return vectors[order[:queries]], vectors[order[queries:].sort().values]


def nearest(vectors: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows of the k nearest items of each vector, and their distances, nearest first [B, k]."""
    found, score = Grounder().fit(padded(items)).search(vectors, k)
    return found - 1, -score


def padded(items: Tensor) -> Tensor:
    """Items behind a row 0 of zeros, as item vectors of a data set are [n + 1, d]."""
    return functional.pad(items, (0, 0, 1, 0))


def neighbours(seeds: Tensor) -> tuple[Tensor, Tensor]:
    """The NEAR nearest other seeds of each seed [n, NEAR], and its distance to the nearest of them [n]."""
    near, distance = nearest(seeds, seeds, NEAR + 1)
    return near[:, 1:], distance[:, 1]


def generated(seeds: Tensor, near: Tensor, gap: Tensor, noise: float, count: int, generator: torch.Generator) -> Tensor:
    """New unit vectors: from a seed up to half the way to one of its neighbours, and then along what separates two other neighbours.

    Args:
        seeds: Unit vectors [n, d].
        near: Neighbours of each [n, NEAR].
        gap: Distance of each to its nearest [n].
        noise: Length of the second step in terms of the seed's own gap.
        count: How many.
        generator: What draws.

    Returns:
        [count, d].
    """

    def pairs() -> tuple[Tensor, Tensor]:
        one = torch.randint(len(seeds), (count,), generator=generator)
        return one, near[one, torch.randint(near.shape[1], (count,), generator=generator)]

    own, other = pairs()
    way = torch.rand(count, 1, generator=generator) / 2
    left, right = pairs()
    step = noise * gap[own, None] * functional.normalize(seeds[right] - seeds[left], dim=1)
    return functional.normalize(seeds[own] + way * (seeds[other] - seeds[own]) + step, dim=1)


def fitting_noise(seeds: Tensor, near: Tensor, gap: Tensor, seed: int = 0) -> float:
    """The noise with which generated vectors have the seeds' own median distance to the nearest seed, by bisection on a sample."""
    grounder = Grounder().fit(padded(seeds))
    low, high = 0.0, 4.0
    for _ in range(12):
        noise = (low + high) / 2
        sample = generated(seeds, near, gap, noise, SAMPLE, torch.Generator().manual_seed(seed))
        if -grounder.search(sample, 1)[1].median() < gap.median():
            low = noise
        else:
            high = noise
    return (low + high) / 2


def catalogue(seeds: Tensor, near: Tensor, gap: Tensor, noise: float, items: int, seed: int = 1) -> Tensor:
    """Item vectors of a catalogue of so many items: the padding's, the seeds, and generated ones [items + 1, d]."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.zeros(items + 1, seeds.shape[1])
    vectors[1 : len(seeds) + 1] = seeds[:items]
    for part in vectors[len(seeds) + 1 :].split(AT_A_TIME):
        part.copy_(generated(seeds, near, gap, noise, len(part), generator))
    return vectors


def recall(found: Tensor, exact: Tensor) -> float:
    """Share of the exact lists that is found, mean over rows [B, k]."""
    return (exact.unsqueeze(2) == found.unsqueeze(1)).any(dim=2).float().mean().item()


def quantiles(distance: Tensor) -> list[float]:
    """The 10, 50 and 90 % quantile."""
    return [round(value, 3) for value in distance.float().quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()]


class Timed(Grounder):
    """A Grounder that keeps the seconds that each FAISS index took to learn and fill, apart from all else that `fit` does."""

    built: dict[str, float]

    def _built(self, factory, vectors, *more):
        began = perf_counter()
        index = super()._built(factory, vectors, *more)
        self.built = {**getattr(self, "built", {}), factory: perf_counter() - began}
        return index


def side(index: str, vectors: Tensor, queries: Tensor, peer: Grounder) -> dict:
    """What an approximate index costs and finds; it and the exact one answer all queries in turn."""
    before, began = forget(), perf_counter()
    grounder = Timed(index=index).fit(vectors)
    fitted, held = perf_counter() - began, most_held() - before
    factory, parameters, _ = recipe(index, len(vectors) - 1, vectors.shape[1])
    milliseconds, found = {"exact": [], index: []}, {}
    for _ in range(TURNS):
        for name, one in (("exact", peer), (index, grounder)):
            began = perf_counter()
            found[name] = one.search(queries, K)[0]
            milliseconds[name].append(1e3 * (perf_counter() - began) / len(queries))
    slow, fast = (statistics.median(times) for times in milliseconds.values())
    return {
        "factory": factory, "search": parameters, "build s": grounder.built[factory], "exact build s": grounder.built["Flat"],
        "fit s, with both and its own recall": fitted, "fit MB at most": held / 1e6, "exact ms a query": slow, "ms a query": fast,
        "exact / approximate": slow / fast, f"recall@{K}": recall(found[index], found["exact"]),
        f"recall@{grounder.recall_at} by fit": grounder.recall, "turns, ms a query": milliseconds,
    }  # fmt: skip


def shown(results: dict, indent: str = "") -> None:
    """Print results line by line, those of an index indented below its name."""
    for key, value in results.items():
        if isinstance(value, dict) and key in INDEXES:
            print(f"{indent}{key}")
            shown(value, indent + "  ")
        else:
            print(f"{indent}{key:{40 - len(indent)}} {f'{value:,.4g}' if isinstance(value, float) else value}")


def main() -> None:
    """Make the catalogue, measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument(
        "--indexes", nargs="+", default=["ivfpq"], choices=[name for name in INDEXES if name != "exact"]
    )
    parser.add_argument("--data_path", default="../shared/data")
    asked = parser.parse_args()
    queries, seeds = held_out(different(title_vectors(asked.data_path)), asked.queries)
    near, gap = neighbours(seeds)
    noise = fitting_noise(seeds, near, gap)
    vectors = catalogue(seeds, near, gap, noise, asked.items)
    made = vectors[len(seeds) + 1 :]
    results = {
        "threads": torch.get_num_threads(), "items": asked.items, "queries": asked.queries, "seeds": len(seeds), "noise": noise,
        "nearest seed: of seeds": quantiles(gap),
        "nearest seed: of queries": quantiles(nearest(queries, seeds, 1)[1]),
        "nearest seed: of generated": quantiles(nearest(made[:: max(1, len(made) // SAMPLE)], seeds, 1)[1]),
    }  # fmt: skip
    shown(results)
    peer = Grounder().fit(vectors)
    results["nearest item: of queries"] = quantiles(-peer.search(queries, 1)[1])
    for index in asked.indexes:
        results[index] = side(index, vectors, queries, peer)
        write_json(RESULTS, results)
    print()
    shown(results)


if __name__ == "__main__":
    main()
