"""Rows that BIGRec labels per second, as we do it and as its authors call Hugging Face; and whether the lists are the same.

`python -m tests.bench.labelling`, half an hour on 2 cores; `--part quality --quality 1000`, an hour on one. SmolLM2-135M-Instruct, briefly
tuned so that its answers end, labels training rows of ml-100k. Peer: `generate` in batches of 8 in the order of the file, padded on the
left, 4 beams, up to 32 tokens, in float32; then the LLM's vector of what was written, torch.cdist to every item and a double argsort. Ours
is in the format that `llm_dtype: auto` takes here, and in float32 too where that is another. Sides take turns in one process. Floor: the
multiplications of the prompts' tokens that are not shared and of the answers' tokens, at the rate of a measured matrix product in the same
format. Quality: lists at equal beams and rows. Greedily the peer's way has none of our shortcuts (batches by length, the shared beginning,
rows that leave when they are complete, one answer for equal histories, vectors of titles that are known, FAISS); with 4 beams its search
goes on behind the end of a title, so that other titles may win it, and "plain" is our search on whole prompts.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import torch
import transformers
from recbole.data import data_preparation
from recbole.utils import get_model, init_seed

from recbole_llm import decoding
from recbole_llm.artifacts import read_json, write_json
from recbole_llm.backbone import working_dtype
from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset
from recbole_llm.decoding import common_prefix
from recbole_llm.hooks import replaced
from recbole_llm.knowledge import rows_to_label
from recbole_llm.labelling import Labeller, rows_of_a_shard
from recbole_llm.prompts import answer, read_answer
from recbole_llm.report import row_metric
from recbole_llm.rows import at_random
from recbole_llm.sequences import Log
from recbole_llm.tokens import padded
from recbole_llm.trainer import trainer_class

RESULTS = Path(__file__).parent / "labelling.json"
BATCH, BEAMS, LONGEST, K, TOP = 8, 4, 32, 20, 10
SHARD = rows_of_a_shard(64, 4096)


def tuned(folder: str, rows: int):
    """BIGRec on ml-100k after a short tuning, and its training split."""
    settings = {
        "show_progress": False, "state": "ERROR", "checkpoint_dir": folder, "seed": 2020, "train_rows": rows, "valid_rows": 32, "epochs": 1,
        "generate_max_new_tokens": LONGEST, "llm_dtype": "float32",
    }  # fmt: skip
    config = Config("BIGRec", "ml-100k", None, settings, read_argv=False)
    init_seed(2020, True)
    train, valid, _ = data_preparation(config, create_dataset(config))
    model = get_model("BIGRec")(config, train._dataset)
    trainer_class(config)(config, model).fit(train, valid, saved=False)
    model.item_embeddings()  # both sides have them
    return model.eval(), train._dataset


class AuthorsWay:
    """Hugging Face's `generate`, distances to all items, a double argsort."""

    def __init__(self, model, log: Log, beams: int):
        self.model, self.log, self.beams = model, log, beams
        self.items = model.item_embeddings()

    def write(self, rows: torch.Tensor) -> list[str]:
        """What the LLM writes for some rows."""
        write_in(self.model, torch.float32)
        lm, written = self.model.lm, []
        histories, _ = self.log.history(self.log.rows()[rows], self.model.history_length)
        how = transformers.GenerationConfig(
            do_sample=False, num_beams=self.beams, max_new_tokens=LONGEST, pad_token_id=lm._tokens.pad,
            eos_token_id=sorted(lm._tokens.ends),
        )  # fmt: skip
        with torch.inference_mode():
            for some in histories.split(BATCH):
                ids, mask = padded(lm._tokens.of(self.model.prompts(some)), lm._tokens.pad, lm.device, left=True)
                found = lm._writer().generate(input_ids=ids, attention_mask=mask, generation_config=how)
                written += [read_answer(lm._tokens.text(row)) for row in found[:, ids.shape[1] :].tolist()]
        return written

    def label(self, rows: torch.Tensor) -> torch.Tensor:
        """The best items of each row [R, K]."""
        vectors = self.model.encoder.embed([title or " " for title in self.write(rows)], batch_size=BATCH)
        distance = torch.cdist(vectors, self.items[1:])
        order = distance.argsort(dim=1)
        order.argsort(dim=1)  # the rank of every item, which the authors read
        return order[:, :K] + 1


def write_in(model, dtype: torch.dtype) -> None:
    """Let the LLM write in a number format from now on; it is tuned in float32."""
    if model.lm.dtype != dtype:
        model.lm.dtype, model.lm._writing = dtype, None
        model.lm._writer()


def ours(model, log: Log, rows: torch.Tensor, beams: int, dtype: torch.dtype) -> torch.Tensor:
    """The best items of each row, labelled in the shards of a Knowledge of 4,096 rows [R, K]."""
    write_in(model, dtype)
    model.config["generate_beams"] = beams
    model.shared.written.clear()
    found = {}
    for chosen, of_shard in (labeller := Labeller(model, log, rows.sort().values, K, SHARD, None)).shards():
        shard = labeller.label(chosen, of_shard)
        found |= dict(zip(shard["row"].tolist(), shard["items"], strict=True))
    return torch.stack([found[row] for row in rows.tolist()])


def seconds_of(function, *arguments):
    """Seconds, and the result."""
    began = perf_counter()
    result = function(*arguments)
    return perf_counter() - began, result


def least_seconds(model, log: Log, rows: torch.Tensor, dtype: torch.dtype) -> float:
    """What the multiplications of labelling some rows take at the rate of a matrix product of the LLM's own shape.

    Args:
        model: It has just labelled these rows.
        log: The log.
        rows: The rows.
        dtype: Number format of the product.
    """
    lm = model.lm
    histories, _ = log.history(log.rows()[rows], model.history_length)
    prompts = lm._tokens.of(model.prompts(histories))
    fresh = sum(map(len, prompts)) - common_prefix(prompts) * (len(prompts) - 1)
    # up to the quote that closes a title, where writing stops
    written = sum(len(lm._tokens.of([answer(title).rstrip("\n")])[0]) for title, _, _ in model.outputs[-len(rows) :])
    config = lm._network.config
    head = config.vocab_size * config.hidden_size
    body = sum(weight.numel() for weight in lm._network.parameters()) - head
    x = torch.randn(512, config.hidden_size, dtype=dtype)
    weight = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype).T
    rate = max(2 * x.numel() * weight.shape[1] / seconds_of(torch.mm, x, weight)[0] for _ in range(50))
    return 2 * (body * fresh + (body + head) * written) / rate


def overlap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean share of the items of one list that are in the other [R, K] each."""
    return float((first.unsqueeze(2) == second.unsqueeze(1)).any(dim=2).float().mean())


def rates(model, log: Log, few: torch.Tensor, rows: torch.Tensor, turns: int, peer: AuthorsWay) -> dict:
    """Rows per second of both sides in turns. Args: few, what the peer labels; rows, what we do."""
    default = working_dtype("auto", torch.device("cpu"))
    sides = {"ours, 4 beams": (BEAMS, default), "ours": (1, default)}
    if default != torch.float32:
        sides |= {"ours, 4 beams, float32": (BEAMS, torch.float32), "ours, float32": (1, torch.float32)}
    found: dict[str, list[float]] = {"authors, 4 beams": [], **{name: [] for name in sides}}
    floor: dict[str, list[float]] = {name: [] for name, (beams, _) in sides.items() if beams == 1}
    for turn in range(turns):
        found["authors, 4 beams"].append(len(few) / seconds_of(peer.label, few)[0])
        for name, (beams, dtype) in sides.items():
            some = rows if beams == 1 else rows[turn % 4 :: 4]
            spent, _ = seconds_of(ours, model, log, some, beams, dtype)
            found[name].append(len(some) / spent)
            if beams == 1:
                floor[name].append(spent / least_seconds(model, log, some, dtype))
        print(turn, {name: round(each[-1], 2) for name, each in found.items()}, flush=True)
    against = {
        f"{name} / authors": [one / other for one, other in zip(found[name], found["authors, 4 beams"], strict=True)]
        for name in sides
    }
    return {"rows per second": found, "against": against | {f"{name} / floor": each for name, each in floor.items()}}


def compared(lists: dict[str, torch.Tensor], targets: torch.Tensor) -> dict[str, float]:
    """Hits of each way's lists, and how much of ours' first ten is in the others'. Args: lists [R, K]; targets [R]."""
    found: dict[str, float] = {"rows": len(targets)}
    for name, items in lists.items():
        hit = items == targets.unsqueeze(1)
        rank = torch.where(hit.any(dim=1), hit.int().argmax(dim=1), -1).tolist()
        found |= {f"{metric}@{K} {name}": float(row_metric(rank, metric, K).mean()) for metric in ("recall", "ndcg")}
        if name != "ours":
            found[f"overlap with {name}"] = overlap(lists["ours"][:, :TOP], items[:, :TOP])
            found[f"equal lists, {name}"] = float((lists["ours"][:, :TOP] == items[:, :TOP]).all(dim=1).float().mean())
    return found


def compare(model, log: Log, rows: torch.Tensor, few: int, ways: list[str], peers: dict, results: dict) -> None:
    """Compare the lists of ways with ours in float32, writing each result as it is there.

    Args:
        model: It labels.
        log: The log.
        rows: What is labelled.
        few: How many of them the peer labels with 4 beams.
        ways: Of plain, authors and reduced (the format of `llm_dtype: auto`, where that is not float32).
        peers: The authors' way by its beams.
        results: What is written; what it has of other ways stays.
    """
    targets, default = log.items[log.rows()[rows]], working_dtype("auto", torch.device("cpu"))

    def say(name: str, lists: dict[str, torch.Tensor]) -> None:
        found = compared(lists, targets[: len(lists["ours"])])
        results.setdefault("quality", {}).setdefault(name, {}).update(found)
        write_json(RESULTS, results)
        print(name, found, flush=True)

    for beams, name in ((1, "1 beam"), (BEAMS, f"{BEAMS} beams")):
        own = ours(model, log, rows, beams, torch.float32)
        if "reduced" in ways and default != torch.float32:
            say(name, {"ours": own, str(default).removeprefix("torch."): ours(model, log, rows, beams, default)})
        if "plain" in ways and beams > 1:  # every prompt read whole, by `generate`, up to the title's end
            with replaced(decoding, "shared_cache", lambda *_: None):
                say(name, {"ours": own, "plain": ours(model, log, rows, beams, torch.float32)})
        if "authors" in ways:
            some = rows if beams == 1 else rows[:few]
            say(
                name if beams == 1 else f"{name}, authors",
                {"ours": own[: len(some)], "authors": peers[beams].label(some)},
            )


def main() -> None:
    """Take turns, compare the lists, write the JSON after each part, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=int, default=64, help="rows that the peer labels in a turn; ours labels eight times as many"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quality", type=int, default=256, help="rows whose lists are compared")
    parser.add_argument("--peer", type=int, default=48, help="rows of these that the peer labels with 4 beams")
    ways = ["plain", "authors", "reduced"]
    parser.add_argument("--lists", nargs="+", default=ways, choices=ways, help="what ours in float32 is compared with")
    parser.add_argument("--part", default="all", choices=["all", "rates", "quality"])
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    results: dict = read_json(RESULTS) if RESULTS.is_file() else {}
    results["threads"] = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        model, dataset = tuned(folder, 128)
        log = Log.from_dataset(dataset)
        peers = {beams: AuthorsWay(model, log, beams) for beams in (1, BEAMS)}
        if asked.part != "quality":
            rows = rows_to_label(model, at_random(log, (), 1), 8 * asked.rows)
            few = (
                rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: asked.rows]].sort().values
            )
            results |= rates(model, log, few, rows, asked.turns, peers[BEAMS])
            write_json(RESULTS, results)
            for name, values in results["against"].items():
                print(f"{name}: {', '.join(f'{value:.2f}' for value in values)}", flush=True)
        if asked.part != "rates":
            some = rows_to_label(model, at_random(log, (), 2), asked.quality)
            compare(model, log, some, asked.peer, asked.lists, peers, results)


if __name__ == "__main__":
    main()
