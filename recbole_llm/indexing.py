"""Which number or path an item is written by, from its token, a seed and the training interactions; never from the order of a file.

RecBole numbers items as its files name them first, and a file sorted by user thereby names a user's next item right after the
last one: written as text, such ids give the answer away. An item's place in the result follows here from a hash of its token
(`keyed_order`) or from training interactions alone.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from sklearn.cluster import KMeans
from torch import Tensor

from recbole_llm.sequences import Log

INDEXES = ("random", "sequential", "collaborative")


def token_keys(tokens: Iterable[str]) -> Tensor:
    """A 64-bit hash of each token [n], by which rows of a saved table find the same items or users in other data."""
    hashes = [hashlib.sha256(str(token).encode()).digest()[:8] for token in tokens]
    return torch.tensor([int.from_bytes(each, "big", signed=True) for each in hashes], dtype=torch.long)


def rows_with_keys(own: Tensor, saved: Tensor) -> list[int] | None:
    """Which row of a saved table each of our keys is in [n]; None unless both have the same keys."""
    row_of = {key: row for row, key in enumerate(saved.tolist())}
    rows = [row_of.get(key, -1) for key in own.tolist()]
    return rows if min(rows) >= 0 and len(rows) == len(row_of) else None


def keyed_order(tokens: Sequence[str], seed: int) -> np.ndarray:
    """Places of the tokens in an order that follows from tokens and seed alone [n]."""
    hashes = [hashlib.sha256(f"{seed}:{token}".encode()).digest() for token in tokens]
    return np.array(sorted(range(len(hashes)), key=hashes.__getitem__), dtype=np.int64)


def numbers_in(order: np.ndarray) -> np.ndarray:
    """The number of each place, counted from 0 along `order` [n]."""
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = np.arange(len(order))
    return numbers


def walk_of(log: Log, users: Sequence[str], seed: int) -> np.ndarray:
    """Items of a log, user by user, in a keyed order of the users [N].

    Args:
        log: Training interactions.
        users: Tokens of the users by internal id.
        seed: Key of the order.
    """
    order = keyed_order([str(users[user]) for user in log.users], seed)
    return torch.cat([log.items[log.offsets[user] : log.offsets[user + 1]] for user in order]).numpy()


def sequential_numbers(walk: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Numbers given while walking through training interactions; what is not met there follows in keyed order.

    Args:
        walk: Places of the items, interaction by interaction [N].
        order: `keyed_order` of all items [n].

    Returns:
        Number of each place, from 0 [n].
    """
    first = np.full(len(order), len(walk))
    np.minimum.at(first, walk, np.arange(len(walk)))
    return numbers_in(order[np.argsort(first[order], kind="stable")])


def in_places(numbers: np.ndarray, digits: int) -> list[tuple[str, ...]]:
    """Numbers as pieces of `digits` decimal digits, all of one length.

    Pieces of different places are different words (`0:16`, `1:82`), so ids that stand one behind the other cannot run together,
    and none is the beginning of another.
    """
    base, most = 10**digits, int(numbers.max(initial=0))
    places = 1
    while most >= base**places:
        places += 1
    return [
        tuple(f"{place}:{number // base ** (places - 1 - place) % base:0{digits}d}" for place in range(places))
        for number in numbers.tolist()
    ]


def collaborative_paths(
    users: np.ndarray, items: np.ndarray, order: np.ndarray, clusters: int, group: int, seed: int
) -> list[tuple[str, ...]]:
    """Recursive spectral clustering of the items that training users have in common: a word per level and one within the group.

    Items that share no user with another one (such as those that are held out only) are a branch of their own, in keyed order.

    Args:
        users: User of each training interaction, users numbered by token [N].
        items: Place of its item [N].
        order: `keyed_order` of all items [n].
        clusters: Parts a too large group is cut into.
        group: Most items of a group that is cut no further.
        seed: Of the clustering.

    Returns:
        Path of each place; none is the beginning of another.
    """
    columns = numbers_in(order)[items]
    shape = (int(users.max(initial=-1)) + 1, len(order))
    visits = csr_matrix((np.ones(len(items)), (users, columns)), shape=shape)
    visits.data[:] = 1.0  # who met an item twice met it
    paths: list[tuple[str, ...]] = [()] * len(order)

    def cut(chosen: np.ndarray, path: tuple[str, ...]) -> None:
        if len(chosen) <= group:
            for number, column in enumerate(chosen):
                paths[order[column]] = (*path, f"item {number}")
            return
        labels = spectral_labels(visits[:, chosen], clusters, seed)
        for label in np.unique(labels):
            cut(chosen[labels == label], (*path, f"level {len(path)} group {label}"))

    cut(np.arange(len(order)), ())
    return paths


def spectral_labels(visits: csr_matrix, clusters: int, seed: int) -> np.ndarray:
    """Cluster of each column by normalised spectral clustering of the columns' co-occurrence.

    Like scikit-learn's SpectralClustering with `affinity="precomputed"`, but the matrix of co-occurrences is never written out: its
    eigenvectors need products with a vector only, which are two products with the visits.

    Args:
        visits: 0/1, sparse [U, m].
        clusters: Number of clusters; columns that occur with no other get the label `clusters`.
        seed: Of the start vector and of k-means.

    Returns:
        Labels [m]. If everything would fall into one cluster, the columns are cut into parts of like size instead.
    """
    count = np.asarray(visits.sum(axis=0)).ravel()
    degree = visits.T @ (visits @ np.ones(visits.shape[1])) - count
    linked = np.flatnonzero(degree > 0)
    labels = np.full(visits.shape[1], clusters)
    if len(linked) > clusters + 2:
        part, own, scale = visits[:, linked], count[linked], degree[linked] ** -0.5
        transposed = part.T.tocsr()

        def multiply(vector: np.ndarray) -> np.ndarray:
            scaled = scale * vector.ravel()
            return scale * (transposed @ (part @ scaled) - own * scaled)

        start = np.random.RandomState(seed).uniform(-1, 1, len(linked))
        operator = LinearOperator((len(linked), len(linked)), matvec=multiply, dtype=np.float64)
        try:
            vectors = eigsh(operator, k=clusters, which="LA", v0=start, tol=0)[1]
        except ArpackNoConvergence as stopped:
            vectors = stopped.eigenvectors
        if vectors.shape[1]:
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
            labels[linked] = KMeans(clusters, n_init=10, random_state=seed).fit_predict(vectors)
    if len(np.unique(labels)) == 1:
        labels = np.arange(len(labels)) * clusters // len(labels)
    return labels


def is_prefix_free(codes: Sequence[Sequence]) -> bool:
    """Whether no code is the beginning of another one; equal codes are each other's beginning."""
    ordered = sorted(map(tuple, codes))  # a beginning stands right before what it begins
    return all(after[: len(code)] != code for code, after in zip(ordered, ordered[1:], strict=False))


def padded_codes(codes: Sequence[Sequence[int]]) -> Tensor:
    """Codes as the rows of a table behind a row 0 of padding, filled up with 0 on the right [n + 1, L]."""
    table = torch.zeros(len(codes) + 1, max(map(len, codes)), dtype=torch.long)
    for row, code in enumerate(codes, start=1):
        table[row, : len(code)] = torch.tensor(code)
    return table
