"""Grounding: FAISS against brute force, and BIGRec's re-weighting against numbers worked out by hand."""

import copy
import logging
import math
import sys

import faiss
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm import grounding
from recbole_llm.grounding import Grounder, best_gamma, min_max, popularity_weight, reweight


def points(n: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@given(st.integers(2, 40), st.integers(1, 30), st.integers(1, 9), st.integers(0, 99))
def test_l2_scores_are_minus_the_distances_of_brute_force(n_items, rows, width, seed):
    items, texts = points(n_items, width, seed), points(rows, width, seed + 1)
    scores = Grounder("l2").fit(items).scores(texts)
    expected = -torch.cdist(texts, items, compute_mode="donot_use_mm_for_euclid_dist")
    assert scores.shape == (rows, n_items)
    assert torch.isneginf(scores[:, 0]).all()
    torch.testing.assert_close(scores[:, 1:], expected[:, 1:], atol=1e-5, rtol=1e-5)


@given(st.integers(2, 40), st.integers(1, 30), st.integers(0, 99))
def test_cosine_scores_are_cosines(n_items, rows, seed):
    items, texts = points(n_items, 7, seed), points(rows, 7, seed + 1)
    scores = Grounder("cosine").fit(items).scores(texts)
    expected = torch.nn.functional.cosine_similarity(texts.unsqueeze(1), items.unsqueeze(0), dim=2)
    torch.testing.assert_close(scores[:, 1:], expected[:, 1:], atol=1e-5, rtol=1e-5)


def test_the_score_is_a_distance_and_not_its_square():
    items = torch.tensor([[9.0, 9.0], [0.0, 0.0], [3.0, 4.0]])
    scores = Grounder("l2").fit(items).scores(torch.zeros(1, 2))
    assert scores.tolist() == [[-math.inf, 0.0, -5.0]]


def test_scores_do_not_depend_on_the_other_rows_of_the_batch():
    grounder = Grounder("l2").fit(points(50))
    texts = points(70, seed=1)
    alone = torch.cat([grounder.scores(text.unsqueeze(0)) for text in texts])
    assert torch.equal(alone, grounder.scores(texts))


def test_a_text_that_equals_a_title_has_distance_zero_even_with_huge_dimensions():
    items = points(401, 2100)
    items[:, 3] += 300
    texts = items[1:]
    grounder = Grounder("l2").fit(items)
    own = torch.arange(1, 401).unsqueeze(1)
    # so many and so wide that FAISS would take its inexact way through BLAS
    assert grounder.scores(texts).gather(1, own).abs().max() == 0
    found, score = grounder.search(texts, 1)
    assert torch.equal(found, own)
    assert score.abs().max() == 0


@pytest.mark.parametrize("metric", grounding.METRICS)
@pytest.mark.parametrize("index", grounding.INDEXES)
def test_search_agrees_with_scores_and_never_finds_padding(metric, index):
    items, texts = points(300), points(40, seed=1)
    items[0] = texts[0]
    grounder = Grounder(metric, index).fit(items)
    found, score = grounder.search(texts, 5)
    scores = grounder.scores(texts)
    assert found.dtype == torch.int64
    assert (found > 0).all()
    torch.testing.assert_close(score, scores.gather(1, found), atol=1e-5, rtol=1e-5)
    assert (score.diff(dim=1) <= 0).all()
    agreement = (found.unsqueeze(2) == scores.topk(5).indices.unsqueeze(1)).any(2).float().mean()
    assert agreement == 1 if index == "exact" else agreement > 0.8


def test_the_score_of_an_item_is_that_of_the_search():
    items, texts = points(300), points(40, seed=1)
    for metric in grounding.METRICS:
        grounder = Grounder(metric).fit(items)
        found, score = grounder.search(texts, 7)
        assert torch.equal(grounder.score_of(texts, found), score)


def test_item_zero_has_no_score():
    for metric in grounding.METRICS:
        score = Grounder(metric).fit(points(50)).score_of(points(2), torch.tensor([[0, 3], [4, 0]]))
        assert torch.isneginf(score).tolist() == [[True, False], [False, True]]


def test_what_all_items_have_in_common_hides_no_neighbour():
    """Products of matrices alone would lose one neighbour of thirty here."""
    items, texts = points(2001, 64) + 3000, points(200, 64, seed=1) + 3000
    found, score = Grounder("l2").fit(items).search(texts, 10)
    exact = -torch.cdist(texts.double(), items[1:].double())
    assert torch.equal(found, exact.topk(10).indices + 1)
    assert torch.allclose(score.double(), exact.topk(10).values, atol=1e-3)


def test_neighbours_that_quick_distances_confuse_are_told_apart(monkeypatch):
    items, texts = points(401, 2100), points(30, 2100, seed=1)
    grounder = Grounder("l2").fit(items)
    quick = grounder._found

    def shuffled(index, vectors, k, direct=True):
        found, score = quick(index, vectors, k, direct)
        return found.flip(1), score  # as if the order of the quick ones were worth nothing

    expected = grounder.search(texts, 5)
    monkeypatch.setattr(grounder, "_found", shuffled)
    assert torch.equal(grounder.search(texts, 5)[0], expected[0])


def test_equal_items_come_in_the_order_of_their_ids_and_short_lists_end_in_item_zero():
    items = torch.tensor([[0.0], [2.0], [1.0], [1.0], [1.0]])
    found, score = Grounder("l2").fit(items).search(torch.tensor([[1.0]]), 6)
    assert found.tolist() == [[2, 3, 4, 1, 0, 0]]
    assert score.tolist() == [[0.0, 0.0, 0.0, -1.0, -math.inf, -math.inf]]


def test_half_precision_vectors_with_gradient_are_taken():
    items = points(10).to(torch.bfloat16).requires_grad_()
    scores = Grounder("l2").fit(items).scores(items[1:3])
    assert scores.argmax(dim=1).tolist() == [1, 2]


def test_an_approximate_index_tells_its_measured_recall(monkeypatch, caplog):
    items = points(3000, 24)
    monkeypatch.setitem(grounding.INDEXES, "hnsw", ("HNSW4,Flat", "efSearch=1"))
    with caplog.at_level(logging.INFO):
        grounder = Grounder("l2", "hnsw").fit(items)
    assert 0 < grounder.recall < 0.95
    assert f"{grounder.recall:.4f} of the exact 20" in caplog.text
    texts = points(200, 24, seed=5)
    found, _ = grounder.search(texts, 20)
    true = grounder.scores(texts).topk(20).indices
    assert abs((found.unsqueeze(2) == true.unsqueeze(1)).any(2).float().mean().item() - grounder.recall) < 0.2
    again = Grounder("l2", "hnsw").fit(items)
    assert torch.equal(again.search(texts, 20)[0], found)


def test_an_exact_index_has_recall_one_and_logs_none(caplog):
    with caplog.at_level(logging.INFO):
        assert Grounder().fit(points(100)).recall == 1
    assert "nearest items" not in caplog.text


def test_the_recipe_follows_the_catalogue():
    assert grounding.recipe("ivf", 90_000, 384) == ("IVF1200,Flat", "nprobe=16", 256 * 1200)
    factory, parameters, taught = grounding.recipe("ivfpq", 1_000_000, 384)
    assert factory == "IVF2000,PQ128x4fs,RFlat"
    assert parameters == "nprobe=285,k_factor_rf=20"
    assert taught == 128 * 2000
    # parts divide the width, lists have enough to learn from
    assert grounding.recipe("ivfpq", 1000, 7)[0] == "IVF25,PQ1x4fs,RFlat"
    assert grounding.recipe("ivfpq", 700, 64)[0] == "IVF17,PQ16x4fs,RFlat"
    assert grounding.recipe("ivfpq", 30, 1)[0] == "IVF1,PQ1x4fs,RFlat"


@pytest.mark.parametrize("metric", grounding.METRICS)
def test_items_told_by_four_bits_a_part_are_found_and_scored_exactly(metric):
    groups = 3 * points(30, 48, seed=2)
    items = points(4000, 48) + groups[torch.arange(4000) % 30]
    texts = points(40, 48, seed=1) + groups[torch.arange(40) % 30]
    grounder = Grounder(metric, "ivfpq").fit(items)
    # twenty times the larger number is more than there are
    for k in (10, 300):
        found, score = grounder.search(texts, k)
        scores = grounder.scores(texts)
        torch.testing.assert_close(score, scores.gather(1, found), atol=1e-5, rtol=1e-5)
        agreement = (found.unsqueeze(2) == scores.topk(k).indices.unsqueeze(1)).any(2).float().mean()
        assert agreement > 0.9
    assert 0.8 < grounder.recall <= 1
    assert torch.equal(Grounder(metric, "ivfpq").fit(items).search(texts, 300)[0], found)
    assert torch.equal(torch.cat([grounder.search(text.unsqueeze(0), 300)[0] for text in texts]), found)


def test_a_catalogue_too_small_for_four_bits_a_part_is_searched_exactly_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        grounder = Grounder(index="ivfpq").fit(points(300))
    assert "ground_index=ivfpq: 299 items are too few" in caplog.text
    assert grounder.recall == 1
    texts = points(20, seed=1)
    for ours, expected in zip(grounder.search(texts, 9), Grounder().fit(points(300)).search(texts, 9), strict=True):
        assert torch.equal(ours, expected)
    caplog.clear()
    Grounder(index="ivfpq").fit(points(625))
    assert "too few" not in caplog.text


def test_an_index_learns_from_an_even_sample_of_many_items(monkeypatch):
    seen = []

    class Spy:
        def train(self, vectors):
            seen.append(vectors[:, 0].tolist())

        def add(self, vectors):
            seen.append(len(vectors))

    grounder = Grounder()
    grounder.width = 1
    monkeypatch.setattr(grounder._faiss, "index_factory", lambda *_: Spy())
    vectors = torch.arange(10.0).unsqueeze(1).numpy()
    grounder._built("", vectors, 4)
    grounder._built("", vectors, 10)
    grounder._built("", vectors)
    assert seen == [[0, 3, 6, 9], 10, list(range(10)), 10, list(range(10)), 10]


@pytest.mark.parametrize("threads", [1, 2])
def test_faiss_uses_as_many_threads_as_torch_and_is_left_as_it_was(threads):
    grounder = Grounder().fit(points(30))
    seen = []

    class Spy:
        def search(self, vectors, k):
            seen.append(faiss.omp_get_max_threads())
            return grounder._exact.search(vectors, k)

    grounder._fast = Spy()
    torch.set_num_threads(threads)
    # a caller's own number for FAISS comes back afterwards
    before = (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold)
    grounder.search(points(2), 3)
    assert seen == [threads]
    assert (faiss.omp_get_max_threads(), faiss.cvar.distance_compute_blas_threshold) == before


def test_a_copy_shares_the_index():
    grounder = Grounder().fit(points(30))
    assert copy.deepcopy(grounder) is grounder


def test_bad_input_is_refused_with_what_there_is():
    with pytest.raises(ValueError, match="ground_metric=dot: no such metric; there are l2, cosine"):
        Grounder("dot")
    with pytest.raises(
        ValueError, match="ground_index=flat: no such index; there are exact, hnsw, ivf, ivfpq. Set ground_index"
    ):
        Grounder(index="flat")
    with pytest.raises(RuntimeError, match="call fit"):
        Grounder().scores(points(1))
    grounder = Grounder().fit(points(5))
    with pytest.raises(ValueError, match="shape .B, 16. needed; there is .2, 3."):
        grounder.scores(points(2, 3))
    with pytest.raises(ValueError, match="not finite"):
        grounder.search(torch.full((1, 16), torch.nan), 2)


def test_missing_faiss_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        Grounder()


def test_min_max_leaves_out_infinite_entries():
    x = torch.tensor([[math.inf, 2.0, 5.0, 8.0], [math.inf, 3.0, 3.0, 3.0]])
    assert min_max(x).tolist() == [[math.inf, 0.0, 0.5, 1.0], [math.inf, 0.0, 0.0, 0.0]]


def test_popularity_weight_of_counts_1_3_5():
    # shares 1/9, 3/9, 5/9; min-max over the items: 0, 1/2, 1; the padding's count does not matter
    torch.testing.assert_close(popularity_weight(torch.tensor([100, 1, 3, 5])), torch.tensor([0.0, 0.0, 0.5, 1.0]))
    assert popularity_weight(torch.zeros(4)).tolist() == [0.0] * 4


def test_reweight_bigrec_eq_3():
    # min-max: 0, 1/2, 1; times (1 + W) ** -2: 1.25 ** -2 = .64, 2 ** -2 = .25
    got = reweight(torch.tensor([[math.inf, 2.0, 5.0, 8.0]]), torch.tensor([0.0, 1.0, 0.25, 1.0]), 2)
    torch.testing.assert_close(got, torch.tensor([[math.inf, 0.0, 0.32, 0.25]]))
    rows = reweight(torch.tensor([[2.0, 5.0, 8.0]] * 2), torch.tensor([[1.0, 0.25, 1.0], [0.0, 0.0, 0.0]]), 2)
    torch.testing.assert_close(rows, torch.tensor([[0.0, 0.32, 0.25], [0.0, 0.5, 1.0]]))


@given(st.integers(0, 50), st.floats(0, 99))
def test_the_nearest_item_stays_first_for_every_gamma(seed, gamma):
    distances = points(4, 9, seed).abs()
    weight = torch.rand(9, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(reweight(distances, weight, gamma).argmin(1), distances.argmin(1))


def test_best_gamma_is_chosen_by_ndcg():
    distances = torch.tensor([[2.0, 5.0, 8.0]])
    weight = torch.tensor([1.0, 0.25, 1.0])
    target = torch.tensor([2])
    # gamma 0: third, 1 / log2(4); gamma 2: second, 1 / log2(3)
    assert best_gamma(distances, weight, target, [0]) == (0, pytest.approx(0.5))
    assert best_gamma(distances, weight, target, [0, 4, 2, 1.5]) == (1.5, pytest.approx(1 / math.log2(3)))
    assert best_gamma(distances, weight, target, [0], k=2) == (0, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        best_gamma(distances, weight, target, [])


def test_best_gamma_means_over_rows_and_ranks_ties_by_id():
    distances = torch.tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    _, ndcg = best_gamma(distances, torch.zeros(3), torch.tensor([1, 0]), [0])
    assert ndcg == pytest.approx((1 / math.log2(3) + 1) / 2)
