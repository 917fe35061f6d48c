"""Tuned baselines: SASRec and GRU4Rec with full softmax at every position, the same number of trials for each, chosen on validation.

`make tune`, or `python -m tests.bench.tune --protocols ml-1m-recbole ...`; resumable, every trial is a file. Settings are tried one
after the other (learning rate, dropout, width, layers, L), and the better value is kept, so every model and protocol costs `1 + 5`
trials of few epochs. Where users are long, a batch of 2,048 targets is a few dozen of them only; there a larger one, at twice the learning
rate, is tried after the learning rate, for one more trial. The best settings are then trained until they stop improving with every seed,
tested once, and written as `properties/tuned/<model>-<protocol>.yaml`. `--seeds` without a seed writes that file without a test, for a
benchmark to test.
"""

import argparse
import logging
import statistics
from pathlib import Path
from time import perf_counter

import torch
import yaml
from recbole.data import data_preparation
from recbole.utils import get_model, init_seed

from recbole_llm.artifacts import digest, read_json, write_json, write_text
from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset
from recbole_llm.model import PROPERTIES
from recbole_llm.trainer import SequenceTrainer

RESULTS = Path(__file__).parent / "tuned"
INTER = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
COMMON = {
    "positions": "all", "train_batch_size": 2048, "show_progress": False, "state": "WARNING", "seen_items": "keep",
    "metrics": ["Recall", "NDCG", "MRR"], "topk": [10, 20],
}  # fmt: skip
NORMALIZED = {"normalize_field": ["timestamp"]}
TABLE = {
    "val_interval": {"rating": "[3,inf)"}, "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    "unused_col": {"inter": ["rating"]}, "user_inter_num_interval": "[10,inf)", "item_inter_num_interval": "[10,inf)",
}  # fmt: skip
"""The rows of RecBole's published table: ratings from 3 up, ten or more per user and item."""
PROTOCOLS = {
    "ml-100k": {"dataset": "ml-100k", "trial_epochs": 40, "patience": 8, **INTER},
    "amazon-beauty": {"dataset": "amazon-beauty", "trial_epochs": 5, **INTER},
    "amazon-games": {"dataset": "amazon-games", "trial_epochs": 2, **INTER},
    # the ratings of RecBole's published table in the order of their times, as far as float32 tells them apart (some 5 s)
    "ml-1m-time": {"dataset": "ml-1m", "trial_epochs": 12, "final_epochs": 60, "large_batch": 8192, **TABLE, **NORMALIZED},
    # and in RecBole's own order: its float32 of unix seconds moves in steps of 64 s, in which the order of the file stands
    "ml-1m-recbole": {"dataset": "ml-1m", "chosen_under": "ml-1m-time", "final_epochs": 60, **TABLE, "normalize_field": []},
    # 999,611 interactions, seen items left out, as most papers after SASRec; settings are those chosen under the protocol above
    "ml-1m-unseen": {
        "dataset": "ml-1m", "item_inter_num_interval": "[5,inf)", "seen_items": "mask", "chosen_under": "ml-1m-time",
        "final_epochs": 60, **INTER, **NORMALIZED,
    },
}  # fmt: skip
NOT_PROTOCOL = ("show_progress", "state", "data_path", "metrics", "topk")
"""Settings of every trial that change nothing of what it finds."""
FINAL_PATIENCE = 5
SHORT = {"ml-100k", "amazon-beauty", "amazon-games"}
"""Where L = 20 is tried beside 50; elsewhere 200 is."""
START = {
    "SASRec": {
        "learning_rate": 1e-3, "hidden_dropout_prob": 0.2, "attn_dropout_prob": 0.2, "hidden_size": 64, "inner_size": 256,
        "n_layers": 2, "n_heads": 2, "MAX_ITEM_LIST_LENGTH": 50,
    },
    "GRU4Rec": {
        "learning_rate": 1e-3, "dropout_prob": 0.3, "embedding_size": 64, "hidden_size": 128, "num_layers": 1,
        "MAX_ITEM_LIST_LENGTH": 50,
    },
}  # fmt: skip


def other_values(model: str, protocol: str) -> list[dict]:
    """What is tried against the value so far, in this order; a function makes a value of the settings so far."""
    length = {"MAX_ITEM_LIST_LENGTH": 20 if protocol in SHORT else 200}
    size = PROTOCOLS[protocol].get("large_batch")
    larger = [{"train_batch_size": size, "learning_rate": lambda chosen: 2 * chosen["learning_rate"]}] if size else []
    if model == "SASRec":
        return [
            {"learning_rate": 3e-3}, *larger, {"hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.5},
            {"hidden_size": 128, "inner_size": 256}, {"n_layers": 1}, length,
        ]  # fmt: skip
    return [
        {"learning_rate": 3e-3}, *larger, {"dropout_prob": 0.5}, {"embedding_size": 128, "hidden_size": 256}, {"num_layers": 2}, length,
    ]  # fmt: skip


class Trials:
    """The trials of one model under one protocol, each kept as a file named by its settings."""

    def __init__(self, model: str, protocol: str, data_path: str, threads: int):
        self.model, self.protocol, self.data_path, self.threads = model, protocol, data_path, threads
        settings = dict(PROTOCOLS[protocol])
        self.dataset, self.trial_epochs = settings.pop("dataset"), settings.pop("trial_epochs", None)
        self.final_epochs = settings.pop("final_epochs", 100)
        self.chosen_under, self.patience = settings.pop("chosen_under", None), settings.pop("patience", 3)
        settings.pop("large_batch", None)
        self.settings = COMMON | settings | ({} if self.dataset == "ml-100k" else {"data_path": data_path})
        self.folder = RESULTS / f"{model}-{protocol}"
        self._data: tuple | None = None

    def run(self, chosen: dict, seed: int, epochs: int, patience: int, test: bool = False) -> dict:
        """Train once, or read what the same training gave: scores; curve and seconds are those of the last process."""
        of_protocol = {key: value for key, value in self.settings.items() if key not in NOT_PROTOCOL}
        how = {"settings": chosen, "seed": seed, "epochs": epochs, "patience": patience}
        key = digest({"dataset": self.dataset, "protocol": of_protocol, **how}, 10)
        file = self.folder / f"{'seed' if test else 'trial'}-{key}.json"
        if file.exists():
            return read_json(file)
        more = {"epochs": epochs, "stopping_step": patience, "seed": seed, "threads": self.threads}
        config = Config(self.model, self.dataset, None, self.settings | chosen | more, read_argv=False)
        init_seed(seed, True)
        train, valid, tests = self._loaders(config)
        init_seed(seed, True)
        model = get_model(self.model)(config, train._dataset)
        trainer = SequenceTrainer(config, model)
        trainer.keep_in(Path("saved/bench/tune") / f"{self.model}-{self.protocol}-{key}")
        curve: list[float] = []
        began = perf_counter()
        trainer.fit(train, valid, callback_fn=lambda epoch, score: curve.append(score))
        result = {
            "settings": chosen, "seed": seed, "valid ndcg@10": trainer.best_valid_score, "curve": curve,
            "epochs": len(trainer.train_loss_dict), "seconds": perf_counter() - began, "threads": torch.get_num_threads(),
        }  # fmt: skip
        if test:
            result["test"] = dict(trainer.evaluate(tests))
        write_json(file, result)
        logging.info(
            f"{self.model} {self.protocol} seed {seed} {chosen}: valid {trainer.best_valid_score:.5f}, {len(curve)} epochs, "
            f"{result['seconds']:.0f} s" + (f", test NDCG@10 {result['test']['ndcg@10']:.5f}" if test else "")
        )
        return result

    def _loaders(self, config):
        """Loaders, made anew where the length of the rows changes."""
        length = config["MAX_ITEM_LIST_LENGTH"]
        if self._data is None or self._data[0] != length:
            self._data = length, data_preparation(config, create_dataset(config))
        return self._data[1]

    def best(self) -> tuple[dict, list[dict]]:
        """Settings that did best on validation rows, and all trials; another protocol's where this one has none of its own."""
        if self.chosen_under:
            return Trials(self.model, self.chosen_under, self.data_path, self.threads).best()
        chosen, trials = dict(START[self.model]), []
        best = self.run(chosen, 2020, self.trial_epochs, self.patience)
        trials.append(best)
        for values in other_values(self.model, self.protocol):
            change = {key: value(chosen) if callable(value) else value for key, value in values.items()}
            trial = self.run(chosen | change, 2020, self.trial_epochs, self.patience)
            trials.append(trial)
            if trial["valid ndcg@10"] > best["valid ndcg@10"]:
                chosen, best = chosen | change, trial
        return chosen, trials


def main() -> None:
    """Tune and test what is asked for, and write one summary per model and protocol."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(START), choices=list(START))
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[2020, 2021, 2022])
    parser.add_argument("--data_path", default="../shared/data")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    for protocol in asked.protocols:
        for model in asked.models:
            trials = Trials(model, protocol, asked.data_path, asked.threads)
            chosen, tried = trials.best()
            tested = [trials.run(chosen, seed, trials.final_epochs, FINAL_PATIENCE, test=True) for seed in asked.seeds]
            if tested:
                print(line(model, protocol, tested))
            summary = {"chosen": chosen, "protocol": PROTOCOLS[protocol], "trials": tried, "tested": tested}
            write_json(RESULTS / f"{model}-{protocol}.json", summary)
            write_text(PROPERTIES / "tuned" / f"{model}-{protocol}.yaml", as_yaml(model, trials, chosen, tested))


def line(model: str, protocol: str, tested: list[dict]) -> str:
    """A row of README's table: mean and standard deviation over seeds."""
    cells = []
    for metric in ("recall@10", "ndcg@10", "recall@20", "ndcg@20"):
        values = [result["test"][metric] for result in tested]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4f}{spread}")
    epochs = [result.get("epochs", len(result["curve"])) for result in tested]
    seconds = statistics.mean(result["seconds"] / len(result["curve"]) for result in tested)
    cells += [f"{min(epochs)}-{max(epochs)}", f"{seconds:.0f}", str(len(tested))]
    return "| " + " | ".join([model, protocol, *cells]) + " |"


def as_yaml(model: str, trials: Trials, chosen: dict, tested: list[dict]) -> str:
    """The settings that reproduce the row, as a config file."""
    kinds = {str: "str", int: "int", float: "float", list: "list", dict: "dict"}
    tried: dict[str, set] = {}
    for change in [START[model], *other_values(model, trials.chosen_under or trials.protocol)]:
        for key, value in change.items():
            tried.setdefault(key, set()).add(chosen.get(key) if callable(value) else value)
    settings = {"model": model, "dataset": trials.dataset}
    settings |= {key: value for key, value in trials.settings.items() if key not in NOT_PROTOCOL}
    if "train_batch_size" in tried:
        tried["train_batch_size"].add(settings["train_batch_size"])
    settings |= {"epochs": trials.final_epochs, "stopping_step": FINAL_PATIENCE}
    where = f" of {trials.chosen_under}" if trials.chosen_under else ""
    lines = [
        f"# {model} under the protocol {trials.protocol}, as tests/bench/tune.py chose it on validation rows{where}."
    ]
    if tested:
        mean = statistics.mean(result["test"]["ndcg@10"] for result in tested)
        lines[0] += f" Test NDCG@10 {mean:.4f}, mean of {len(tested)} seeds."
    for key, value in (settings | chosen).items():
        why = f"Tuned on validation rows among {sorted(tried[key])}." if key in chosen else "Part of the protocol."
        flow = yaml.safe_dump({key: value}, default_flow_style=True, width=1000).strip()[1:-1]
        lines.append(f"{flow}  # ({kinds[type(value)]}) {why}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
