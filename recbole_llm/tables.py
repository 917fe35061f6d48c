"""Item tables made of vectors of texts, in the place of a sequential model's own `item_embedding`.

Papers: DLLM2Rec (arXiv 2405.00338), Eqs. 12-13, for the student's tables; Lite-LLM4Rec (arXiv 2402.09543) for `TextTable`.
`model/dllm2rec.py` and `model/litellm4rec.py` say what differs from the authors' code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class UntiedTable(nn.Module):
    """An item table with an output side of its own, as in the authors' code: `table(ids)` goes in, `table.weight` scores."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.input = nn.Parameter(table.weight.detach().clone())
        self.output = nn.Parameter(table.weight.detach().clone())

    @property
    def weight(self) -> Tensor:
        """Table on the output side [n_items, d]."""
        return self.output

    def forward(self, items: Tensor) -> Tensor:
        """Vectors of items on the input side; items [...] -> [..., d]."""
        return functional.embedding(items, self.input, padding_idx=0)


class TaughtTable(nn.Module):
    """An item table e_i = b_i + a * g(z_i): a free offset and a linear projection of the teacher's vector (Eqs. 12-13).

    Args:
        table: The student's own table, initial value of the offset; an `UntiedTable` keeps its output side as it is.
        vectors: Item vectors z of the teacher, frozen, row 0 padding [n_items, d_z].
        weight: a, the amount of the projected vector.
        std: Standard deviation of the projected vectors at the start.
        offset: Whether every item keeps a free offset.
    """

    def __init__(self, table: nn.Embedding | UntiedTable, vectors: Tensor, weight: float, std: float, offset: bool):
        super().__init__()
        untied = isinstance(table, UntiedTable)
        start = (table.input if untied else table.weight).detach()
        self.amount = weight
        self.offset = nn.Parameter(start.clone()) if offset else None
        self.output = nn.Parameter(table.output.detach().clone()) if untied else None
        self.projector = nn.Linear(vectors.shape[1], start.shape[1], device=start.device)
        self.register_buffer("vectors", vectors.to(start), persistent=False)
        with torch.no_grad():
            nn.init.zeros_(self.projector.bias)
            spread = functional.linear(self.vectors[1:], self.projector.weight).std()
            self.projector.weight.mul_(std / spread.clamp_min(1e-12))
        self._current: Tensor | None = None

    def input_table(self) -> Tensor:
        """The table of the input side, computed from its parts [n_items, d]."""
        table = self.amount * self.projector(self.vectors)
        if self.offset is not None:
            table = table + self.offset
        return torch.cat([torch.zeros_like(table[:1]), table[1:]])

    @property
    def weight(self) -> Tensor:
        """Table on the output side [n_items, d]; in training the one that the last forward computed."""
        if self.output is not None:
            return self.output
        return self._current if self._current is not None else self.input_table()

    def forward(self, items: Tensor) -> Tensor:
        """Vectors of items on the input side; items [...] -> [..., d]."""
        self._current = self.input_table()
        return functional.embedding(items, self._current, padding_idx=0)

    def __getstate__(self):
        """All but the table of the last step, which hangs on to its graph and cannot be copied."""
        return self.__dict__ | {"_current": None}

    def folded(self) -> dict[str, Tensor]:
        """State of the plain table that serves exactly like this one."""
        table = self.input_table().detach()
        return {"weight": table} if self.output is None else {"input": table, "output": self.output.detach()}


class TextTable(nn.Module):
    """Lite-LLM4Rec's items: text vectors projected to what its Recommendation LLM reads, and the item projection head.

    Read like RecBole's tables: `table(ids)` goes in, a state times `table.weight` scores. The head is `free`, a vector of its own per
    item, or `tied`: the table that goes in, projected once more, so that an item that was never trained on has a score.

    Args:
        n_items: Items, padding included.
        text_width: Length of the text vectors.
        width: Length of the vectors that go in.
        head_width: Length of the vectors that score.
        head: free | tied | tied+bias; with a bias, states need a 1 behind them.
        own_vectors: Whether every item has a learnable vector that is added to its projected text.
        spread: Standard deviation of the vectors that go in, at the start.
    """

    def __init__(
        self, n_items: int, text_width: int, width: int, head_width: int, head: str, own_vectors: bool, spread: float
    ):
        super().__init__()
        self.spread = spread
        self.register_buffer("vectors", torch.zeros(n_items, text_width))
        self.projector = nn.Linear(text_width, width)
        nn.init.zeros_(self.projector.bias)
        self.own = nn.Parameter(torch.randn(n_items, width) * spread / 5) if own_vectors else None
        self.free = nn.Parameter(torch.randn(n_items, head_width) / head_width) if head == "free" else None
        self.to_head = nn.Linear(width, head_width, bias=False) if head != "free" else None
        self.bias = nn.Parameter(torch.zeros(n_items)) if head == "tied+bias" else None
        self._current: Tensor | None = None
        self._served: Tensor | None = None

    @torch.no_grad()
    def put_in_order(self, tokens: Sequence[str]) -> None:
        """Deal the first values of items' own vectors out by the order of their tokens [n_items], which no file order changes."""
        place = torch.tensor(sorted(range(1, len(tokens)), key=lambda item: str(tokens[item])))
        for drawn in (self.own, self.free):
            if drawn is not None:
                drawn[place] = drawn[1:].clone()

    @torch.no_grad()
    def begin_with(self, vectors: Tensor) -> None:
        """Take text vectors [n_items, text_width], and scale the projection so that what goes in has its spread."""
        self.hold(vectors)
        spread = functional.linear(self.vectors[1:], self.projector.weight).std()
        self.projector.weight.mul_(self.spread / spread.clamp_min(1e-12))

    @torch.no_grad()
    def hold(self, vectors: Tensor) -> None:
        """Take text vectors [n_items, text_width] as they are."""
        self.vectors.copy_(vectors)
        self._current = self._served = None

    def use(self, vectors: Tensor) -> None:
        """Take vectors [n_items, text_width] that carry a gradient, until the next call; their values are kept."""
        self.hold(vectors.detach())
        self._current = vectors

    def inputs(self) -> Tensor:
        """All vectors that go in, row 0 zero [n_items, width]."""
        return self._inputs(torch.arange(len(self.vectors), device=self.vectors.device))

    def _inputs(self, items: Tensor) -> Tensor:
        vectors = self.vectors if self._current is None else self._current
        inputs = self.projector(functional.embedding(items, vectors))
        if self.own is not None:
            inputs = inputs + functional.embedding(items, self.own)
        return inputs.masked_fill((items == 0).unsqueeze(-1), 0.0)

    def forward(self, items: Tensor) -> Tensor:
        """Vectors of items that go in; items [...] -> [..., width]."""
        return self._inputs(items)

    @property
    def weight(self) -> Tensor:
        """Vectors that score [n_items, head_width], and the bias as one column more; kept from call to call in evaluation."""
        if self.free is not None:
            return self.free
        keeps = not self.training and not torch.is_grad_enabled()
        if keeps and self._served is not None:
            return self._served
        weight = self.to_head(self.inputs())
        if self.bias is not None:
            weight = torch.cat([weight, self.bias.unsqueeze(1)], dim=1)
        if keeps:
            self._served = weight
        return weight

    def train(self, mode: bool = True):
        """Like torch's; what was kept for evaluation is let go when training begins."""
        self._current = None
        if mode:
            self._served = None
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs):
        self._current = self._served = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args, **kwargs):
        """Like torch's; what was kept for evaluation would stay on the old device and in the old number format."""
        self._current = self._served = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        """All but the tables of the last step, which hang on to their graph and cannot be copied."""
        return self.__dict__ | {"_current": None, "_served": None}

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        """Put new items behind the old ones, by their text alone.

        Args:
            vectors: Text vectors of the new items [m, text_width].

        Raises:
            ValueError: The head is free: it has no vector for an item that it was not trained on.
        """
        if self.free is not None:
            raise ValueError(
                "lite_head=free: scores only items that it was trained on; there is lite_head=tied. Train with that to add items."
            )
        more = vectors.to(self.vectors)
        self.vectors = torch.cat([self.vectors, more])
        for name in ("own", "bias"):
            old = getattr(self, name)
            if old is not None:  # an item without history is like the others on average
                new = old[1:].mean(dim=0, keepdim=True).expand(len(more), *old.shape[1:])
                setattr(self, name, nn.Parameter(torch.cat([old, new])))
        self._current = self._served = None
