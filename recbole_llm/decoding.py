"""How a causal language model writes: where a written title ends, which tokens may follow, and the greedy loop.

The beginning that all prompts share is computed once, a prompt once for all of its beams, and rows that are finished cost nothing.
"""

import copy
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicLayer

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


class Roomy(DynamicLayer):
    """What one layer has read, with room for what will be written, so that a token more moves that token alone.

    Args:
        layer: What it has read of the prompts.
        room: Most tokens that will be written behind them.
    """

    def __init__(self, layer: Any, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self.prompt = self.length = layer.keys.shape[-2]
        self._held = []
        for known in (layer.keys, layer.values):
            held = known.new_empty(*known.shape[:2], self.length + room, known.shape[3])
            held[:, :, : self.length] = known
            self._held.append(held)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (held[:, :, : self.length] for held in self._held)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        """Take what was written, each [B, heads, n, d]; returns all keys and values."""
        at = self.length
        self.length += key_states.shape[-2]
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, at : self.length] = new
        self._show()
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Go on with some rows alone."""
        self._held = [held[indices] for held in self._held]
        self._show()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Go on with other beams of the same rows, whose prompts are where they were."""
        written = slice(self.prompt, self.length)
        for held in self._held:
            held[:, :, written] = held[beam_idx, :, written]


class Reading:
    """A network that reads prompts, and then what is written behind them; what it has read stands in its cache.

    Args:
        network: A causal language model in evaluation mode.
        rows: Tokens of each prompt, whole.
        cache: What `shared_cache` made of the first `cached` tokens of every row; it is not changed.
        cached: Number of tokens in the cache; 0 without one.
        pad: Any token.
        room: Most tokens that will be written behind a prompt.

    Attributes:
        logits: What may follow each row [B, V] float32.
    """

    def __init__(
        self, network: nn.Module, rows: Sequence[Sequence[int]], cache: Any | None, cached: int, pad: int, room: int
    ):
        self.network, self.room = network, room
        device = next(network.parameters()).device
        # an index copies the last states; a slice of them would make torch repeat the head's weights for every row
        last = {"logits_to_keep": torch.tensor([-1], device=device)}
        self._last_only = last if accepts(network, "logits_to_keep") else {}
        ids, mask = padded([row[cached:] for row in rows], pad, device, left=True)
        self._mask = torch.cat([mask.new_ones(len(rows), cached), mask], dim=1)
        self._cache = copy.deepcopy(cache) if cached else None
        if cached:
            self._cache.batch_repeat_interleave(len(rows))
        self._read(ids, (self._mask.cumsum(1) - 1).clamp_min(0)[:, cached:])

    def _read(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        out = self.network(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **self._last_only,
        )
        self._cache, self.logits = out.past_key_values, out.logits[:, -1].float()

    def write(self, index: Sequence[int] | None, tokens: Sequence[int], beams: bool = False) -> None:
        """Write one token behind each of some rows, and go on with these rows alone.

        Args:
            index: The rows, as places among the present ones, one of them maybe several times; None for all.
            tokens: What is written behind each.
            beams: Whether each place keeps its prompt, and only what was written behind it is another beam's.
        """
        device = self.logits.device
        if index is not None:
            chosen = torch.tensor(index, device=device)
            for layer in self._cache.layers:
                layer.reorder_cache(chosen) if beams else layer.batch_select_indices(chosen)
            self._mask = self._mask[chosen]
        if not isinstance(self._cache.layers[0], Roomy):
            self._cache.layers = [Roomy(layer, self.room) for layer in self._cache.layers]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._read(torch.tensor(tokens, device=device)[:, None], self._mask.sum(1, keepdim=True) - 1)

    def allow(self, row: int, tokens: Sequence[int]) -> None:
        """Let only these tokens follow a row."""
        chosen = torch.tensor(tokens, dtype=torch.long, device=self.logits.device)
        only = torch.full_like(self.logits[row], -torch.inf)
        only[chosen] = self.logits[row, chosen]
        self.logits[row] = only


@torch.inference_mode()
def greedy(
    reading: Reading, max_new_tokens: int, complete: Callable[[Sequence[int]], bool], trie: Trie | None = None
) -> list[list[int]]:
    """Write on with the likeliest token until every row is complete; rows that are complete cost nothing more.

    Args:
        reading: Of the prompts.
        max_new_tokens: Rows that are not complete by then are cut off.
        complete: Tells from the written tokens of one row whether it is complete.
        trie: Only these answers may be written.

    Returns:
        The written tokens of each row, the last one being the one that completed it.
    """
    written: list[list[int]] = [[] for _ in reading.logits]
    active = list(range(len(written)))
    for length in range(1, max_new_tokens + 1):
        if trie is not None:
            for place, row in enumerate(active):
                reading.allow(place, trie.following(written[row]))
        tokens, going = reading.logits.argmax(-1).tolist(), []
        for place, (row, token) in enumerate(zip(active, tokens, strict=True)):
            written[row].append(token)
            if not complete(written[row]):
                going.append(place)
        if not going or length == max_new_tokens:
            break
        reading.write(going if len(going) < len(active) else None, [tokens[place] for place in going])
        active = [active[place] for place in going]
    return written


@torch.inference_mode()
def beams_of(
    reading: Reading,
    beams: int,
    ends: int,
    max_new_tokens: int,
    complete: Callable[[Sequence[int]], bool],
    trie: Trie | None = None,
) -> list[list[int]]:
    """Like `greedy`, but the best of several beams by mean log-probability of their tokens, as Hugging Face's `generate` finds it.

    A prompt is read once, not once per beam, and a row is left as soon as none of its beams can become the best.

    Args:
        reading: Of the prompts.
        beams: How many answers of a row are followed.
        ends: How many tokens end an answer by themselves; so many more continuations are looked at.
        max_new_tokens: Rows that are not complete by then are cut off.
        complete: Tells from the written tokens of one row whether it is complete.
        trie: Only these answers may be written.
    """
    active = list(range(len(reading.logits)))
    running: list[list[list[int]]] = [[[]] for _ in active]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in active]
    score = torch.zeros(len(active), 1, device=reading.logits.device)
    for length in range(1, max_new_tokens + 1):
        reading.logits = reading.logits.log_softmax(-1)  # over all tokens, whatever is allowed
        if trie is not None:
            for place, written in enumerate(beam for row in active for beam in running[row]):
                reading.allow(place, trie.following(written))
        follows = reading.logits.view(*score.shape, -1) + score[:, :, None]
        count = follows.shape[2]
        found = follows.flatten(1).topk(min(max(2, 1 + ends) * beams, follows[0].numel()), dim=1)
        found = zip(active, found.values.tolist(), found.indices.tolist(), strict=True)
        index, tokens, scores, going = [], [], [], []
        for place, (row, values, indices) in enumerate(found):
            best = []
            for rank, (value, at) in enumerate(zip(values, indices, strict=True)):
                written = [*running[row][at // count], at % count]
                if value == -torch.inf:
                    break
                if length == max_new_tokens or complete(written):
                    finished[row] += [(value / length, written)] * (rank < beams)
                elif len(best) < beams:
                    best.append((value, place * score.shape[1] + at // count, written))
            finished[row] = sorted(finished[row], key=lambda one: -one[0])[:beams]
            if best and (len(finished[row]) < beams or best[0][0] / length > finished[row][-1][0]):
                best += [(-torch.inf, *best[0][1:])] * (beams - len(best))
                running[row] = [written for _, _, written in best]
                index += [parent for _, parent, _ in best]
                tokens += [written[-1] for written in running[row]]
                scores.append([value for value, _, _ in best])
                going.append(row)
        if not going:
            break
        reading.write(index, tokens, beams=len(going) == len(active) and score.shape[1] == beams)
        active, score = going, torch.tensor(scores, device=reading.logits.device)
    return [max(row, key=lambda one: one[0])[1] for row in finished]


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
    """Like `greedy` and `beams_of`, for a network whose memory they cannot handle.

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
