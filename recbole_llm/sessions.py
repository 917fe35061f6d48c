"""Users whose histories are read click by click: what a causal Recommendation LLM has read of a user is kept, not read again.

The saved state of a user is the keys and values of its items in every layer. A new click is then one vector through the network
instead of the whole history, and its scores are those of the whole history.
"""

from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.causality import sample_rows, undisturbed


class Sessions:
    """The states of some users under one model.

    Args:
        model: A LiteLLM4Rec with `lite_rec_mask: causal`, built and loaded.
        users: Most users at a time; they are told by their numbers 0 to users - 1.

    Raises:
        ValueError: The model reads both ways, or its family cannot keep what it has read.
    """

    def __init__(self, model: nn.Module, users: int):
        self.model = model.eval()
        if not model.causal:
            raise ValueError(
                "lite_rec_mask=bidirectional: a new click changes what is read of all earlier ones, so that nothing can be kept; there is "
                "lite_rec_mask=causal. Train with that."
            )
        model.read_items()
        self.length = torch.zeros(users, dtype=torch.long)
        self.items = torch.zeros(users, model.max_seq_length, dtype=torch.long)
        self.total = torch.zeros(users, model.rec_llm.width, device=model.device)
        self.kept = _Kept(users, model.max_seq_length)
        if users and (fault := self._fault()):
            raise ValueError(
                f"llm={model.config['lite_rec_llm'] or model.config['llm']}: this family cannot keep what it has read ({fault}); there are "
                "BERT, Llama, GPT-2 and their like. Train with one of them, or rank by full_sort_predict."
            )

    @torch.no_grad()
    def click(self, users: Tensor, items: Tensor) -> Tensor:
        """Take one new item of each of some users, who differ from each other, and score the catalogue.

        A user whose history has come to the model's longest goes on with the later half of it.

        Args:
            users: Numbers of the users [B].
            items: Their new items [B].

        Returns:
            Log-probabilities, as the model's `full_sort_predict` gives them [B, n_items].
        """
        full = self.length[users] >= self.items.shape[1]
        if full.any():
            half = (self.items.shape[1] + 1) // 2
            again = users[full]
            kept = self.items[again, -half + 1 :] if half > 1 else self.items[again, :0]
            self.forget(again)
            if kept.shape[1]:
                self.read(again, kept)
        return self.model.scores(self.read(users, items.unsqueeze(1)))

    def forget(self, users: Tensor) -> None:
        """Let some users begin anew [B]."""
        self.length[users], self.items[users], self.total[users.to(self.total.device)] = 0, 0, 0.0

    def read(self, users: Tensor, items: Tensor) -> Tensor:
        """Read l items of each user [B, l] behind what was read; returns what the last state is looking for [B, d]."""
        model, width = self.model, items.shape[1]
        place = self.length[users, None] + torch.arange(width)
        self.items[users[:, None], place] = items
        device = model.device
        longest = int(place.max()) + 1
        self.kept.at(users.to(device), place.to(device), longest)
        allowed = torch.arange(longest, device=device) <= place.to(device)[:, :, None]
        vectors = model.item_embedding(items.to(device))
        states = model.rec_llm.read_on(vectors, allowed.unsqueeze(1), place.to(device), self.kept)
        self.length[users] += width
        last = states[:, -1]
        if model.pool == "mean":
            here = users.to(device)
            self.total[here] += states.sum(dim=1)
            last = self.total[here] / self.length[users, None].to(device)
        return model.in_head(last)

    def _fault(self) -> str | None:
        """Why scores click by click are not those of the whole history; None if they are."""
        model = self.model
        try:
            with undisturbed(model):
                batch = sample_rows(model, rows=1, longest=4)
                history = batch[model.ITEM_SEQ].cpu()
                for item in history[0]:
                    scores = self.click(torch.tensor([0]), item.view(1))
                whole = model.full_sort_predict(batch)
        except Exception as error:  # whatever a family raises here, it keeps no state
            return f"{type(error).__name__}: {error}"
        finally:
            self.forget(torch.tensor([0]))
        gap = float((scores - whole).abs().max())
        return None if gap <= 1e-3 else f"scores differ by {gap:.2g}"


class _Kept:
    """Keys and values of every layer by user and place, in the form that transformers asks of a cache."""

    is_compileable = False

    def __init__(self, users: int, length: int):
        self.users, self.length = users, length
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._where: tuple[Any, ...] = ()

    def at(self, users: Tensor, place: Tensor, longest: int) -> None:
        """Which users [B] the next pass reads, where its values stand [B, l], and how far the longest history goes."""
        self._where = users, place, longest

    def update(self, keys: Tensor, values: Tensor, layer: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keep new keys and values [B, heads, l, d]; returns those of the whole histories [B, heads, longest, d]."""
        users, place, longest = self._where
        if layer not in self.layers:
            shape = self.users, self.length, keys.shape[1], keys.shape[3]
            self.layers[layer] = keys.new_zeros(shape), values.new_zeros(shape)
        whole = []
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept[users[:, None], place] = new.transpose(1, 2)
            whole.append(kept[users, :longest].transpose(1, 2))
        return whole[0], whole[1]

    def get_seq_length(self, *args, **kwargs) -> int:
        """0: places are told by `position_ids`."""
        return 0
