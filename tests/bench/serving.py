"""Serving speed of a distilled student as ratios within one run: against the plain student and against the floor.

`make bench`. Sides take turns, batch by batch, in one process, so that other load falls on all of them alike.
Peer: RecBole's own SASRec of the same width. Floor: the final matrix product of states with the item table alone.
"""

import json
import statistics
from pathlib import Path
from time import perf_counter

import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model

from recbole_llm.config import Config

SETTINGS = {"show_progress": False, "state": "error", "distill_ranking": "none", "distill_embedding": "tied"}
ROUNDS = 10
RESULTS = Path(__file__).parent / "serving.json"


def sides():
    """What is compared: name -> a function that ranks one batch; and the batch."""
    config = Config("DLLM2Rec", "ml-100k", None, SETTINGS, read_argv=False)
    train_data, _, test_data = data_preparation(config, create_dataset(config))
    batch = test_data._dataset[torch.arange(512)]
    dataset = train_data._dataset
    plain = get_model("SASRec")(config, dataset).eval()
    taught = get_model("DLLM2Rec")(config, dataset)
    taught.teach(torch.randn(dataset.item_num, 576), seed=0)
    folded = get_model("DLLM2Rec")(config, dataset)
    folded.load_state_dict(taught.folded_state())
    states, table = torch.randn(len(batch), 64), torch.randn(dataset.item_num, 64)
    return {
        "SASRec (peer)": lambda: plain.full_sort_predict(batch),
        "distilled, as saved": lambda: folded.eval().full_sort_predict(batch),
        "distilled, before folding": lambda: taught.eval().full_sort_predict(batch),
        "scores alone (floor)": lambda: states @ table.T,
    }


@torch.no_grad()
def main() -> None:
    """Print the table and write the JSON."""
    compared = sides()
    seconds = {name: [] for name in compared}
    for turn in range(ROUNDS + 5):
        for name, rank in compared.items():
            began = perf_counter()
            rank()
            if turn >= 5:  # the first turns warm up
                seconds[name].append(perf_counter() - began)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    peer = middle["SASRec (peer)"]
    print(f"Ranking 512 histories of ml-100k, {torch.get_num_threads()} threads, median of {ROUNDS} rounds:")
    for name, median in middle.items():
        print(f"  {name:28s} {median * 1e3:8.2f} ms   {median / peer:6.3f} of the peer")
    RESULTS.write_text(
        json.dumps(
            {
                "milliseconds": {n: m * 1e3 for n, m in middle.items()},
                "of_peer": {n: m / peer for n, m in middle.items()},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
