"""A saved student at work: from a history of item tokens to recommendations, without the data it was trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from recbole.data.interaction import Interaction
from recbole.utils import get_model
from torch import nn

from recbole_llm.checkpoint import read_checkpoint


class Recommendation(NamedTuple):
    """One recommended item: its token in the data files, its title ("" if none is known), and its score."""

    token: str
    title: str
    score: float


@dataclass(frozen=True)
class SavedCatalogue:
    """What a model's constructor asks of a dataset, from a checkpoint instead of from data.

    Args:
        item_field: Name of the item id field.
        item_num: Items, padding included.
        user_num: Users, padding included.
    """

    item_field: str
    item_num: int
    user_num: int

    def num(self, field: str) -> int:
        """Number of ids of a field, as RecBole's dataset tells it."""
        return self.item_num if field == self.item_field else self.user_num


class Recommender:
    """A saved sequential model that answers for any history; needs neither Knowledge nor LLM nor training data.

    Args:
        model: The model, built and loaded.
        tokens: Item tokens by internal id, index 0 is padding.
        titles: Titles by internal id, or an empty list.
    """

    def __init__(self, model: nn.Module, tokens: Sequence[str], titles: Sequence[str] = ()):
        self.model = model.eval()
        self.tokens = list(tokens)
        self.titles = list(titles) or [""] * len(self.tokens)
        self.ids = {token: item for item, token in enumerate(self.tokens) if item}

    @torch.no_grad()
    def recommend(
        self,
        history_tokens: Sequence[str] | Sequence[Sequence[str]],
        k: int = 10,
        exclude_seen: bool = False,
        skip_unknown: bool = False,
    ) -> list[Recommendation] | list[list[Recommendation]]:
        """The k best next items of a history, or of each history of a batch, best first.

        Args:
            history_tokens: Item tokens, oldest first; or a list of such histories.
            k: Items per history.
            exclude_seen: Whether items of the history are left out; evaluation keeps them.
            skip_unknown: Whether tokens that the model does not know are passed over; otherwise they are an error.

        Returns:
            A list of Recommendation, or one such list per history.

        Raises:
            ValueError: An unknown token, an empty history, or k beyond the catalogue.
        """
        single = len(history_tokens) == 0 or isinstance(history_tokens[0], str)
        histories = [history_tokens] if single else list(history_tokens)
        if not 0 < k < len(self.tokens):
            raise ValueError(f"k={k}: there are {len(self.tokens) - 1} items. Ask for 1 to {len(self.tokens) - 1}.")
        items = [self._known(history, skip_unknown) for history in histories]
        scores = (
            self.model.full_sort_predict(self._batch(items)).view(len(items), -1)[:, : len(self.tokens)].float().clone()
        )
        scores[:, 0] = float("-inf")
        if exclude_seen:
            for row, seen in enumerate(items):
                scores[row, seen] = float("-inf")
        best = scores.topk(k, dim=1)
        answers = [
            [
                Recommendation(self.tokens[item], self.titles[item], score)
                for item, score in zip(*row, strict=True)
                if score > float("-inf")
            ]
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        return answers[0] if single else answers

    def add_items(self, tokens: Sequence[str], texts: Sequence[str]) -> None:
        """Recommend new items from here on, too, ranked by their text alone; nothing is trained.

        Args:
            tokens: Names of the new items.
            texts: Their texts, in the form of the model's `lite_item_template` (by default the titles).

        Raises:
            ValueError: A token is known already, there are not as many texts, or the model does not rank by text.
        """
        if not hasattr(self.model, "add_items"):
            raise ValueError(
                f"model={type(self.model).__name__}: ranks by what it learnt of each item, so that a new one has no score; there is "
                "LiteLLM4Rec with lite_head=tied. Train that one."
            )
        known = [token for token in tokens if token in self.ids]
        if known or len(set(tokens)) < len(tokens) or len(tokens) != len(texts):
            raise ValueError(
                f"tokens: {len(tokens)} tokens ({len(known)} of them known already), {len(texts)} texts; new, different tokens with a text "
                "each are needed."
            )
        self.model.add_items(list(texts))
        self.ids |= {token: len(self.tokens) + place for place, token in enumerate(tokens)}
        self.tokens += tokens
        self.titles += texts

    def export(self, path: str | Path) -> None:
        """Write the student as the plain state_dict of its RecBole class, which RecBole loads without this package.

        `SASRec(config, dataset).load_state_dict(torch.load(path, weights_only=True))` has the same scores.

        Raises:
            ValueError: The student has an output table of its own (`distill_embedding: input`), which no RecBole class has.
        """
        student = getattr(self.model, "student", self.model)
        if not isinstance(student.item_embedding, nn.Embedding):
            raise ValueError(
                "distill_embedding=input: this student has two item tables; RecBole's classes have one. Train with "
                "distill_embedding=tied or init to export it."
            )
        torch.save({name: value.cpu().clone() for name, value in student.state_dict().items()}, path)

    def _known(self, history: Sequence[str], skip_unknown: bool) -> list[int]:
        unknown = [token for token in history if token not in self.ids]
        if unknown and not skip_unknown:
            raise ValueError(
                f"history_tokens: {len(unknown)} of {len(history)} items are not known to this model, the first is {unknown[0]!r}. "
                "Give tokens of the training data, or skip_unknown=True."
            )
        items = [self.ids[token] for token in history if token in self.ids]
        if not items:
            raise ValueError("history_tokens=[]: no known item in a history; at least one is needed.")
        return items

    def _batch(self, items: list[list[int]]) -> Interaction:
        model = self.model
        kept = [row[-model.max_seq_length :] for row in items]
        padded = torch.zeros(len(kept), model.max_seq_length, dtype=torch.long)
        for place, row in enumerate(kept):
            padded[place, : len(row)] = torch.tensor(row)
        columns = {model.ITEM_SEQ: padded, model.ITEM_SEQ_LEN: torch.tensor([len(row) for row in kept])}
        # a user of no known id: models with a user table give them the padding's vector
        columns[model.USER_ID] = torch.zeros(len(kept), dtype=torch.long)
        return Interaction(columns).to(model.device)


def load_recommender(path: str | Path) -> Recommender:
    """A Recommender from a checkpoint of ours (`.safetensors` with its `.json`), on the device that RecBole would take.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        DamagedArtifact: It is not whole.
        ValueError: It was saved without the item tokens.
    """
    saved = read_checkpoint(path)
    config, meta = saved["config"], saved["meta"]
    if not meta.get("items"):
        raise ValueError(f"path={path}: this checkpoint names no items. Give one that a training has written.")
    catalogue = SavedCatalogue(config["ITEM_ID_FIELD"], len(meta["items"]), meta["n_users"])
    model = get_model(config["model"])(config, catalogue).to(config["device"])
    model.load_state_dict(saved["state_dict"])
    model.load_other_parameter(saved["other_parameter"])
    return Recommender(model, meta["items"], meta.get("titles") or ())
