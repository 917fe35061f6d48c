"""Phase A of Lite-LLM4Rec on ml-100k: time to 98 % of its best validation NDCG@10, and time of its labels for all training rows.

`make bench-full`, or `python -m tests.bench.phase_a`; a quarter of an hour. Our defaults (all-MiniLM-L6-v2 at both levels, its item
table read from nothing) with two layers and with one. Time is that of `fit`: reading the items, training, validation, checkpoints.
Floor of an epoch: its matrix products timed again at their own shapes, and one read and one write of all scores (tests/bench/epoch.py;
attention's backward pass is not among them). Peer of the labels: a SASRec of width 64.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from recbole.data import data_preparation
from recbole.utils import get_model, init_seed

from recbole_llm.artifacts import write_json
from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset
from recbole_llm.knowledge import Knowledge
from recbole_llm.trainer import trainer_class
from tests.bench.epoch import NotesProducts, floor, seconds

RESULTS = Path(__file__).parent / "phase_a.json"
SHARE = 0.98


def prepared(model: str, folder: str, **more):
    """Training and validation loaders, model and trainer."""
    settings = {"show_progress": False, "state": "ERROR", "checkpoint_dir": folder, "seed": 2020} | more
    config = Config(model, "ml-100k", None, settings, read_argv=False)
    init_seed(2020, True)
    train, valid, _ = data_preparation(config, create_dataset(config))
    init_seed(2020, True)
    network = get_model(model)(config, train._dataset)
    return train, valid, network, trainer_class(config)(config, network)


def label(model, dataset, folder: Path) -> float:
    """Seconds in which a model labels all training rows with ten candidates each."""
    rows = torch.arange(len(dataset))
    options = {"history": 10, "shard_rows": 64, "overlap": 10, "provenance": {}, "progress": False}
    return seconds(lambda: Knowledge.build(model.eval(), dataset, rows, 10, folder, options))


def measure(layers: int, epochs: int) -> dict:
    """The curve of one training, its labels, and an epoch of it against the floor."""
    with tempfile.TemporaryDirectory() as folder:
        more = {"lite_rec_layers": layers, "epochs": epochs, "stopping_step": epochs}
        train, valid, model, trainer = prepared("LiteLLM4Rec", folder, **more)
        curve, began = [], perf_counter()
        trainer.fit(
            train,
            valid,
            callback_fn=lambda epoch, score: curve.append(
                {"since start": perf_counter() - began, "valid ndcg@10": score}
            ),
        )
        labelled = label(model, train._dataset, Path(folder) / "lite")
        _, _, peer, _ = prepared("SASRec", folder)
        of_peer = label(peer, train._dataset, Path(folder) / "sasrec")
        with NotesProducts() as noted:
            trainer._train_epoch(None, 0)
        epoch = seconds(lambda: trainer._train_epoch(None, 0))
        lowest = floor(trainer, noted.products)
    best = max(point["valid ndcg@10"] for point in curve)
    reached = next(point["since start"] for point in curve if point["valid ndcg@10"] >= SHARE * best)
    return {
        "curve": curve, "best": best, "seconds to 98 %": reached, "rows": len(train._dataset), "label": labelled,
        "label by SASRec-64": of_peer, "epoch": epoch, "epoch / floor": epoch / (lowest["products"] + lowest["scores"]),
    }  # fmt: skip


def main() -> None:
    """Measure both depths, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=16)
    asked = parser.parse_args()
    results = {}
    for layers in (2, 1):
        found = results[layers] = measure(layers, asked.epochs)
        print(
            f"{layers} layers: validation NDCG@10 {found['best']:.5f} at best, 98 % of it after {found['seconds to 98 %']:.0f} s"
        )
        print(f"  an epoch {found['epoch']:.1f} s, {found['epoch / floor']:.2f} of the floor")
        times = f"{found['label']:.1f} s (SASRec-64 {found['label by SASRec-64']:.1f} s)"
        print(f"  labels of {found['rows']} rows {times}", flush=True)
    write_json(RESULTS, {"epochs": asked.epochs, "threads": torch.get_num_threads(), "layers": results})


if __name__ == "__main__":
    main()
