"""The catalogue of tests/bench/million.py: what is generated lies as far from the seeds as they do from each other."""

import torch
from torch.nn import functional

from tests.bench import million


def titles(n: int = 500, width: int = 24) -> torch.Tensor:
    """Unit vectors in groups, as titles come."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, width, generator=generator)
    noise = torch.randn(n, width, generator=generator)
    return functional.normalize(centres[torch.arange(n) % 20] + 0.5 * noise, dim=1)


def test_neighbours_are_the_nearest_others():
    seeds = titles()
    near, gap = million.neighbours(seeds)
    distance = torch.cdist(seeds, seeds).fill_diagonal_(torch.inf)
    expected = distance.topk(million.NEAR, largest=False)
    assert torch.equal(near, expected.indices)
    torch.testing.assert_close(gap, expected.values[:, 0], atol=1e-4, rtol=1e-4)


def test_generated_vectors_are_as_far_from_the_seeds_as_seeds_are_from_each_other():
    seeds = titles()
    near, gap = million.neighbours(seeds)
    noise = million.fitting_noise(seeds, near, gap)
    made = million.catalogue(seeds, near, gap, noise, 3500)[501:]
    torch.testing.assert_close(made.norm(dim=1), torch.ones(3000))
    median = million.nearest(made, seeds, 1)[1].median()
    assert abs(median / gap.median() - 1) < 0.05
    without = million.nearest(million.catalogue(seeds, near, gap, 0.0, 3500)[501:], seeds, 1)[1].median()
    assert without < 0.8 * gap.median(), "interpolation alone comes too near"


def test_the_catalogue_is_the_padding_then_the_seeds_then_the_same_vectors_each_time(monkeypatch):
    seeds = titles()
    near, gap = million.neighbours(seeds)
    items = million.catalogue(seeds, near, gap, 1.0, 1200)
    assert items.shape == (1201, 24)
    assert not items[0].any() and torch.equal(items[1:501], seeds)
    assert torch.equal(items, million.catalogue(seeds, near, gap, 1.0, 1200))
    assert len(items[1:].unique(dim=0)) == 1200
    monkeypatch.setattr(million, "AT_A_TIME", 300)
    assert len(million.catalogue(seeds, near, gap, 1.0, 1200)[1:].unique(dim=0)) == 1200, "no part repeats another"


def test_queries_that_are_held_out_are_no_items():
    vectors = titles()
    queries, seeds = million.held_out(vectors, 100)
    assert len(queries) == 100 and len(torch.cat([queries, seeds]).unique(dim=0)) == 500
    near, gap = million.neighbours(seeds)
    items = million.catalogue(seeds, near, gap, 1.0, 900)
    assert million.nearest(queries, items[1:], 1)[1].min() > 0.01
    assert torch.equal(million.held_out(vectors, 100)[0], queries)


def test_of_equal_vectors_the_first_stays():
    vectors = titles(1500)
    again = torch.cat([vectors, functional.normalize(vectors[[3, 1400]] + 1e-6, dim=1), vectors[:1]])
    assert torch.equal(million.different(again), vectors)


def test_recall_is_the_share_of_the_exact_lists():
    assert million.recall(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[2, 1], [3, 4]])) == 0.75


def test_an_index_is_measured_beside_the_exact_one():
    seeds = titles()
    near, gap = million.neighbours(seeds)
    items = million.catalogue(seeds, near, gap, 1.0, 2000)
    measured = million.side("ivfpq", items, seeds[:50], million.Grounder().fit(items))
    assert measured["factory"] == "IVF51,PQ8x4fs,RFlat"
    assert measured["recall@10"] > 0.8
    assert measured["exact / approximate"] > 0 and len(measured["turns, ms a query"]["ivfpq"]) == million.TURNS
