"""How long until the validation NDCG@10 is reached that RecBole's loop has after five of its epochs.

`make bench-full`; resumable. ml-100k, L = 50, SASRec with RecBole's own hyper-parameters; RecBole's Trainer as it is, each of its
epochs kept with its checkpoint, then ours from the start. Time is that of `fit`: training, validation and checkpoints.
"""

import argparse
import logging
import os
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import torch
from recbole.data import data_preparation
from recbole.data.dataset import SequentialDataset
from recbole.trainer import Trainer
from recbole.utils import get_model, init_seed

from recbole_llm.artifacts import read_json, write_json
from recbole_llm.config import Config
from recbole_llm.trainer import SequenceTrainer
from tests.bench.epoch import SETTINGS

RESULTS = Path(__file__).parent / "time_to.json"
EPOCHS, SEED = 5, 2020


class Reached(Exception):
    """The score is there; nothing more has to be measured."""


def prepared(**more):
    """Config, loaders and model of one side."""
    config = Config("SASRec", "ml-100k", None, SETTINGS | {"seed": SEED, "state": "INFO"} | more, read_argv=False)
    init_seed(SEED, True)
    loaders = data_preparation(config, SequentialDataset(config))
    init_seed(SEED, True)
    return config, loaders, get_model("SASRec")(config, loaders[0]._dataset)


def recbole(folder: Path) -> list[dict]:
    """Seconds and validation score of RecBole's first epochs; those on disk are not repeated."""
    file, kept = folder / "recbole.json", str(folder / "recbole.pth")
    epochs = read_json(file)["epochs"] if file.exists() else []
    if len(epochs) >= EPOCHS:
        return epochs
    config, (train, valid, _), model = prepared(epochs=EPOCHS, stopping_step=EPOCHS)
    trainer = Trainer(config, model)
    if epochs:
        trainer.resume_checkpoint(kept)
        trainer.start_epoch = len(epochs)
    trainer.saved_model_file = str(folder / "best.pth")
    began = perf_counter()

    def note(epoch, score):
        nonlocal began
        epochs.append({"epoch": epoch, "seconds": perf_counter() - began, "valid ndcg@10": float(score)})
        trainer._save_checkpoint(epoch, verbose=False, saved_model_file=kept + ".new")
        os.replace(kept + ".new", kept)
        write_json(file, {"epochs": epochs})
        logging.info(f"RecBole, epoch {epoch}: {epochs[-1]['seconds']:.1f} s, NDCG@10 {score:.5f}")
        began = perf_counter()

    with torch.autograd.set_detect_anomaly(True):  # as RecBole's import of sine.py leaves it
        trainer.fit(train, valid, callback_fn=note)
    return epochs


def ours(target: float) -> list[dict]:
    """Seconds since the start and validation score of each of our epochs, until the target is reached."""
    config, (train, valid, _), model = prepared(epochs=300, stopping_step=20)
    trainer = SequenceTrainer(config, model)
    epochs, began = [], perf_counter()

    def note(epoch, score):
        epochs.append({"epoch": epoch, "since start": perf_counter() - began, "valid ndcg@10": float(score)})
        logging.info(f"ours, epoch {epoch}: {epochs[-1]['since start']:.1f} s, NDCG@10 {score:.5f}")
        if score >= target:
            raise Reached

    with suppress(Reached):
        trainer.fit(train, valid, callback_fn=note)
    return epochs


def main() -> None:
    """Measure both sides, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("saved/bench/time_to"))
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    asked.folder.mkdir(parents=True, exist_ok=True)
    theirs = recbole(asked.folder)
    target, needed = theirs[-1]["valid ndcg@10"], sum(epoch["seconds"] for epoch in theirs)
    found = ours(target)
    reached = found[-1]["valid ndcg@10"] >= target
    took = found[-1]["since start"]
    print(f"SASRec, ml-100k, L=50, {torch.get_num_threads()} threads, validation NDCG@10 {target:.5f}:")
    print(f"  RecBole {needed:8.1f} s, {len(theirs)} epochs")
    print(f"  ours    {took:8.1f} s, {len(found)} epochs" + ("" if reached else ", NOT reached"))
    print(f"  RecBole / ours: {needed / took:.1f}")
    sides = {"RecBole": theirs, "ours": found, "ratio": needed / took}
    write_json(RESULTS, {"target": target, "reached": reached, "threads": torch.get_num_threads()} | sides)


if __name__ == "__main__":
    main()
