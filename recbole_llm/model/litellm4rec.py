"""Lite-LLM4Rec (re-implementation): an LLM recommender that decodes nothing.

An Item LLM reads the text of each item once and returns one vector; a Recommendation LLM reads the vectors of a history; an item
projection head ranks the whole catalogue in one step, trained by cross entropy over all items.

Paper: Wang et al., "Rethinking Large Language Model Architectures for Sequential Recommendations" (arXiv 2402.09543).

Differs from the paper: its full text and code were not at hand, so every point that the abstract leaves open is a setting `lite_*`.
Our defaults are those that two CPU cores can train: the Item LLM stays frozen, the Recommendation LLM is causal, so that every
position of a history is trained at once, and an item has a learnable vector besides its text (`lite_use_id_embedding`).
"""

import math
from pathlib import Path
from typing import Any

import torch
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.checkpoint import read_weights, split_other_parameter
from recbole_llm.config import check_range, check_topk, choice
from recbole_llm.item_text import filled_in
from recbole_llm.tables import TextTable
from recbole_llm.teacher import Teacher
from recbole_llm.trainer import SequenceTrainer

CHOICES = {
    "lite_item_pool": ("mean", "last"),
    "lite_item_train": ("frozen", "full", "partial", "lora"),
    "lite_rec_mask": ("causal", "bidirectional"),
    "lite_rec_pool": ("last", "mean"),
    "lite_head": ("tied", "tied+bias", "free"),
}

OPEN = (
    "lite_item_template", "lite_item_tokens", "lite_rec_llm", "lite_share_backbones", "lite_rec_layers", "lite_rec_pretrained",
    "lite_head_width", "lite_use_id_embedding",
)  # fmt: skip
LEAST = {
    "lite_item_tokens": 1, "lite_item_layers": 1, "lite_item_chunk": 1, "lite_lora_rank": 1, "lite_unfreeze_epochs": 1,
    "lite_fresh_items": -1, "lite_refresh_steps": 0, "lite_rec_layers": 0, "lite_warmup_steps": 0, "lite_head_width": 0,
}  # fmt: skip


class LiteLLM4Rec(Teacher):
    """Two levels of LLM and a head, as a RecBole sequential model; its scores are log-probabilities over the catalogue.

    Args:
        config: RecBole Config; keys `llm` and `lite_*`.
        dataset: RecBole's dataset with the columns of `lite_item_template` loaded; or a saved catalogue, whose item vectors come
            with the checkpoint.

    Raises:
        ValueError: A setting that is none of its choices, or does not fit another one.
    """

    input_type = InputType.POINTWISE
    label = "Lite-LLM4Rec (re-implementation)"

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        # the yaml of a student must be readable without an LLM library, and so must this file
        from recbole_llm.backbone import Backbone
        from recbole_llm.item_reader import width_of

        check_topk(config, dataset.item_num)
        for key, allowed in CHOICES.items():
            choice(config, key, allowed)
        for key, least in LEAST.items():
            check_range(config, key, least)
        check_range(config, "lite_dropout", 0.0, 1.0)
        for key in ("lite_unfreeze_rate", "lite_llm_learning_rate", "lite_lora_alpha"):
            check_range(config, key, 0.0)
        self.config = config
        self.causal, self.pool = config["lite_rec_mask"] == "causal", config["lite_rec_pool"]
        has_text = hasattr(dataset, "item_feat")
        self.texts = filled_in(config["lite_item_template"], dataset, config["title_field"]) if has_text else None
        own = config["lite_rec_llm"]
        self.rec_llm = Backbone.load(
            own or config["llm"],
            causal=self.causal,
            layers=config["lite_rec_layers"],
            dropout=config["lite_dropout"],
            pretrained_weights=config["lite_rec_pretrained"] and has_text,  # a checkpoint brings its own
            key="lite_rec_llm" if own else "llm",
            revision=None if own else config["llm_revision"],
        )
        self._refuse_misfits()
        spread = self.rec_llm.token_spread()
        if not config["lite_share_backbones"]:
            self.rec_llm.without_tokens()
        width = self.rec_llm.width
        head_width = config["lite_head_width"] or width
        sizes = self.n_items, width_of(config["llm"], config["llm_revision"]), self.rec_llm.input_width, head_width
        self.item_embedding = TextTable(*sizes, config["lite_head"], config["lite_use_id_embedding"], spread)
        if has_text:
            self.item_embedding.put_in_order(dataset.field2id_token[dataset.iid_field])
        self.to_head = nn.Linear(width, head_width, bias=False)
        self.dropout = nn.Dropout(config["lite_dropout"])
        self.item_llm = None
        self.knows_items = False
        self._vectors_are_old = False
        self._batches_read = 0
        self._wanted: Tensor | None = None
        self._item_llm_state: dict[str, Tensor] = {}

    def _refuse_misfits(self) -> None:
        config, most = self.config, self.rec_llm.positions
        if most and self.max_seq_length > most:
            raise ValueError(
                f"MAX_ITEM_LIST_LENGTH={self.max_seq_length}: the Recommendation LLM reads at most {most} vectors. Set "
                "MAX_ITEM_LIST_LENGTH to that much or less, or lite_rec_llm to another model."
            )
        shares = config["lite_share_backbones"]
        if shares and (config["lite_item_train"] != "full" or config["lite_rec_llm"] or config["lite_rec_layers"]):
            raise ValueError(
                "lite_share_backbones=True: one network cannot be frozen below and trained above, nor have other layers; there is "
                "lite_share_backbones=False. Set it, or lite_item_train=full with lite_rec_llm empty and lite_rec_layers=0."
            )

    def read_items(self) -> None:
        """See that the items' vectors are there: read by the Item LLM, or earlier and taken from the disk; done at the first use."""
        if self.knows_items:
            return
        from recbole_llm.item_reader import item_vectors

        config = self.config
        folder = Path(config["checkpoint_dir"]) / "item_vectors"
        reading = config["lite_item_pool"], config["lite_item_tokens"]
        llm = config["llm"], config["llm_revision"]
        if config["lite_share_backbones"] and not config["lite_rec_pretrained"]:
            vectors = self.item_reader(self.texts).table(
                config["show_progress"]
            )  # its weights are drawn, so none on disk are its own
        else:
            vectors = item_vectors(*llm, self.texts, *reading, folder, self.device, config["show_progress"])
        self.item_embedding.begin_with(vectors.to(self.device))
        self.knows_items = True

    def item_reader(self, texts: list[str]) -> nn.Module:
        """The Item LLM over some texts, the first one the padding's, as it was trained if it was, in the mode of this model."""
        from recbole_llm.item_reader import ItemReader

        config = self.config
        reader = ItemReader.load(
            config["llm"],
            texts,
            config["lite_item_pool"],
            config["lite_item_tokens"],
            tokens_at_once=config["lite_item_chunk"],
            checkpointed=config["lite_item_checkpoint"],
            dropout=config["lite_dropout"],
            revision=config["llm_revision"],
        )
        lora = config["lite_lora_rank"], config["lite_lora_alpha"], config["lite_dropout"]
        reader.backbone.train_only(config["lite_item_train"], config["lite_item_layers"], *lora)
        if config["lite_share_backbones"]:
            reader.backbone.network = self.rec_llm.network
        reader.load_state_dict(
            self._item_llm_state if self.item_llm is None else self._trained_of_item_llm(), strict=False
        )
        return reader.to(self.device).train(self.training)

    def _trained_of_item_llm(self) -> dict[str, Tensor]:
        """What is trained of the Item LLM; nothing if it is the Recommendation LLM, too, of which it is a part."""
        if self.config["lite_share_backbones"]:
            return {}
        return {name: weight.detach() for name, weight in self.item_llm.named_parameters() if weight.requires_grad}

    def unfreeze(self) -> None:
        """Train the Item LLM, too, as `lite_item_train` says, from here on (phase B)."""
        if self.item_llm is None:
            self.read_items()
            self.item_llm = self.item_reader(self.texts)
            self._item_llm_state = {}

    def expect(self, targets: Tensor) -> None:
        """Say which items the next batch is to find, in any shape, 0 for none: phase B reads them anew, too."""
        self._wanted = targets

    def _read_batch(self, items: Tensor) -> None:
        """Read the items of a batch, histories and targets, anew with a gradient; all others keep the vector that was read last."""
        if self._wanted is not None:
            items, self._wanted = torch.cat([items.flatten(), self._wanted.flatten()]), None
        every = self.config["lite_refresh_steps"]
        if every and self._batches_read and self._batches_read % every == 0:
            self.refresh()
        fresh = torch.arange(1, self.n_items, device=items.device)
        count = self.config["lite_fresh_items"]
        if count >= 0:
            fresh = items[items > 0].unique()
            if 0 < count < len(fresh):
                fresh = fresh[torch.randperm(len(fresh), device=items.device)[:count]].sort().values
        table = self.item_embedding
        table.use(table.vectors.index_copy(0, fresh, self.item_llm(fresh)))
        self._vectors_are_old, self._batches_read = True, self._batches_read + 1

    def refresh(self) -> None:
        """Read all items with the Item LLM as it is now; without effect while it is frozen."""
        if self._vectors_are_old:
            self._vectors_are_old, self._batches_read = False, 0
            self.item_embedding.hold(self.item_llm.table())

    def forward(self, item_seq, item_seq_len):
        """What a history is looking for, [B, d] in the space of `item_embedding.weight`; padding may stand on either side.

        Args:
            item_seq: Items of the histories, oldest first, 0 for padding [B, L].
            item_seq_len: Not used: where the last item stands is read off the items.
        """
        self.read_items()
        if self.item_llm is not None and self.training:
            self._read_batch(item_seq)
        elif self._vectors_are_old:
            self.refresh()
        real = item_seq > 0
        states = self.rec_llm(self.dropout(self.item_embedding(item_seq)), real)
        if self.pool == "mean":
            states = states * real.unsqueeze(2)
            if not self.causal:
                return self.in_head(states.sum(dim=1) / real.sum(dim=1, keepdim=True).clamp_min(1))
            states = states.cumsum(dim=1) / real.cumsum(dim=1).clamp_min(1).unsqueeze(2)
        last = (real * torch.arange(real.shape[1], device=real.device)).argmax(dim=1)
        return self.in_head(self.gather_indexes(states, last))

    def in_head(self, states: Tensor) -> Tensor:
        """States [..., width] in the space of `item_embedding.weight`."""
        states = self.to_head(states)
        if self.item_embedding.bias is None:
            return states
        return torch.cat([states, torch.ones_like(states[..., :1])], dim=-1)

    def calculate_loss(self, interaction):
        """Cross entropy of the next item over the whole catalogue, at the last position of each row."""
        self.expect(interaction[self.POS_ITEM_ID])
        states = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return functional.cross_entropy(states @ self.item_embedding.weight.T, interaction[self.POS_ITEM_ID])

    def full_sort_predict(self, interaction):
        """Log-probability of every item [B, n_items]; the padding item stands below all others."""
        return self.scores(self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]))

    def scores(self, states: Tensor) -> Tensor:
        """Log-probability of every item from what `forward` gives [B, d] -> [B, n_items]."""
        scores = states @ self.item_embedding.weight.T
        scores[:, 0] = float("-inf")
        scores = functional.log_softmax(scores.float(), dim=1)
        scores[:, 0] = scores[:, 1:].min(dim=1).values - 1
        return scores

    def predict(self, interaction):
        """Log-probability of the batch's own items [B]."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    @torch.no_grad()
    def item_embeddings(self) -> Tensor:
        """What the Recommendation LLM reads of each item: its projected text, and its own vector if it has one [n_items, d]."""
        self.read_items()
        self.refresh()
        return self.item_embedding.inputs()

    @torch.no_grad()
    def add_items(self, texts: list[str]) -> None:
        """Put new items behind the catalogue, scored by their text alone; nothing is trained.

        Args:
            texts: What `lite_item_template` makes of each new item.

        Raises:
            ValueError: The head is free, so that it has no vector for an item that it was not trained on.
        """
        self.refresh()
        self.item_embedding.add(self.item_reader(["", *texts]).table()[1:])
        self.n_items += len(texts)
        if self.texts is not None:
            self.texts = [*self.texts, *texts]

    def choices(self) -> dict[str, Any]:
        """How every point was chosen that the paper's abstract leaves open, to be said beside results."""
        config = self.config
        of_training = {"partial": ["lite_item_layers"], "lora": ["lite_lora_rank"]}.get(config["lite_item_train"], [])
        chosen = {key.removeprefix("lite_"): config[key] for key in (*CHOICES, *OPEN, *of_training)}
        positions = config["positions"]
        if positions == "auto":
            positions = "all" if self.causal else "last"
        return {
            "backbone": config["llm"],
            **chosen,
            "rec_llm": config["lite_rec_llm"] or config["llm"],
            "history": self.max_seq_length,
            "positions": positions,
            "seen_items": config["seen_items"],
        }

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, for tables and manifests."""
        from recbole_llm.pretrained import digest_of, find, provenance_of

        config = self.config
        folder = find(config["llm"], config["llm_revision"])
        of_rec = find(config["lite_rec_llm"], key="lite_rec_llm") if config["lite_rec_llm"] else folder
        drawn = "weights drawn at random"
        shares_drawn = config["lite_share_backbones"] and not config["lite_rec_pretrained"]
        return {
            "llm": drawn if shares_drawn else provenance_of(folder),
            "llm_digest": digest_of(folder),
            "lite_rec_llm": provenance_of(of_rec) if config["lite_rec_pretrained"] else drawn,
        }

    def state_dict(self, *args, **kwargs):
        """Like torch's, with item vectors that are up to date; of the Item LLM what is trained, and nothing while it is frozen."""
        self.refresh()
        state = super().state_dict(*args, **kwargs)
        trained = self._item_llm_state if self.item_llm is None else self._trained_of_item_llm()
        kept = {name: value for name, value in state.items() if not name.startswith("item_llm.")}
        return kept | {f"item_llm.{name}": value for name, value in trained.items()}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Take a saved state, and what of the Item LLM was trained; a state of phase A ends phase B."""
        ours = {name: value for name, value in state_dict.items() if not name.startswith("item_llm.")}
        reader = {
            name.removeprefix("item_llm."): value for name, value in state_dict.items() if name.startswith("item_llm.")
        }
        if self.item_llm is not None and (reader or self.config["lite_share_backbones"]):
            self.item_llm.load_state_dict(reader, strict=False)
        else:
            self.item_llm, self._item_llm_state = None, reader
        own = {name: value for name, value in super().state_dict().items() if name.startswith("item_llm.")}
        self.knows_items, self._vectors_are_old = True, False
        return super().load_state_dict(own | ours, strict=strict, assign=assign)


class LiteLLM4RecTrainer(SequenceTrainer):
    """Trains phase A with the Item LLM frozen, then, if `lite_item_train` asks for it, phase B with it trained, too.

    Phase B begins with the best weights of A at a smaller learning rate, and is kept only where it is better on validation. One network
    for both levels (`lite_share_backbones`) has no phase A: everything is trained at once, at the full rates, for `epochs`.
    """

    phase = "A"
    frozen_score: float | None = None
    """Best validation score of phase A, once there is a phase B."""
    _writes_first_of_b = False

    def _build_optimizer(self, **kwargs):
        """RecBole's optimizer with a smaller learning rate for LLMs, and a linear warm-up."""
        config, model = self.config, self.model
        shrink = config["lite_unfreeze_rate"] if self.phase == "B" and not config["lite_share_backbones"] else 1.0
        llms = [*model.rec_llm.parameters(), *([] if model.item_llm is None else model.item_llm.parameters())]
        inside = {id(weight) for weight in llms}
        rest = [weight for weight in model.parameters() if id(weight) not in inside]
        parts = [(rest, self.learning_rate), (list(dict.fromkeys(llms)), config["lite_llm_learning_rate"])]
        groups = []
        for weights, rate in parts:
            trained = [weight for weight in weights if weight.requires_grad]
            groups.append({"params": trained, "lr": rate * shrink, "peak": rate * shrink, "steps": 0})
        optimizer = super()._build_optimizer(params=groups, **kwargs)
        optimizer.register_step_pre_hook(self._warm_up)
        return optimizer

    def _warm_up(self, optimizer, args, kwargs) -> None:
        # a count of its own: not every optimizer has one, and on a GPU reading it waits
        for group in optimizer.param_groups:
            group["steps"] += 1
            group["lr"] = group["peak"] * min(1.0, group["steps"] / max(1, self.config["lite_warmup_steps"]))

    def batch_loss(self, batch):
        """Like `SequenceTrainer`'s; the model knows the batch's targets before it reads."""
        self.model.expect(batch["target_list"] if self.all_positions else batch[self.model.POS_ITEM_ID])
        return super().batch_loss(batch)

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """Like RecBole's, in two phases if the Item LLM is to be trained."""
        config = self.config
        options = (verbose, saved, show_progress, callback_fn)
        if config["lite_item_train"] == "frozen":
            return super().fit(train_data, valid_data, *options)
        resumes_b = self._resumed is not None and self._resumed[1].get("phase") == "B"
        if not resumes_b and not config["lite_share_backbones"]:
            super().fit(train_data, valid_data, *options)
            if saved:
                self._load_best()
        self._begin_b(resumes_b, bool(valid_data), saved)
        result = super().fit(train_data, valid_data, *options)
        if self.frozen_score is None:
            return result
        kept = "A" if self.best_valid_score == self._bar() else "B"
        if kept == "A":
            self.best_valid_score = self.frozen_score
        best = f"{self.frozen_score:.6f} on validation, with phase B {self.best_valid_score:.6f}"
        self.logger.info(f"Phase A (Item LLM frozen) reached {best}{f': {kept} is kept' if saved else ''}.")
        return self.best_valid_score, self.best_valid_result

    def _prepare(self, train_data):
        super()._prepare(train_data)
        # a kill before B's first evaluation has to find B, whose weights may stand in A's file by then
        if self._writes_first_of_b:
            self._writes_first_of_b = False
            self._write_resume(-1)

    def _bar(self) -> float:
        """What phase B has to reach: the next number that is better than phase A's, since RecBole keeps the later of two equals."""
        return math.nextafter(self.frozen_score, math.inf if self.valid_metric_bigger else -math.inf)

    def _load_best(self) -> None:
        state, meta = read_weights(self.saved_model_file, self.device)
        self.model.load_state_dict(split_other_parameter(state, meta)[0])

    def _begin_b(self, resumes: bool, validates: bool, saved: bool) -> None:
        """Let the Item LLM be trained, with an optimizer of its own and a count of epochs of its own."""
        self.phase = "B"
        self.model.unfreeze()
        self.optimizer = self._build_optimizer()
        if self.config["lite_share_backbones"]:
            self.logger.info("One network is both levels: everything is trained at once, there is no phase A.")
            return
        self.epochs = self.config["lite_unfreeze_epochs"]
        self.eval_step = min(self.config["eval_step"], self.epochs)
        validates = validates and self.eval_step > 0
        if resumes:
            self.frozen_score = self._resumed[1].get("frozen_score")
        else:
            self.start_epoch = self.cur_step = 0
            self._writes_first_of_b = saved
            if validates:
                self.frozen_score = self.best_valid_score
                self.best_valid_score = self._bar()
        begins = "best" if validates and saved else "last"
        self.logger.info(
            f"Phase B: the Item LLM is trained, too ({self.config['lite_item_train']}), from the {begins} weights of phase A."
        )

    def resume_values(self):
        """What an exact resume has to know besides."""
        return {"phase": self.phase, "frozen_score": self.frozen_score}
