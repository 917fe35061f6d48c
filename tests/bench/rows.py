"""Which rows a teacher labels: the policies of `teacher_rows_by` at equally many rows, by the validation NDCG@10 of the student they teach.

`python -m tests.bench.rows --dataset=amazon-games --rows=2000 --seeds 2020 2021 2022 --teacher=BIGRec`; hours, resumable: teacher, labels
and students are kept in `saved` as those of any run. Every other --key=value is a setting (`--teacher_checkpoint=...` saves the training
of the teacher, which is one for all). `none` is the same student without the ranking term, to tell what labels are worth at all.
"""

import argparse
import logging
import statistics
import sys
from pathlib import Path

import torch

from recbole_llm.artifacts import read_json, write_json
from recbole_llm.config import Config
from recbole_llm.knowledge import Knowledge, Request
from recbole_llm.quick_start import load_data, refuse_early, single
from recbole_llm.rows import POLICIES

RESULTS = Path(__file__).parent / "rows.json"
METRIC = "ndcg@10"
SETTINGS = {"distill_ranking": "softmax", "valid_metric": METRIC, "show_progress": False, "state": "WARNING"}
WITHOUT = "none"


def config_of(asked: argparse.Namespace, policy: str, seed: int) -> Config:
    """The settings of one student; those of the command line win."""
    more = {"teacher": asked.teacher, "teacher_rows": asked.rows, "seed": seed}
    more |= {"distill_ranking": "none"} if policy == WITHOUT else {"teacher_rows_by": policy}
    if asked.dataset != "ml-100k":  # RecBole has this one inside its own package
        more["data_path"] = asked.data_path
    return Config("DLLM2Rec", asked.dataset, asked.config_files, SETTINGS | more)


def taught(asked: argparse.Namespace, policy: str) -> dict:
    """Scores of the students of one policy, and what their labels were."""
    valid, test = [], []
    for seed in asked.seeds:
        config = config_of(asked, policy, seed)
        if config["threads"]:
            torch.set_num_threads(config["threads"])
        data = load_data(config)
        refuse_early(config, data)
        line = single(config, data, f"{policy}, seed {seed}")
        valid.append(line.valid[METRIC])
        test.append(line.metrics[METRIC])
        logging.info(f"{policy}, seed {seed}: validation NDCG@10 {valid[-1]:.5f}, test {test[-1]:.5f}")
    if policy == WITHOUT:
        return {"valid": valid, "test": test, "rows": 0, "label seconds": 0}
    known = Knowledge.load(Request.of(config, data.train._dataset).folder).manifest
    return {"valid": valid, "test": test, "rows": known["rows"], "label seconds": known["seconds"]}


def row(policy: str, found: dict, random: dict) -> str:
    """A policy's line: mean and deviation over seeds, and the mean gain over random rows seed by seed."""
    mean = statistics.mean(found["valid"])
    spread = f" ± {statistics.stdev(found['valid']):.4f}" if len(found["valid"]) > 1 else ""
    gain = statistics.mean(one / other - 1 for one, other in zip(found["valid"], random["valid"], strict=True))
    return f"  {policy:13s} {mean:.4f}{spread}   {gain:+.1%} against random   {found['rows']} rows labelled"


def main() -> None:
    """Compare the policies, print the table, write the JSON after each of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="amazon-games")
    parser.add_argument("--data_path", default="../shared/data")
    parser.add_argument("--teacher", default="BIGRec")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[2020, 2021, 2022])
    parser.add_argument("--config_files", nargs="*", help="yaml files with further settings")
    asked, settings = parser.parse_known_args()
    sys.argv[1:] = settings  # which RecBole's Config reads
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    files = [f"--config_files {file}" for file in asked.config_files or ()]
    name = " ".join([f"{asked.dataset}, {asked.rows} rows of {asked.teacher}", *settings, *files])
    found: dict[str, dict] = {}
    for policy in (*POLICIES, WITHOUT):
        found[policy] = taught(asked, policy)
        measured = {"seeds": asked.seeds, "threads": torch.get_num_threads(), "policies": found}
        write_json(RESULTS, (read_json(RESULTS) if RESULTS.is_file() else {}) | {name: measured})
    print(f"Validation NDCG@10 of the student, {name}, seeds {asked.seeds}:")
    for policy, scores in found.items():
        print(row(policy, scores, found["random"]))


if __name__ == "__main__":
    main()
