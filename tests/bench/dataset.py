"""Memory and time of a data set of sequences as ratios within one run: against RecBole's own and against the floor.

`python -m tests.bench.dataset` or `make bench`. Sides take turns, each in a process of its own, since a process's peak
of memory never falls. Peer: RecBole's SequentialDataset. Floor: pandas' C parser reads the file once, and one sort.
Memory is what the data set adds to the process after all imports.
"""

import argparse
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path
from time import perf_counter

import pandas as pd
import recbole.data
import torch
from recbole.utils import init_seed

from recbole_llm.artifacts import write_json
from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset

DATASET, LENGTH = "ml-1m", 200
SETTINGS = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "MAX_ITEM_LIST_LENGTH": LENGTH,
    "train_neg_sample_args": None,
    "state": "error",
}
SIDES = ("RecBole's SequentialDataset (peer)", "FlatSequentialDataset", "parse once, sort once (floor)")
TARGET = {"peak_mb": 20, "build_s": 20}
RESULTS = Path(__file__).parent / "dataset.json"


def measure(side: str, data_path: str) -> dict[str, float | str]:
    """Read, build and load the data set as one side does it, in this process."""
    config = Config("SASRec", DATASET, None, SETTINGS | {"data_path": data_path}, read_argv=False)
    init_seed(config["seed"], config["reproducibility"])
    file = Path(data_path, DATASET, f"{DATASET}.inter")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    began = perf_counter()
    if side == SIDES[2]:
        names = ["user_id:token", "item_id:token", "timestamp:float"]
        frame = pd.read_csv(file, sep="\t", usecols=names, dtype=dict(zip(names, (str, str, float), strict=True)))
        read = perf_counter() - began
        frame = frame.sort_values([names[0], names[2]], kind="stable")
        return {"read_s": read, "build_s": perf_counter() - began - read} | memory(before)
    dataset = (recbole.data.create_dataset if side == SIDES[0] else create_dataset)(config)
    read, build = perf_counter() - began, dataset.build
    seconds = []

    def timed():
        began = perf_counter()
        try:
            return build()
        finally:
            seconds.append(perf_counter() - began)

    dataset.build = timed
    train_data, *_ = recbole.data.data_preparation(config, dataset)
    figures = {"read_s": read, "build_s": seconds[0], "all_s": perf_counter() - began} | memory(before)
    began, digest = perf_counter(), hashlib.sha256()
    for batch in islice(train_data, 20):
        for name in batch.columns:
            digest.update(batch[name].numpy().tobytes())
    return figures | {"20_batches_s": perf_counter() - began, "digest": digest.hexdigest()}


def memory(before: int) -> dict[str, float]:
    """Peak of memory of this process above `before` bytes."""
    return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before / 2**20}


def main() -> None:
    """Print the table and write the JSON, or, for one side, print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", default="../shared/data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.side:
        print(json.dumps(measure(asked.side, asked.data_path)))
        return
    if not Path(asked.data_path, DATASET, f"{DATASET}.inter").is_file():
        print(f"Skipped: there is no {DATASET}/{DATASET}.inter in {asked.data_path}. Set --data_path.")
        return
    runs = {side: [] for side in SIDES}
    for _ in range(asked.rounds):
        for side in SIDES:
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "tests.bench.dataset",
                "--side",
                side,
                "--data_path",
                asked.data_path,
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    middle = {
        side: {key: statistics.median(run[key] for run in figures) for key in figures[0] if key != "digest"}
        for side, figures in runs.items()
    }
    peer, ours = middle[SIDES[0]], middle[SIDES[1]]
    same = len({run["digest"] for side in SIDES[:2] for run in runs[side]}) == 1
    print(f"{DATASET}, histories of {LENGTH} items, 1 thread, median of {asked.rounds} processes a side:")
    print(f"  {'':36s} {'read':>8s} {'build':>9s} {'20 batches':>11s} {'peak memory':>12s}")
    for side, each in middle.items():
        batches = f"{each['20_batches_s']:9.2f} s" if "20_batches_s" in each else ""
        print(f"  {side:36s} {each['read_s']:6.2f} s {each['build_s']:7.2f} s {batches:>11s} {each['peak_mb']:9.0f} MB")
    ratios = {key: peer[key] / ours[key] for key in ("read_s", *TARGET, "20_batches_s")}
    for key, ratio in ratios.items():
        wanted = f" (target {TARGET[key]})" if key in TARGET else ""
        print(f"  {key}: RecBole's is {ratio:.2f} times ours{wanted}")
    floor = ours["peak_mb"] / middle[SIDES[2]]["peak_mb"]
    print(
        f"  peak_mb: ours is {floor:.2f} times the floor; the first 20 training batches are {'equal' if same else 'NOT EQUAL'}"
    )
    write_json(
        RESULTS,
        {
            "dataset": DATASET,
            "length": LENGTH,
            "rounds": asked.rounds,
            "median": middle,
            "peer_over_ours": ratios,
            "target": TARGET,
            "ours_over_floor": {"peak_mb": floor},
            "same_batches": same,
        },
    )


if __name__ == "__main__":
    main()
