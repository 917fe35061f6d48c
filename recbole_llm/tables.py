"""Item tables that take a teacher's item vectors in, in the place of a student's own `item_embedding`.

Paper: DLLM2Rec (arXiv 2405.00338), Eqs. 12-13; `model/dllm2rec.py` says what differs from the authors' code.
"""

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
