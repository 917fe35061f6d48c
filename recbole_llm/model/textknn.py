"""Items whose text is like that of the last items: what a text encoder is worth before anybody trains on top of it.

score(i) = cosine of the text vector of i and the sum over the history of decay^age * (text vector). The vectors are those that Lite-LLM4Rec
begins with: an encoder reads each text once, and they are kept on disk. Items of one text are ranked among each other by popularity.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from recbole_llm.config import check_range, choice
from recbole_llm.counting import Counting, CountingTrainer
from recbole_llm.item_text import filled_in


class TextKNN(Counting):
    """Cosine of text vectors; the vectors are saved with the model, so that ranking needs no LLM library.

    Args:
        config: RecBole Config; keys `llm`, `textknn_*` and `counting_repeats`.
        dataset: RecBole's dataset with the columns of `textknn_template` loaded, or a saved catalogue.

    Raises:
        ValueError: A choice that is not possible, or a column that is not there.
    """

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.check_ranges(textknn_decay=(0.0, 1.0))
        choice(config, "textknn_pool", ("mean", "last"))
        check_range(config, "textknn_tokens", 1)
        self.config = config
        has_text = hasattr(dataset, "item_feat")
        template, key = config["textknn_template"], "textknn_template"
        self.texts = filled_in(template, dataset, config["title_field"], key) if has_text else None
        self.register_buffer("vectors", torch.zeros(1, 1))
        self.register_buffer("text_of", torch.zeros(self.n_items, dtype=torch.long))
        self.register_buffer("step", torch.zeros(self.n_items, dtype=torch.int32))

    def offered(self, config):
        """`textknn_decay`."""
        return {"textknn_decay": config["textknn_decay"]}

    def counted(self, log, settings):
        """Vectors of the different texts, which one is whose, and the order of items of one text."""
        from recbole_llm.item_reader import item_vectors  # rule: with a saved model no LLM library is loaded

        config = self.config
        folder = Path(config["checkpoint_dir"]) / "item_vectors"
        reading = self.texts, config["textknn_pool"], config["textknn_tokens"], folder, self.device
        vectors = item_vectors(config["llm"], config["llm_revision"], *reading, config["show_progress"])
        number = {text: row for row, text in enumerate(sorted(set(self.texts[1:])), start=1)}
        text_of = torch.tensor([0, *(number[text] for text in self.texts[1:])])
        different = torch.zeros(len(number) + 1, vectors.shape[1])
        different[text_of] = functional.normalize(vectors.float(), dim=1)
        return {"vectors": different, "text_of": text_of, "step": place_within(text_of, self.place.cpu()).int()}

    def scored(self, histories):
        """Cosines, 2 added so that the next float is the next whole number of its bits."""
        place = (histories > 0).sum(dim=1, keepdim=True) - 1 - torch.arange(histories.shape[1], device=histories.device)
        weight = self.settings["textknn_decay"] ** place.clamp_min(0).double() * (place >= 0)
        wanted = torch.bmm(weight.float().unsqueeze(1), self.vectors[self.text_of[histories]]).squeeze(1)
        # each text once: a product of matrices rounds equal columns differently
        scores = (functional.normalize(wanted, dim=1) @ self.vectors.T + 2)[:, self.text_of]
        scores.view(torch.int32).add_(self.step)
        return scores

    def provenance(self):
        """Where the weights come from, for tables."""
        from recbole_llm.pretrained import digest_of, find, provenance_of

        folder = find(self.config["llm"], self.config["llm_revision"])
        return {"llm": provenance_of(folder), "llm_digest": digest_of(folder)}


def place_within(group: Tensor, place: Tensor) -> Tensor:
    """How many members of each one's group have a lower place [n]. Args: group [n]; place, all different [n]."""
    order = torch.argsort(place)
    groups, by_group = torch.sort(group[order], stable=True)
    within = torch.empty_like(group)
    within[order[by_group]] = torch.arange(len(groups)) - torch.searchsorted(groups, groups)
    return within


class TextKNNTrainer(CountingTrainer):
    """See `CountingTrainer`."""
