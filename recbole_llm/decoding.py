"""How a causal language model writes: where a written title ends, which tokens may follow, and the greedy loop.

The greedy loop computes the beginning that all prompts share once, and stops paying for rows that are finished.
"""

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from recbole_llm.tokens import padded


def end_of_title(text: str) -> int | None:
    """Where an answer is complete: behind the quote that closes its title, or before the end of its first line.

    Titles hold no double quotes (`prompts.answer`), so the second one closes.

    Returns:
        The number of characters that belong to the answer; None while it is not complete.
    """
    closed = text.find('"', text.find('"') + 1) if '"' in text else -1
    blank = len(text) - len(text.lstrip())
    line = text.find("\n", blank)
    ends = [place for place in (closed + 1, line) if place > 0]
    return min(ends, default=None)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all rows share, leaving every row at least one token of its own."""
    shared = len(os.path.commonprefix([list(row) for row in rows])) if rows else 0
    return min([shared, *(len(row) - 1 for row in rows)])


def plan(rows: Sequence[Sequence[int]], tokens_per_batch: int) -> list[list[int]]:
    """Batches of row numbers, similar lengths together, each at most `tokens_per_batch` tokens with its padding.

    The batches depend on what the rows are, not on the order in which they come.
    """
    batches: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda n: (-len(rows[n]), list(rows[n]))):
        if not batches or len(rows[batches[-1][0]]) * (len(batches[-1]) + 1) > tokens_per_batch:
            batches.append([])
        batches[-1].append(number)
    return batches


def accepts(network: nn.Module, name: str) -> bool:
    """Whether the network's forward has a parameter of that name."""
    return name in inspect.signature(network.forward).parameters


class Trie:
    """The token sequences that may be written, for decoding that cannot leave them.

    Args:
        sequences: Allowed answers, each its tokens.
        end: The token that ends an answer which is also the beginning of a longer one; None if the model has none.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], end: int | None) -> None:
        if not sequences or not all(len(sequence) for sequence in sequences):
            raise ValueError("allowed: the list of allowed answers is empty or holds an empty one.")
        self.root: dict[int, Any] = {}
        self.end = end
        for sequence in sequences:
            node = self.root
            for token in sequence:
                node = node.setdefault(token, {})
            node[-1] = {}

    def following(self, written: Sequence[int]) -> list[int]:
        """Tokens that may follow what was written; none when the answer is complete."""
        node: dict[int, Any] | None = self.root
        for token in written:
            node = node.get(token) if node else None
        if not node:
            return []
        tokens = [token for token in node if token != -1]
        if -1 in node and tokens and self.end is not None:
            tokens.append(self.end)
        return tokens


def shared_cache(network: nn.Module, tokens: Sequence[int], device: Any) -> Any | None:
    """The network's key-value cache after the tokens that all rows begin with.

    Returns:
        A cache for one row; None if the network keeps another kind of memory (recurrent, sliding), whose rows cannot be
        repeated, dropped or padded in the middle.
    """
    written = network(input_ids=torch.tensor([list(tokens)], device=device), use_cache=True)
    cache = getattr(written, "past_key_values", None)
    layers = getattr(cache, "layers", None)
    plain = layers and all(type(layer).__name__ == "DynamicLayer" for layer in layers)
    return cache if plain and accepts(network, "position_ids") else None


@torch.inference_mode()
def greedy(
    network: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    cache: Any | None,
    cached: int,
    pad: int,
    max_new_tokens: int,
    complete: Callable[[Sequence[int]], bool],
    trie: Trie | None = None,
) -> list[list[int]]:
    """Write on with the likeliest token until every row is complete.

    Args:
        network: A causal language model in evaluation mode.
        rows: Tokens of each prompt, whole.
        cache: What `shared_cache` made of the first `cached` tokens of every row; it is not changed.
        cached: Number of tokens in the cache; 0 without one.
        pad: Any token.
        max_new_tokens: Rows that are not complete by then are cut off.
        complete: Tells from the written tokens of one row whether it is complete.
        trie: Only these answers may be written.

    Returns:
        The written tokens of each row, the last one being the one that completed it.
    """
    device = next(network.parameters()).device
    ids, mask = padded([row[cached:] for row in rows], pad, device, left=True)
    mask = torch.cat([mask.new_ones(len(rows), cached), mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, cached:]
    if cached:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
    last_only = {"logits_to_keep": 1} if accepts(network, "logits_to_keep") else {}
    written: list[list[int]] = [[] for _ in rows]
    active = list(range(len(rows)))
    for _ in range(max_new_tokens):
        out = network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache if cached else None,
            use_cache=True,
            **last_only,
        )
        cache, cached = out.past_key_values, 1
        logits = out.logits[:, -1].float()
        if trie is not None:
            for place, row in enumerate(active):
                following = torch.tensor(trie.following(written[row]), device=device)
                only = torch.full_like(logits[place], -torch.inf)
                only[following] = logits[place, following]
                logits[place] = only
        tokens = logits.argmax(-1)
        going = []
        for place, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            written[row].append(token)
            if not complete(written[row]):
                going.append(place)
        if not going:
            break
        if len(going) < len(active):
            index = torch.tensor(going, device=device)
            cache.batch_select_indices(index)
            tokens, mask = tokens[index], mask[index]
            active = [active[place] for place in going]
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
        positions = mask.sum(1, keepdim=True) - 1
    return written


class _Complete(transformers.StoppingCriteria):
    """Stops a row when its written tokens are complete."""

    def __init__(self, prompt: int, complete: Callable[[Sequence[int]], bool]) -> None:
        self.prompt, self.complete = prompt, complete

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        done = [self.complete(row) for row in input_ids[:, self.prompt :].tolist()]
        return torch.tensor(done, device=input_ids.device)


@torch.inference_mode()
def search(
    network: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    beams: int,
    ends: list[int],
    pad: int,
    max_new_tokens: int,
    complete: Callable[[Sequence[int]], bool],
    trie: Trie | None = None,
) -> list[list[int]]:
    """Like `greedy`, but by beam search (`beams` > 1), or for a network whose memory `greedy` cannot handle.

    Args:
        network: A causal language model in evaluation mode.
        rows: Tokens of each prompt, whole.
        beams: Width of the search; the best beam's tokens are returned.
        ends: Tokens that end an answer.
        pad: Any token.
        max_new_tokens: Rows that are not complete by then are cut off.
        complete: Tells from the written tokens of one row whether it is complete.
        trie: Only these answers may be written.
    """
    ids, mask = padded(rows, pad, next(network.parameters()).device, left=True)
    prompt = ids.shape[1]

    def following(_: int, row: torch.Tensor) -> list[int]:
        # a complete row is still asked about, and must be given something
        return trie.following(row[prompt:].tolist()) or ends or [pad]

    found = network.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=transformers.GenerationConfig(
            do_sample=False, num_beams=beams, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=ends or None
        ),
        stopping_criteria=transformers.StoppingCriteriaList([_Complete(prompt, complete)]),
        prefix_allowed_tokens_fn=None if trie is None else following,
    )
    written = []
    for row in found[:, prompt:].tolist():
        # behind its end a row is padded, and the padding token may be a real one
        stop = next((place for place in range(1, len(row)) if complete(row[:place])), len(row))
        written.append(row[:stop])
    return written
