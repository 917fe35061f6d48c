"""P5: a T5 reads the history as item ids written out and writes the id of the next item; the generative baseline.

Papers: Geng et al., "Recommendation as Language Processing (RLP): A Unified Pretrain, Personalized Prompt & Predict Paradigm (P5)"
(RecSys 2022, arXiv 2203.13366); Xu et al., "OpenP5" (arXiv 2306.07134); Hua et al., "How to Index Item IDs for Recommendation
Foundation Models" (arXiv 2305.06569), §4, whose random, sequential and collaborative indexing these are.

Differs from the authors' code: ids never follow the order of a file, users are walked in a hashed order, and items that are held out
only are numbered in a hashed order, too, so `last id + 1` says nothing about them (P5's known leak); one task and one template; item
positions are counted from the newest item; without a checkpoint, a small T5 with words of its own, whose ids need no comma and no
end token, since none is the beginning of another one; beams are scored by the sum of log-probabilities, not divided by length; the
beams of a row share one copy of the history (`t5.Decoder`).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import TrainDataLoader
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm import indexing
from recbole_llm.beams import CodeTrie, exact, forced, search
from recbole_llm.config import check_range, check_topk, choice
from recbole_llm.layers import fast_layers, fuse_optimizer
from recbole_llm.sequences import Log, latest, pack, row_positions
from recbole_llm.teacher import Teacher, sample_of_rows
from recbole_llm.trainer import SequenceTrainer

PAD, END = 0, 1  # of T5's vocabularies as of ours
TOKENS_PER_PIECE = 1 << 13
"""Most tokens of prompts that are read at a time; larger batches leave a CPU's cache."""
LEAST = {f"p5_{name}": 1 for name in ("layers", "width", "heads", "inner", "digits", "group", "history", "beams")}
LEAST |= {"p5_clusters": 2, "p5_train_rows": 0}
"""Whole numbers among the settings, and the least that each may be."""


class P5(Teacher):
    """A T5 as a RecBole sequential model: ranks by the probability of writing an item's id.

    Under `p5_score: beam` the beams have their log-probability, and every other item stands below the worst beam in an order that
    follows from the items' tokens alone; under `exact` every item has its log-probability. The network is a part of the model, unlike
    an LLM that is tuned by adapters: all of it is trained, by RecBole's loop and optimizer.

    Args:
        config: RecBole Config; keys `p5_*`, `llm`, `llm_revision`, `llm_dtype`.
        dataset: RecBole's training split, from which ids are made; or a `SavedCatalogue`, then `load_state_dict` brings the ids.

    Raises:
        ValueError: A setting that is none of its choices or does not fit the catalogue, or a checkpoint that is no T5.
    """

    input_type = InputType.POINTWISE
    knows_by_token = True

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        check_topk(config, self.n_items)
        self.config = config
        choice(config, "p5_index", indexing.INDEXES)
        choice(config, "llm_dtype", ("auto", "float32", "bfloat16"))
        for key, least in LEAST.items():
            check_range(config, key, least)
        self.exact = choice(config, "p5_score", ("beam", "exact")) == "exact"
        self.history_items = at_most(config, "p5_history", self.max_seq_length, "MAX_ITEM_LIST_LENGTH")
        self.beams = at_most(config, "p5_beams", self.n_items - 1, "the number of items")
        if not self.exact and self.beams < max(config["topk"]):
            raise ValueError(
                f"p5_beams={self.beams}: fewer than topk={config['topk']} ranks; beyond the beams there is no ranking. Set p5_beams to "
                f"{max(config['topk'])} or more, topk to less, or p5_score=exact."
            )
        if not config["llm"] and config["p5_width"] % config["p5_heads"]:
            raise ValueError(
                f"p5_heads={config['p5_heads']}: does not divide p5_width={config['p5_width']}. Set p5_heads or p5_width."
            )
        self.tuned_on = (config["p5_train_rows"], config["p5_seed"])
        self.learns_users = "a number of every user (p5_user_id=True)" if config["p5_user_id"] else None
        self.network: nn.Module | None = None
        self.trie: CodeTrie | None = None
        if hasattr(dataset, "field2id_token"):
            self._number(dataset)
            self._build(*self._written())
        else:
            for name in self.saved_tables:
                self.register_buffer(name, torch.zeros(0, dtype=torch.long))

    saved_tables = ("item_codes", "item_keys", "user_codes", "user_keys", "lead", "link", "comma", "tail")
    """Buffers that say how items, users and the prompt are written."""

    def _number(self, dataset: Any) -> None:
        """Give every item and user a number or path."""
        config, seed = self.config, self.config["p5_seed"]
        tokens = [str(token) for token in dataset.field2id_token[self.ITEM_ID]]
        users = [str(token) for token in dataset.field2id_token[self.USER_ID]] if config["p5_user_id"] else []
        order = indexing.keyed_order(tokens[1:], seed)
        self.numbers, self.paths = indexing.numbers_in(order), None
        of_users = indexing.numbers_in(indexing.keyed_order(users[1:], seed))
        self.user_numbers = np.append(0, of_users + 1) if users else []
        if config["p5_index"] != "random":
            try:
                log = Log.from_dataset(dataset)
            except ValueError as error:
                raise ValueError(
                    f"p5_index={config['p5_index']}: needs the log of the training interactions, which these data do not give. Set "
                    "p5_index=random."
                ) from error
            if config["p5_index"] == "sequential":
                walk = indexing.walk_of(log, dataset.field2id_token[self.USER_ID], seed)
                self.numbers = indexing.sequential_numbers(walk - 1, order)
            else:
                user = log.user_index(torch.arange(len(log.items))).numpy()
                cut = config["p5_clusters"], config["p5_group"]
                self.paths = indexing.collaborative_paths(user, log.items.numpy() - 1, order, *cut, seed)
        self.register_buffer("item_keys", indexing.token_keys(tokens))
        self.register_buffer("user_keys", indexing.token_keys(users))

    def _written(self) -> tuple[nn.Module, list, list, list]:
        """The network, and how items, users and the words of the prompt are written in its tokens."""
        return self._in_own_words() if not self.config["llm"] else self._in_words_of_a_checkpoint()

    def _in_own_words(self) -> tuple[nn.Module, list, list, list]:
        digits = self.config["p5_digits"]
        items, users = self.paths or indexing.in_places(self.numbers, digits), []
        if len(self.user_numbers):
            users = [tuple(f"user {piece}" for piece in code) for code in indexing.in_places(self.user_numbers, digits)]
        words = ["user", "history:", *sorted({piece for code in (*items, *users) for piece in code})]
        token = {word: number for number, word in enumerate(words, start=END + 1)}
        items, users = ([[token[piece] for piece in code] for code in codes] for codes in (items, users))
        return self._network(len(token) + END + 1), items, users, [[token["user"]], [token["history:"]], [], []]

    def _in_words_of_a_checkpoint(self) -> tuple[nn.Module, list, list, list]:
        from recbole_llm import t5  # importing this file must not import an LLM library

        network, tokenizer = t5.load(self.config["llm"], self.config["llm_revision"])
        if self.paths:
            words = sorted({piece for path in self.paths for piece in path})
            token = dict(zip(words, t5.add_words(network, tokenizer, [f"<{word}>" for word in words]), strict=True))
            items = [[token[piece] for piece in path] for path in self.paths]
        else:
            # from 1001 on, as OpenP5 does: all numbers of a small catalogue have as many digits
            items = t5.words_of(tokenizer, [str(1001 + number) for number in self.numbers])
        users = t5.words_of(tokenizer, [str(number) for number in self.user_numbers]) if len(self.user_numbers) else []
        lead, link, comma = t5.words_of(tokenizer, ["user", "history :", ","])
        return network, [[*code, END] for code in items], users, [lead, link, comma, [END]]

    def _network(self, vocabulary: int) -> nn.Module:
        """A T5 of random weights as the settings want it."""
        from recbole_llm import t5

        config = self.config
        if config["llm"]:
            return t5.blank(config["llm"], config["llm_revision"], vocabulary)
        sizes = config["p5_layers"], config["p5_width"], config["p5_heads"], config["p5_inner"], config["p5_dropout"]
        return t5.build(vocabulary, *sizes)

    def _build(self, network: nn.Module, items: list, users: list, words: list) -> None:
        if not indexing.is_prefix_free(items):
            raise ValueError(
                f"llm={self.config['llm']}: its tokenizer writes two item ids alike. Set llm to a T5 whose tokenizer knows digits, or "
                "p5_index=collaborative, which brings tokens of its own."
            )
        self.register_buffer("item_codes", indexing.padded_codes(items))
        self.register_buffer(
            "user_codes", indexing.padded_codes(users)[1:] if users else torch.zeros(0, 0, dtype=torch.long)
        )
        for name, tokens in zip(("lead", "link", "comma", "tail"), words, strict=True):
            self.register_buffer(name, torch.tensor(tokens, dtype=torch.long))
        self._take(network)
        self._index()

    def _take(self, network: nn.Module) -> None:
        self.network, self.whole_word = network, None
        if self.config["p5_whole_word"]:
            self.whole_word = nn.Embedding(self.history_items + 1, network.config.d_model, padding_idx=0)
            if self.config["llm"]:
                nn.init.zeros_(self.whole_word.weight)  # a pretrained network begins as it is

    def _index(self) -> None:
        """Make what follows from the codes."""
        self.trie = CodeTrie(self.item_codes.cpu()).to(self.item_codes.device)
        # the end token, which is 1 in all vocabularies, stands behind an answer only
        bare = self.item_codes.masked_fill(self.item_codes == END, PAD)
        comma = self.comma.expand(self.n_items, -1).clone()
        comma[0] = PAD
        self.written = torch.cat([bare, comma], dim=1)
        self.written = self.written[:, (self.written > 0).any(dim=0)]
        self.has_holes = bool((self.written[1:] == PAD).any()) or len(self.tail) > 0
        # hashes, so their order is one that no file shows
        place = self.item_keys.argsort().argsort().float() / self.n_items
        place[0] = 2.0
        self.place = place

    @property
    def history_length(self) -> int:
        """Most items in a prompt."""
        return self.history_items

    def work(self, histories: Tensor) -> Tensor:
        """Items of the prompt [B]."""
        return super().work(histories).clamp(max=self.history_items)

    def trained_on(self, n_rows: int) -> Tensor:
        """Which training rows the network is trained on; bool [n_rows]."""
        flags = torch.zeros(n_rows, dtype=torch.bool)
        flags[sample_of_rows(n_rows, *self.tuned_on)] = True
        return flags

    def item_embeddings(self) -> Tensor:
        """Mean of the token vectors of each item's id, row 0 zero [n_items, d].

        Weak vectors: what a random number's pieces have in common means nothing, and only a collaborative path brings like items
        near to each other.
        """
        table = self.network.get_input_embeddings().weight.detach()
        codes = self.item_codes.masked_fill(self.item_codes == END, PAD)
        real = (codes > 0).unsqueeze(2)
        return (table[codes] * real).sum(dim=1) / real.sum(dim=1).clamp_min(1)

    def prompt(self, interaction: Any) -> tuple[Tensor, Tensor]:
        """Tokens of the prompts, padded with 0 [B, S], and which item of the history each belongs to, 0 for none [B, S]."""
        items, place = latest(interaction[self.ITEM_SEQ], self.history_items)
        rows = len(items)
        pieces = self.written[items]
        of_item = place.unsqueeze(2) * (pieces > 0)
        if len(self.comma):
            of_item[..., -len(self.comma) :] = 0
        before = [self.lead.expand(rows, -1)]
        if self.config["p5_user_id"]:
            before.append(self.user_codes[interaction[self.USER_ID]])
        before.append(self.link.expand(rows, -1))
        tokens = torch.cat([*before, pieces.flatten(1), self.tail.expand(rows, -1)], dim=1)
        start = sum(part.shape[1] for part in before)
        places = functional.pad(of_item.flatten(1), (start, len(self.tail)))
        if self.has_holes:  # T5 counts the distance between tokens, padding included
            order = (tokens == PAD).int().sort(dim=1, stable=True).indices
            order = order[:, : int((tokens > 0).sum(dim=1).max())]
            tokens, places = tokens.gather(1, order), places.gather(1, order)
        return tokens, places

    def _autocast(self):
        """The number format of the network; never float16, in which T5 overflows, whatever `enable_amp` asks for."""
        from recbole_llm.backbone import working_dtype

        device = torch.device(self.device)
        low = working_dtype(self.config["llm_dtype"], device) == torch.bfloat16
        return torch.autocast(device.type, torch.bfloat16, enabled=low)

    def _embedded(self, tokens: Tensor, places: Tensor) -> Tensor:
        vectors = self.network.get_input_embeddings()(tokens)
        return vectors if self.whole_word is None else vectors + self.whole_word(places)

    def _pieces(self, interaction: Any, tokens_per_row: int = 0) -> Iterator[tuple[Tensor, Any]]:
        """Rows of like length [b] and these rows as a batch, so that little of what is read is padding."""
        length = self.work(interaction[self.ITEM_SEQ]).cpu()
        weight = length * self.written.shape[1] + tokens_per_row
        for rows in pack(length.sort(stable=True).indices, weight, TOKENS_PER_PIECE):
            yield rows, interaction[rows]

    def calculate_loss(self, interaction):
        """Mean cross entropy of the tokens of the targets' ids."""
        total, count = 0.0, 0
        for _, batch in self._pieces(interaction):
            tokens, places = self.prompt(batch)
            labels = self.item_codes[batch[self.POS_ITEM_ID]]
            written = functional.pad(labels[:, :-1], (1, 0), value=self.network.config.decoder_start_token_id)
            with self._autocast():
                logits = self.network(
                    inputs_embeds=self._embedded(tokens, places),
                    attention_mask=(tokens > 0).long(),
                    decoder_input_ids=written,
                ).logits
            total = total + functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=PAD, reduction="sum"
            )
            count += int((labels > 0).sum())
        return total / count

    def _decoders(self, interaction: Any) -> Iterator[tuple[Tensor, Any, Any]]:
        """Rows of like length on the model's device [b], these rows as a batch, and what decodes behind their prompts."""
        from recbole_llm.t5 import Decoder

        wide = max(self.trie.widths[:-1], default=1)
        for rows, batch in self._pieces(interaction, wide if self.exact else min(wide, self.beams)):
            tokens, places = self.prompt(batch)
            mask = tokens > 0
            memory = self.network.encoder(inputs_embeds=self._embedded(tokens, places), attention_mask=mask.long())
            yield rows.to(self.device), batch, Decoder(self.network, memory.last_hidden_state, mask)

    @torch.no_grad()
    def full_sort_predict(self, interaction):
        """Log-probability of every item's id, or of the beams' alone and all other items below them [B, n_items]."""
        scores = torch.empty(len(interaction), self.n_items, device=self.device)
        with self._autocast():
            for rows, _, decoder in self._decoders(interaction):
                if self.exact:
                    found = exact(decoder, self.trie, len(rows))
                    found[:, 0] = found[:, 1:].min(dim=1).values - 1
                else:
                    items, score = search(decoder, self.trie, len(rows), self.beams)
                    below = score.min(dim=1, keepdim=True).values - 1
                    found = (below - self.place).scatter(1, items, score)
                scores[rows] = found
        return scores

    @torch.no_grad()
    def candidates(self, batch, k):
        """Like a Teacher's; under `beam` candidates are beams only, and the target has its log-probability also where it is none."""
        if self.exact:
            return super().candidates(batch, k)
        items = torch.zeros(len(batch), k, dtype=torch.long, device=self.device)
        score, target = torch.empty(len(batch), k, device=self.device), torch.empty(len(batch), device=self.device)
        with self._autocast():
            for rows, part, decoder in self._decoders(batch):
                beams, found = (each[:, :k] for each in search(decoder, self.trie, len(rows), self.beams))
                there = beams.shape[1]
                items[rows, :there] = beams
                score[rows, :there], score[rows, there:] = found, found[:, -1:]
                target[rows] = forced(decoder, self.item_codes[part[self.ITEM_ID]])
        return items, score, target

    def predict(self, interaction):
        """Score of the batch's own items [B]."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    def _apply(self, fn, recurse=True):
        """Like Module's; what follows from the codes moves along."""
        super()._apply(fn, recurse)
        if self.trie is not None and self.trie.token.device != self.item_codes.device:
            self._index()
        return self

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Like Module's; ids are those that the state was trained with, found by the items' and users' tokens.

        Raises:
            ValueError: The state is of other items or users.
        """
        state = dict(state_dict)
        for kind in ("item", "user"):
            keys, codes = f"{kind}_keys", f"{kind}_codes"
            if len(own := getattr(self, keys)):
                if (rows := indexing.rows_with_keys(own, state[keys])) is None:
                    raise ValueError(
                        f"p5_index={self.config['p5_index']}: these weights were trained on other {kind}s than the data have. Train anew, "
                        "or take the data and filters they were trained with."
                    )
                state[keys], state[codes] = own, state[codes].to(own.device)[rows]
        for name in self.saved_tables:
            self.register_buffer(name, state[name].clone().to(self.device))
        vocabulary = len(state["network.shared.weight"])
        if self.network is None or self.network.config.vocab_size != vocabulary:
            self._take(self._network(vocabulary))
        if not torch.equal(state["network.lm_head.weight"], state["network.shared.weight"]):
            from recbole_llm import t5

            t5.untie(self.network)
        self.to(self.device)
        result = super().load_state_dict(state, strict, assign)
        self._index()
        return result

    def other_parameter(self):
        """Which rows it was trained on (number and seed)."""
        return {"tuned_on": list(self.tuned_on)}

    def load_other_parameter(self, para):
        """Take which rows it was trained on."""
        self.tuned_on = tuple((para or {}).get("tuned_on", self.tuned_on))


class P5Trainer(SequenceTrainer):
    """Trains P5 on RecBole's rows, or on a sample of them, in an order that does not follow the file's."""

    def _prepare(self, train_data):
        dataset = train_data._dataset
        by_token = row_positions(dataset).argsort()
        chosen = by_token[sample_of_rows(len(by_token), *self.model.tuned_on)]
        part = dataset.copy(dataset.inter_feat[chosen])
        super()._prepare(TrainDataLoader(self.config, part, train_data._sampler, shuffle=self.config["shuffle"]))
        fuse_optimizer(self.optimizer)

    def _train_epoch(self, train_data, epoch_idx, loss_func=None, show_progress=False):
        with fast_layers(self.model):
            return super()._train_epoch(train_data, epoch_idx, loss_func, show_progress)


def at_most(config: Any, key: str, most: int, what: str) -> int:
    """The value of `key`; our own default shrinks to `most`, what the user set is refused.

    Raises:
        ValueError: The user's value is larger.
    """
    if config[key] > most and key in config.external_config_dict:
        raise ValueError(
            f"{key}={config[key]}: {what} allows 1 to {most}. Set {key}, or leave it out to have it fitted."
        )
    return min(config[key], most)
