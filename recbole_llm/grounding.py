"""From the vector of a generated text to a score of every item, by FAISS, and BIGRec's re-weighting of the distances.

Paper: BIGRec (arXiv 2308.08434), section 3 with Eq. 3, and the authors' `adjust_pda.py` and `adjust_ci.py`. What
differs: gamma is chosen once on validation, not once per metric and cut-off. FAISS answers with squared distances; a
score here is minus the root of one.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

METRICS = ("l2", "cosine")

# FAISS factory string and search parameters; `recipe` fills in what depends on the catalogue.
INDEXES: dict[str, tuple[str, str]] = {
    "exact": ("Flat", ""),
    "hnsw": ("HNSW32,Flat", "efSearch=128"),
    "ivf": ("IVF{lists},Flat", "nprobe=16"),
    # four bits for each part of a vector, compared many items at a time in registers; the best are then told apart by their vectors
    "ivfpq": ("IVF{lists},PQ{parts}x4fs,RFlat", "nprobe={probes},k_factor_rf=20"),
}

_REFINED = ",RFlat"
"""End of a factory string whose index tells the best apart by their vectors."""
_QUERIES_AT_A_TIME = 64
_SEARCHED_AT_A_TIME = 512
_MARGIN = 16
"""Items that are looked at beyond those asked for, since the quick distances are a little off."""
_RECALL_QUERIES = 256
_LEAST_TAUGHT = 39
"""Vectors for each centroid below which FAISS warns."""
_CODEBOOK = 16
"""Centroids of a part of a vector, told by four bits."""


class Grounder:
    """All items of a catalogue as vectors, and how close a text's vector is to each.

    Dense scores are always exact: a row of them has an entry for every item anyway, so an approximate index could only
    lose. What `index` names serves `search`. Vectors are told from the items' mean, which changes no distance: hidden states of LLMs
    have a few huge dimensions that nearly all of them share, and without these products of matrices tell distances well.

    Args:
        metric: `l2` (score = -distance, not squared) or `cosine` (score = cosine of the angle).
        index: A name in INDEXES; all but `exact` are approximate, and `fit` logs and keeps their measured recall. A catalogue that is
            too small for `ivfpq` is searched exactly, which a warning says.
        recall_at: The k of that recall.

    Raises:
        ValueError: No such metric or index.
        ImportError: FAISS is not installed.
    """

    def __init__(self, metric: str = "l2", index: str = "exact", recall_at: int = 20):
        if metric not in METRICS:
            raise ValueError(
                f"ground_metric={metric}: no such metric; there are {', '.join(METRICS)}. Set ground_metric."
            )
        if index not in INDEXES:
            raise ValueError(f"ground_index={index}: no such index; there are {', '.join(INDEXES)}. Set ground_index.")
        self.metric = metric
        self.index = index
        self.recall_at = recall_at
        self.recall = 1.0
        self.n_items = 0
        self.width = 0
        self._faiss = _faiss()
        self._exact = None
        self._fast = None
        self._centre: Tensor | None = None

    def __deepcopy__(self, memo: dict) -> "Grounder":
        # RecBole's get_flops copies the whole model; the index does not change after fit
        return self

    def fit(self, item_vectors: Tensor) -> "Grounder":
        """Take the items' vectors.

        Args:
            item_vectors: [n_items, d], by internal id; row 0, the padding, is left out.

        Raises:
            ValueError: There is no item, or a vector is not finite.
        """
        if item_vectors.dim() != 2 or len(item_vectors) < 2:
            raise ValueError(f"item_vectors: shape [n_items > 1, d] needed; there is {list(item_vectors.shape)}.")
        self.n_items, self.width = item_vectors.shape
        if self.metric == "l2":
            self._centre = item_vectors[1:].detach().to("cpu", torch.float64).mean(dim=0).float()
        vectors = self._prepared(item_vectors[1:])
        self._exact = self._built("Flat", vectors)
        self._fast = self._exact
        needed = _LEAST_TAUGHT * _CODEBOOK if self.index == "ivfpq" else 0
        if len(vectors) < needed:
            logging.getLogger(__name__).warning(
                f"ground_index={self.index}: {len(vectors)} items are too few for it, it learns from {needed} at least; the search is "
                "exact instead."
            )
        elif self.index != "exact":
            factory, parameters, taught = recipe(self.index, len(vectors), self.width)
            self._fast = self._built(factory, vectors, taught)
            self._faiss.ParameterSpace().set_index_parameters(self._fast, parameters)
            self.recall = self._measured_recall(item_vectors)
            logging.getLogger(__name__).info(
                f"ground_index={self.index}: finds {self.recall:.4f} of the exact {self.recall_at} nearest items "
                f"(mean over {min(_RECALL_QUERIES, self.n_items - 1)} vectors between two items)."
            )
        return self

    def scores(self, vectors: Tensor) -> Tensor:
        """The exact score of every item, higher = closer.

        Args:
            vectors: [B, d].

        Returns:
            [B, n_items] float32 on the CPU; the padding item has -inf.
        """
        out = torch.full((len(vectors), self.n_items), -torch.inf)
        for start in range(0, len(vectors), _QUERIES_AT_A_TIME):
            chunk = vectors[start : start + _QUERIES_AT_A_TIME]
            items, score = self._found(self._exact, chunk, self.n_items - 1)
            out[start : start + len(chunk)].scatter_(1, items, score)
        return out

    def search(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest items by the chosen index, best first; among equal scores the smaller id first.

        Args:
            vectors: [B, d].
            k: Number of items.

        Returns:
            items [B, k] int64, internal ids, and score [B, k] float32. Where the index knows no more items, item 0 with
            score -inf stands.
        """
        most = min(k, self.n_items - 1)
        find = self._refined if self._fast is self._exact else self._approximate
        parts = [find(chunk, most) for chunk in vectors.split(_SEARCHED_AT_A_TIME)]
        items, score = (torch.cat(column) for column in zip(*parts, strict=True))
        short = k - items.shape[1]
        items = torch.nn.functional.pad(items, (0, short), value=0)
        score = torch.nn.functional.pad(score, (0, short), value=-torch.inf)
        by_item = items.argsort(dim=1, stable=True)
        order = by_item.gather(1, score.gather(1, by_item).argsort(dim=1, descending=True, stable=True))
        return items.gather(1, order), score.gather(1, order)

    def score_of(self, vectors: Tensor, items: Tensor) -> Tensor:
        """The exact score of some items for each vector, on the CPU, -inf of item 0 [B, K]. Args: vectors [B, d]; items [B, K]."""
        known = torch.from_numpy(self._faiss.rev_swig_ptr(self._exact.get_xb(), (self.n_items - 1) * self.width))
        known = known.view(-1, self.width)[items - 1]
        vectors = torch.from_numpy(self._prepared(vectors)).unsqueeze(1)
        cosine = self.metric == "cosine"
        score = (known * vectors).sum(dim=2) if cosine else -(known - vectors).square().sum(dim=2).sqrt()
        return score.masked_fill(items == 0, -torch.inf)

    def _refined(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of the nearest by quick distances, by exact ones; of equals the smaller id."""
        items, _ = self._found(self._fast, vectors, min(k + _MARGIN, self.n_items - 1), direct=False)
        items = items.sort(dim=1).values
        score, place = self.score_of(vectors, items).sort(dim=1, descending=True, stable=True)
        return items.gather(1, place)[:, :k], score[:, :k]

    def _approximate(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """What the approximate index finds. Which lists it looks at, quick distances may say; those of items it tells directly."""
        return self._found(self._fast, vectors, k, direct=False)

    def _found(self, index, vectors: Tensor, k: int, direct: bool = True) -> tuple[Tensor, Tensor]:
        if index is None:
            raise RuntimeError("Grounder: no items yet; call fit(item_vectors) first.")
        with _threads(self._faiss, torch.get_num_threads(), direct):
            found, place = index.search(self._prepared(vectors), k)
        items = torch.from_numpy(place).long() + 1  # FAISS says -1 for "none", which becomes the padding item
        found = torch.from_numpy(found)
        score = found if self.metric == "cosine" else -found.clamp(min=0).sqrt()
        return items, score.masked_fill(items == 0, -torch.inf)

    def _prepared(self, vectors: Tensor):
        vectors = vectors.detach().to("cpu", torch.float32)
        if vectors.dim() != 2 or vectors.shape[1] != self.width:
            raise ValueError(f"vectors: shape [B, {self.width}] needed; there is {list(vectors.shape)}.")
        if not torch.isfinite(vectors).all():
            raise ValueError("vectors: some are not finite; check the dtype of the language model that made them.")
        if self.metric == "cosine":
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        elif self._centre is not None:
            vectors = vectors - self._centre
        return vectors.contiguous().numpy()

    def _built(self, factory: str, vectors, taught: int | None = None):
        kind = self._faiss.METRIC_L2 if self.metric == "l2" else self._faiss.METRIC_INNER_PRODUCT
        index = self._faiss.index_factory(self.width, factory.removesuffix(_REFINED), kind)
        # several threads would link an HNSW graph in an order that no seed fixes; in which list an item stands, quick distances may say,
        # which build the lists of a million items in a third of the time
        with _threads(self._faiss, 1, direct=self.index != "ivfpq"):
            index.train(vectors[:: -(-len(vectors) // (taught or len(vectors)))])
            index.add(vectors)
        # the exact index has the vectors, which FAISS would keep a second time
        return self._faiss.IndexRefine(index, self._exact) if factory.endswith(_REFINED) else index

    def _measured_recall(self, item_vectors: Tensor) -> float:
        """Recall at points half-way between two items: an item itself as query would be found too easily."""
        step = max(1, (self.n_items - 1) // _RECALL_QUERIES)
        chosen = item_vectors[1::step][:_RECALL_QUERIES].float()
        queries = (chosen + chosen.roll(1, dims=0)) / 2
        k = min(self.recall_at, self.n_items - 1)
        exact, _ = self._found(self._exact, queries, k)
        fast, _ = self._approximate(queries, k)
        return (exact.unsqueeze(2) == fast.unsqueeze(1)).any(dim=2).float().mean().item()


def recipe(index: str, items: int, width: int) -> tuple[str, str, int]:
    """FAISS's factory string and search parameters of an approximate index, and of how many items at most it shall learn.

    There are about 4 * sqrt(items) lists of which few are looked up, or half as many where a seventh of them is; and as many parts of a
    vector as divide its width into pieces of three numbers or more.

    Args:
        index: A name in INDEXES.
        items: Number of items.
        width: Length of their vectors.
    """
    factory, parameters = INDEXES[index]
    # FAISS itself draws 256 vectors for each list; half of them taught as much in half the time
    times, taught = (2, 128) if index == "ivfpq" else (4, 256)
    lists = max(1, min(int(times * math.sqrt(items)), items // _LEAST_TAUGHT))
    parts = max(parts for parts in range(1, max(1, width // 3) + 1) if width % parts == 0)
    probes = max(16, lists // 7)
    return factory.format(lists=lists, parts=parts), parameters.format(probes=probes), taught * lists


def min_max(x: Tensor) -> Tensor:
    """`(x - min) / (max - min)` over the last dimension; a row of equal values becomes 0.

    Infinite entries (the padding item) take no part and stay as they are.
    """
    finite = torch.isfinite(x)
    low = torch.where(finite, x, torch.inf).amin(dim=-1, keepdim=True)
    high = torch.where(finite, x, -torch.inf).amax(dim=-1, keepdim=True)
    span = high - low
    return torch.where(finite, (x - low) / torch.where(span > 0, span, torch.ones_like(span)), x)


def popularity_weight(counts: Tensor) -> Tensor:
    """BIGRec's popularity weight W in [0, 1]: an item's share of the training interactions, min-max over the items.

    Args:
        counts: [n_items] interactions of every item in the training data; entry 0, the padding, is left out.

    Returns:
        [n_items] float32; W of the padding is 0.
    """
    counts = counts.to(torch.float32)
    share = counts[1:] / counts[1:].sum().clamp(min=1)
    return torch.cat([torch.zeros(1), min_max(share)])


def reweight(distances: Tensor, weight: Tensor, gamma: float) -> Tensor:
    """BIGRec Eq. 3: `min_max(D) * (1 + W) ** -gamma`; smaller = better, as the distances that go in.

    The nearest item of a row has min_max(D) = 0 and stays first for every gamma; only the rest is reordered.

    Args:
        distances: [B, n]; +inf for items that are no candidates.
        weight: W in [0, 1], [n] (popularity) or [B, n] (`min_max` of a recommender's scores).
        gamma: Strength; 0 leaves the order as it is.
    """
    return _weighted(min_max(distances), weight, gamma)


def best_gamma(
    distances: Tensor, weight: Tensor, target: Tensor, gammas: Sequence[float], k: int = 20
) -> tuple[float, float]:
    """The gamma whose re-weighted ranking has the highest NDCG@k; the smallest of equals.

    The authors choose on validation too, but separately for every metric and cut-off, so that one line of their tables
    mixes several rankings.

    Args:
        distances: [R, n] of validation rows.
        weight: [n] or [R, n], as for `reweight`.
        target: [R] the items that came next.
        gammas: What to try.
        k: Cut-off of NDCG.

    Returns:
        gamma and its NDCG@k.
    """
    scaled = min_max(distances)
    found = [(_ndcg(_weighted(scaled, weight, gamma), target, k), -gamma) for gamma in _some(gammas)]
    ndcg, negative = max(found)
    return -negative, ndcg


def _weighted(scaled: Tensor, weight: Tensor, gamma: float) -> Tensor:
    return torch.where(torch.isinf(scaled), scaled, scaled * (1 + weight) ** -gamma)


def _ndcg(distances: Tensor, target: Tensor, k: int) -> float:
    """NDCG@k of one relevant item per row, 1 / log2(rank + 2) with rank from 0; ties rank in the order of the ids."""
    own = distances.gather(1, target.unsqueeze(1))
    before = torch.arange(distances.shape[1]) < target.unsqueeze(1)
    rank = ((distances < own) | ((distances == own) & before)).sum(dim=1)
    gain = 1 / torch.log2(rank.to(torch.float64) + 2)
    return torch.where(rank < k, gain, torch.zeros_like(gain)).mean().item()


def _some(gammas: Iterable[float]) -> list[float]:
    gammas = list(gammas)
    if not gammas:
        raise ValueError("gammas=[]: nothing to choose from; at least one gamma is needed. Set the grid of gammas.")
    return gammas


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("Grounding needs FAISS, which is not installed: pip install faiss-cpu") from error
    return faiss


@contextmanager
def _threads(faiss: ModuleType, threads: int, direct: bool = True) -> Iterator[None]:
    """FAISS with so many threads, and with direct distances whatever the number of queries, or with quick ones.

    For many or wide queries FAISS expands ||x - y||^2 by BLAS, ten times as fast. Hidden states of LLMs have a few huge dimensions,
    and there the expansion gives a text that equals a title a distance of .45 instead of 0 (measured, norms of 300, no mean taken
    away). Threads are set and set back because FAISS may share torch's OpenMP runtime, and with it the number.
    """
    threshold, before = faiss.cvar.distance_compute_blas_threshold, faiss.omp_get_max_threads()
    faiss.cvar.distance_compute_blas_threshold = 2**31 - 1 if direct else 0
    faiss.omp_set_num_threads(threads)
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = threshold
        faiss.omp_set_num_threads(before)
