"""Speed of P5's beam search as ratios within one run: against Hugging Face's `generate` under the same trie, and exact scores.

Sides take turns in one process, so that other load falls on all of them alike. The peer is no straw man: it computes the encoder
once, allows tokens by tables on tensors, and keeps a cache; what it does not have is one copy of the history for all beams of a row.
Weights are random, which changes no side's work.
"""

import json
import statistics
from pathlib import Path
from time import perf_counter

import torch
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model
from transformers import LogitsProcessor, LogitsProcessorList

from recbole_llm.config import Config
from recbole_llm.model.p5 import END, P5, PAD

SETTINGS = {"show_progress": False, "state": "error"}
INDEXES = {
    "random, 2 digits": {"p5_index": "random"},
    "random, 1 digit": {"p5_index": "random", "p5_digits": 1},
    "collaborative": {"p5_index": "collaborative"},
}
ROWS, ROUNDS = 256, 5
RESULTS = Path(__file__).parent / "beams.json"


class Allowed(LogitsProcessor):
    """Lets real codes pass, by a table of which node each token leads to; behind a whole code stands the end token."""

    def __init__(self, model: P5):
        trie, vocabulary = model.trie, model.network.config.vocab_size
        self.leads = torch.zeros(len(trie.token), vocabulary, dtype=torch.long)
        for node in torch.cat(trie.inner).tolist():
            row = trie.row[node]
            there = trie.child_node[row] >= 0
            self.leads[node, trie.child_token[row][there]] = trie.child_node[row][there]
        self.barred = torch.where(self.leads > 0, 0.0, -torch.inf)
        self.barred[trie.item > 0, END] = 0.0
        self.barred[0, PAD] = -torch.inf

    def __call__(self, input_ids, scores):
        """Scores with what may not follow at -inf [rows, V]."""
        node = torch.zeros(len(input_ids), dtype=torch.long)
        for token in input_ids[:, 1:].unbind(1):
            node = self.leads[node, token]
        return scores + self.barred[node]


def generated(model: P5, batch, longest: int, **how) -> torch.Tensor:
    """What Hugging Face's search writes, the encoder computed once per row [B * beams, tokens]; `how` says what may be written."""
    tokens, places = model.prompt(batch)
    return model.network.generate(
        inputs_embeds=model._embedded(tokens, places),
        attention_mask=(tokens > 0).long(),
        num_beams=model.beams,
        num_return_sequences=model.beams,
        do_sample=False,
        max_new_tokens=longest,
        **how,
    )


def peer(model: P5, batch, processors: LogitsProcessorList) -> torch.Tensor:
    """Beams of Hugging Face's search [B * beams, tokens]."""
    # codes are whole without an end; ragged ones need it to stop
    longest = model.item_codes.shape[1] + int(model.trie.ragged)
    return generated(model, batch, longest, length_penalty=0.0, logits_processor=processors)


@torch.no_grad()
def main() -> None:
    """Print the table and write the JSON."""
    results = {}
    for name, settings in INDEXES.items():
        config = Config("P5", "ml-100k", None, SETTINGS | settings, read_argv=False)
        train_data, _, test_data = data_preparation(config, create_dataset(config))
        model = get_model("P5")(config, train_data._dataset).eval()
        batch = test_data._dataset[torch.arange(ROWS)]
        allowed = LogitsProcessorList([Allowed(model)])

        def ranked(exact: bool, model: P5 = model, batch=batch) -> torch.Tensor:
            model.exact = exact
            return model.full_sort_predict(batch)

        sides = {
            "beam search (ours)": lambda: ranked(False),
            "generate (peer)": lambda model=model, batch=batch, allowed=allowed: peer(model, batch, allowed),
            "exact scores (ours)": lambda: ranked(True),
        }
        seconds = {side: [] for side in sides}
        for turn in range(ROUNDS + 1):
            for side, run in sides.items():
                began = perf_counter()
                run()
                if turn:  # the first turn warms up
                    seconds[side].append(perf_counter() - began)
        middle = {side: statistics.median(times) for side, times in seconds.items()}
        ours = middle["beam search (ours)"]
        print(f"{name}: {ROWS} histories of ml-100k, {model.beams} beams, prefixes {model.trie.widths}:")
        for side, median in middle.items():
            print(f"  {side:22s} {median * 1e3:8.1f} ms   {median / ours:6.2f} of ours")
        results[name] = {
            "prefixes": model.trie.widths,
            "milliseconds": {side: median * 1e3 for side, median in middle.items()},
            "of_ours": {side: median / ours for side, median in middle.items()},
        }
    RESULTS.write_text(json.dumps({"rows": ROWS, "threads": torch.get_num_threads(), **results}, indent=1))


if __name__ == "__main__":
    main()
