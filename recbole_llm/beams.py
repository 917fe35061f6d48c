"""Which items a sequence model means, when only the codes of real items may be written: beam search, and all of them exactly.

Whatever decodes (`t5.Decoder`) takes many prefixes of each row at a time: `step(tokens [B, K], parents [B, K])` gives their states
[B, K, d], and `log_p(states, wanted)` the log-probabilities of wanted tokens. The trie is a few tensors, so no Python runs per row.
"""

from typing import Protocol

import torch
from torch import Tensor


class Steps(Protocol):
    """What is decoded with."""

    start: int
    """Token before the first one."""

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """States [B, K, d] after one more token [B, K], each behind one of the prefixes of the step before [B, K]; None begins anew."""

    def log_p(self, states: Tensor, wanted: Tensor) -> Tensor:
        """Log-probability of the wanted tokens [B, K, C] (or the same for all rows [K, C]) after states [B, K, d]."""


class CodeTrie:
    """The codes of all items as a tree of tensors; nodes are numbered level by level, node 0 is the root.

    Args:
        codes: A code per item, filled up with 0; row 0 is padding [n_items, L]. No code may be the beginning of another one.

    Attributes:
        token: Token that leads to each node [N].
        item: Item of each leaf, 0 for inner nodes [N].
        leaf: Leaf of each item, 0 for the padding [n_items].
        child_token: Tokens that may follow each inner node, filled up with 0 [I, C].
        child_node: Where they lead, filled up with -1 [I, C].
        inner: Inner nodes of each level.
        above: For each of them, which of the inner nodes of the level before is its parent; one tensor per level.
        widths: How many prefixes there are at the end of each level, finished codes included.
    """

    def __init__(self, codes: Tensor):
        children: list[dict[int, int]] = [{}]
        token, item, parent, depth = [0], [0], [0], [0]
        leaf = [0] * len(codes)
        rows = codes.tolist()
        level = [(number, 0) for number in range(1, len(rows))]
        for place in range(codes.shape[1]):
            following = []
            # by token, so that the numbering of the nodes does not follow the items'
            for number, node in sorted(level, key=lambda each: (each[1], rows[each[0]][place])):
                word = rows[number][place]
                if word == 0:
                    leaf[number], item[node] = node, number
                    continue
                if word not in children[node]:
                    children[node][word] = len(token)
                    token.append(word), item.append(0), parent.append(node), depth.append(place + 1)
                    children.append({})
                following.append((number, children[node][word]))
            level = following
        for number, node in level:
            leaf[number], item[node] = node, number
        inside = [node for node, below in enumerate(children) if below]
        row_of = {node: row for row, node in enumerate(inside)}
        most = max(len(children[node]) for node in inside)
        self.token, self.item, self.leaf = (torch.tensor(each) for each in (token, item, leaf))
        self.row = torch.tensor([row_of.get(node, 0) for node in range(len(token))])
        self.child_token = torch.zeros(len(inside), most, dtype=torch.long)
        self.child_node = torch.full((len(inside), most), -1)
        for row, node in enumerate(inside):
            self.child_token[row, : len(children[node])] = torch.tensor(list(children[node]))
            self.child_node[row, : len(children[node])] = torch.tensor(list(children[node].values()))
        deepest = max(depth)
        levels = [[node for node in inside if depth[node] == each] for each in range(deepest)]
        place_of = [{node: place for place, node in enumerate(each)} for each in levels]
        self.inner = [torch.tensor(each) for each in levels]
        self.above = [torch.zeros(1, dtype=torch.long)]
        self.above += [
            torch.tensor([place_of[each - 1][parent[node]] for node in levels[each]]) for each in range(1, deepest)
        ]
        done = [
            sum(1 for node, below in enumerate(children) if not below and depth[node] < d)
            for d in range(1, deepest + 1)
        ]
        self.widths = [depth.count(each + 1) + done[each] for each in range(deepest)]
        self.ragged = done[-1] > 0

    def to(self, device: torch.device) -> "CodeTrie":
        """Move every tensor to a device; returns itself."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        self.inner = [each.to(device) for each in self.inner]
        self.above = [each.to(device) for each in self.above]
        return self


def search(steps: Steps, trie: CodeTrie, rows: int, beams: int) -> tuple[Tensor, Tensor]:
    """Beam search that can write nothing but codes of items.

    A beam's score is the sum of the log-probabilities of its tokens, not divided by its length, so that scores compare within a
    list; a code that is complete keeps its place among the beams.

    Args:
        steps: What is decoded with.
        trie: The codes.
        rows: Number of rows B.
        beams: Beams per row, at most the number of items.

    Returns:
        items [B, beams], all different within a row, and their scores [B, beams], best first.
    """
    device = trie.token.device
    nodes, score = torch.zeros(rows, 1, dtype=torch.long, device=device), torch.zeros(rows, 1, device=device)
    tokens, parents = torch.full_like(nodes, steps.start), None
    for width in trie.widths:
        row = trie.row[nodes]
        children, wanted = trie.child_node[row], trie.child_token[row]
        found = score[..., None] + steps.log_p(steps.step(tokens, parents), wanted)
        found = found.masked_fill(children < 0, -torch.inf)
        if trie.ragged:
            done = trie.item[nodes] > 0
            children[..., 0] = torch.where(done, nodes, children[..., 0])
            stays = torch.full_like(found, -torch.inf)
            stays[..., 0] = score
            found = torch.where(done[..., None], stays, found)
        # with no more beams than there are prefixes, no beam is ever a dead one
        score, chosen = found.flatten(1).topk(min(beams, width), dim=1)
        parents = torch.div(chosen, found.shape[2], rounding_mode="floor")
        nodes = children.flatten(1).gather(1, chosen)
        tokens = trie.token[nodes]
    return trie.item[nodes], score


def exact(steps: Steps, trie: CodeTrie, rows: int) -> Tensor:
    """Log-probability of the code of every item; what codes have in common is computed once.

    Args:
        steps: What is decoded with.
        trie: The codes.
        rows: Number of rows B.

    Returns:
        [B, n_items]; the padding item's is that of the empty code, 0.
    """
    total = torch.zeros(rows, len(trie.token), device=trie.token.device)
    for level, (inner, above) in enumerate(zip(trie.inner, trie.above, strict=True)):
        tokens = trie.token[inner] if level else torch.full_like(inner, steps.start)
        parents = above.expand(rows, -1) if level else None
        row = trie.row[inner]
        there = trie.child_node[row] >= 0
        gain = steps.log_p(steps.step(tokens.expand(rows, -1), parents), trie.child_token[row])
        total[:, trie.child_node[row][there]] = (total[:, inner][..., None] + gain)[:, there]
    return total[:, trie.leaf]


def forced(steps: Steps, codes: Tensor) -> Tensor:
    """Log-probability of one given code per row, whatever a search would find.

    Args:
        steps: What is decoded with.
        codes: Filled up with 0 on the right [B, L].

    Returns:
        [B].
    """
    total = torch.zeros(len(codes), device=codes.device)
    tokens, parents = torch.full_like(codes[:, :1], steps.start), None
    for wanted in codes.unsqueeze(2).unbind(1):
        gain = steps.log_p(steps.step(tokens, parents), wanted.unsqueeze(1))[:, 0, 0]
        total = total + gain.masked_fill(wanted[:, 0] == 0, 0.0)
        tokens, parents = wanted, torch.zeros_like(wanted)
    return total
