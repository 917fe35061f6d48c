"""What the loss at every position costs or gains in quality: RecBole's loop against ours, each until it stops improving.

`make bench-full`; resumable. ml-100k, L = 20, the same model class, hyper-parameters, split and early stopping; only where the
loss stands differs. RecBole's side is its own loop on its own rows (`positions: last`, number for number RecBole's Trainer, by
test), its epochs counted in full.
"""

import argparse
import logging
from pathlib import Path
from time import perf_counter

from recbole.data import data_preparation
from recbole.utils import get_model, init_seed

from recbole_llm.artifacts import read_json, write_json
from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset
from recbole_llm.report import paired_gain, row_metric
from recbole_llm.trainer import SequenceTrainer

SETTINGS = {
    "MAX_ITEM_LIST_LENGTH": 20, "train_batch_size": 2048, "learning_rate": 1e-3, "epochs": 300, "stopping_step": 10,
    "hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.5, "show_progress": False, "state": "INFO",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}  # fmt: skip
RESULTS = Path(__file__).parent / "convergence.json"
SIDES = {"RecBole's loop": "last", "ours": "all"}


def converged(positions: str, seed: int, threads: int, folder: Path) -> dict:
    """Train one side to its early stop, or take it from its folder: epochs, seconds, validation and test scores, ranks."""
    folder = folder / f"{positions}-{seed}"
    done = folder / "result.json"
    if done.exists():
        return read_json(done)
    settings = SETTINGS | {"positions": positions, "seed": seed, "threads": threads}
    config = Config("SASRec", "ml-100k", None, settings, read_argv=False)
    init_seed(seed, True)
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(seed, True)
    model = get_model("SASRec")(config, train._dataset)
    trainer = SequenceTrainer(config, model)
    trainer.keep_in(folder)
    began = perf_counter()
    seen = perf_counter()

    def tell(epoch, score):
        nonlocal seen
        now = perf_counter()
        logging.getLogger().info(f"{positions} seed {seed} epoch {epoch}: NDCG@10 {score:.5f} ({now - seen:.1f} s)")
        seen = now

    best, _ = trainer.fit(train, valid, callback_fn=tell)
    seconds = perf_counter() - began
    metrics = trainer.evaluate(test)
    result = {
        "positions": positions, "seed": seed, "threads": threads, "epochs": len(trainer.train_loss_dict),
        "seconds of the last process": seconds, "valid ndcg@10": best, "test": dict(metrics), "ranks": trainer.ranks,
    }  # fmt: skip
    write_json(done, result)
    return result


def main() -> None:
    """Train both sides for every seed, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("saved/bench/convergence"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[2020])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=["last", "all"], default=["last", "all"])
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    rows = []
    for seed in asked.seeds:
        sides = {
            name: converged(positions, seed, asked.threads, asked.folder)
            for name, positions in SIDES.items()
            if positions in asked.sides
        }
        for name, side in sides.items():
            print(
                f"seed {seed}  {name:15s} {side['epochs']:4d} epochs  valid {side['valid ndcg@10']:.4f}  "
                f"test NDCG@10 {side['test']['ndcg@10']:.4f}"
            )
        if len(sides) == 2:
            theirs, ours = (row_metric(sides[name]["ranks"], "ndcg", 10) for name in SIDES)
            gain, low, high = paired_gain(ours, theirs)
            print(
                f"seed {seed}  ours against RecBole's loop: {gain:+.1%} (95 %, paired over users: {low:+.1%} to {high:+.1%})"
            )
            rows.append({"seed": seed, "gain": gain, "low": low, "high": high, "sides": sides})
    if rows:
        write_json(RESULTS, {"settings": SETTINGS, "seeds": rows})


if __name__ == "__main__":
    main()
