"""An epoch of RecBole's loop, of ours, and the floor: seconds within one run, one side after the other.

`make bench`. ml-100k, L = 50, the same model class, hyper-parameters (RecBole's own) and number of targets.
Peer: RecBole's Trainer on RecBole's rows, as it is, which includes torch's anomaly detection, switched on for the whole process by
`recbole/model/sequential_recommender/sine.py`; and the same with that switched off.
Floor: the matrix products of one of our epochs, timed again at their own shapes and layouts, plus one read and one write of all
scores [targets, items].
"""

import argparse
import statistics
from collections import Counter
from pathlib import Path
from time import perf_counter

import torch
from recbole.data import data_preparation
from recbole.data.dataset import SequentialDataset
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_llm.artifacts import write_json
from recbole_llm.config import Config
from recbole_llm.losses import rows_at_a_time
from recbole_llm.trainer import SequenceTrainer

SETTINGS = {
    "MAX_ITEM_LIST_LENGTH": 50, "show_progress": False, "state": "ERROR", "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}  # fmt: skip
RESULTS = Path(__file__).parent / "epoch.json"
_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm: 2,
    _aten.mm.out: 2,
    _aten.bmm: 2,
    _aten.addmm: 3,
    _aten.addmm_: 3,
    _aten.addmm.out: 3,
    _aten.baddbmm: 3,
}


class NotesProducts(TorchDispatchMode):
    """Counts every matrix product by the shapes and strides of its two factors."""

    def __init__(self):
        super().__init__()
        self.products: Counter = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        packet = operation.overloadpacket
        if packet in PRODUCTS:
            left, right = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self.products[tuple((tuple(each.shape), each.stride()) for each in (left, right))] += 1
        return operation(*args, **(kwargs or {}))


def floor(trainer: SequenceTrainer, noted: Counter) -> dict[str, float]:
    """Seconds of an epoch's matrix products, and of one read and one write of its scores."""
    products = fastest = 0.0
    for ((left, left_stride), (right, right_stride)), count in noted.items():
        a = torch.empty_strided(left, left_stride).normal_()
        b = torch.empty_strided(right, right_stride).normal_()
        out = torch.matmul(a, b)
        times = repeated(lambda a=a, b=b, out=out: torch.matmul(a, b, out=out))
        products += count * statistics.median(times)
        fastest += count * min(times)
    targets, n_items = len(trainer.loader.log.rows()), trainer.network.n_items
    rows = rows_at_a_time(trainer.item_loss.memory, n_items, "cpu")
    scores = torch.randn(rows, n_items)
    copy = torch.empty_like(scores)
    moved = statistics.median(repeated(lambda: copy.copy_(scores)))
    return {"products": products, "products at their fastest": fastest, "scores": targets / rows * moved}


def repeated(work, repeats: int = 5) -> list[float]:
    """Seconds of some repeats, the first one apart."""
    times = []
    for _ in range(repeats + 1):
        began = perf_counter()
        work()
        times.append(perf_counter() - began)
    return times[1:]


def seconds(work) -> float:
    """How long something takes."""
    began = perf_counter()
    work()
    return perf_counter() - began


def compare(name: str, peers: bool, epochs: int) -> dict[str, float]:
    """Seconds of one epoch of each side."""
    config = Config(name, "ml-100k", None, SETTINGS, read_argv=False)

    def fresh(kind):
        init_seed(2020, True)
        model = get_model(name)(config, train._dataset)
        return kind(config, model)

    train, _, _ = data_preparation(config, SequentialDataset(config))
    ours = fresh(SequenceTrainer)
    ours._prepare(train)
    assert len(ours.loader.log.rows()) == len(train._dataset), "both sides train on the same number of targets"
    ours._train_epoch(None, 0)  # warms up
    with NotesProducts() as noted:
        ours._train_epoch(None, 0)
    rounds = []  # ours and the floor take turns: other guests of the machine come and go
    for _ in range(epochs):
        took = seconds(lambda: ours._train_epoch(None, 0))
        rounds.append({"ours": took} | {f"floor: {part}": value for part, value in floor(ours, noted.products).items()})
    sides = {side: statistics.median(each[side] for each in rounds) for side in rounds[0]}
    if peers:
        for label, anomaly in (("RecBole", True), ("RecBole, anomaly detection off", False)):
            peer = fresh(Trainer)
            with torch.autograd.set_detect_anomaly(anomaly):
                sides[label] = seconds(lambda peer=peer: peer._train_epoch(train, 0))
    return sides | {"targets": len(train._dataset)}


def main() -> None:
    """Compare both models, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["SASRec", "GRU4Rec"])
    parser.add_argument("--without-peers", action="store_true", help="only our side and the floor")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of our side, whose median counts")
    asked = parser.parse_args()
    table = {}
    for name in asked.models:
        sides = compare(name, not asked.without_peers, asked.epochs)
        lowest = sides["floor: products"] + sides["floor: scores"]
        print(
            f"{name}, ml-100k, L=50, {sides['targets']} targets, {torch.get_num_threads()} threads, seconds per epoch:"
        )
        for label, value in sides.items():
            if label != "targets":
                print(f"  {label:32s} {value:8.2f}   {value / sides['ours']:6.2f} of ours")
        fastest = sides["floor: products at their fastest"] + sides["floor: scores"]
        print(
            f"  ours against the floor: {sides['ours'] / lowest:.2f} (products at their fastest: {sides['ours'] / fastest:.2f})"
        )
        table[name] = sides | {"ours / floor": sides["ours"] / lowest}
        if not asked.without_peers:
            table[name] |= {"RecBole / ours": sides["RecBole"] / sides["ours"]}
    if not asked.without_peers:
        write_json(RESULTS, {"settings": SETTINGS, "threads": torch.get_num_threads(), "models": table})


if __name__ == "__main__":
    main()
