"""DLLM2Rec: a small sequential model learns from an LLM recommender's rankings and item vectors.

Paper: Cui et al., "Distillation Matters: Empowering Sequential Recommenders to Match the Performance of Large Language
Models", RecSys 2024 (arXiv 2405.00338), Eqs. 3-13.

Differs from the authors' code: selection is on validation with dropout off; teacher rows are joined by their identity, not
by row number; the ranking term averages over labelled positions only; importance weights act per row (theirs meet the
robust term through a [B,B] broadcast); the robust term's sum over all items is computed once. `distill_mode: best` is our
own combination: item vectors reach the *scores* through the tied table, and the ranking term has the form of its base loss.
"""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType, get_model
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.attached import Attached, attach, teacher_vectors
from recbole_llm.causality import fault_of_scores
from recbole_llm.config import SUITED, check_topk, choice
from recbole_llm.distillation import (
    candidate_confidence,
    consistency,
    kl_loss,
    own_lists,
    position_weight,
    principal_components,
    propensity_scores,
    ranking_loss,
    robust_loss,
    truth_confidence,
)
from recbole_llm.knowledge import ensure
from recbole_llm.losses import RECORDED, chunked_loss, rows_at_a_time, scores_of, soft_target_loss
from recbole_llm.processes import Part
from recbole_llm.sequences import Log
from recbole_llm.tables import TaughtTable, UntiedTable
from recbole_llm.trainer import SequenceTrainer


@dataclass(frozen=True)
class Distillation:
    """What a run distils and how: the settings `distill_*` after the mode has filled the empty ones."""

    base: str
    ranking: str
    weight: float
    position_weight: float
    confidence_weight: float
    consistency_weight: float
    confidence: str
    normalize: bool
    negative: bool
    embedding: str
    embedding_weight: float
    robust: float
    topk: int = 10
    position_beta: float = 1.0
    temperature: float | str = "auto"
    embedding_std: float = 0.1
    embedding_whiten: bool = True
    offset: bool = True
    robust_beta: float = 1.0

    @classmethod
    def from_config(cls, config: Any) -> "Distillation":
        """Read `distill_*`; raises ValueError for a value that is none of its choices."""
        mode = config["distill_modes"][choice(config, "distill_mode", config["distill_modes"])]
        given = {field.name: config[f"distill_{field.name}"] for field in fields(cls)}
        merged = {name: mode.get(name) if value is None else value for name, value in given.items()}
        if given["ranking"] is None and merged["ranking"] in FITTING.values():
            merged["ranking"] = FITTING[merged["base"]] if merged["base"] in FITTING else merged["ranking"]
        for name, allowed in CHOICES.items():
            choice({f"distill_{name}": merged[name]}, f"distill_{name}", allowed)
        if merged["negative"] and merged["base"] != "bce":
            raise ValueError(
                "distill_negative=True: needs the negative of distill_base=bce; a full softmax draws none. Set one of them."
            )
        return cls(**merged)

    @property
    def uses_rows(self) -> bool:
        """Whether the teacher's labelled rows are needed."""
        return self.ranking != "none" and self.weight > 0

    @property
    def uses_vectors(self) -> bool:
        """Whether the teacher's item vectors are needed."""
        return self.embedding != "none"

    def wants_vectors_of_teacher(self, config: Any) -> bool:
        """Whether the item vectors are the teacher's own, not those of a text encoder that is named for them."""
        return self.uses_vectors and config["teacher_embedding"] == "auto"

    def asks_teacher(self, config: Any) -> bool:
        """Whether a Knowledge is needed: for rows, or for vectors."""
        return self.uses_rows or self.wants_vectors_of_teacher(config)


# The ranking term of a mode fits the base loss, also one that was set by hand.
FITTING = {"softmax": "softmax", "bce": "sigmoid"}
CHOICES = {
    "base": ("softmax", "bce"),
    "ranking": ("none", "sigmoid", "softmax", "kl"),
    "confidence": ("truth", "candidate"),
    "embedding": ("none", "input", "tied", "init"),
}


class DLLM2Rec(SequentialRecommender):
    """Any of RecBole's sequential models as the student of an LLM recommender.

    It is built as the plain student; `teach` (called by its trainer) brings the teacher's item vectors in. What is saved
    has them folded into the item table, so a saved student needs neither Knowledge nor LLM and is as fast as a plain one.

    Args:
        config: RecBole Config; `student` names the class, `distill_*` say what is distilled.
        dataset: RecBole's dataset.

    Raises:
        ValueError: The student has no plain item table, or inputs that an item sequence does not give.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        check_topk(config, dataset.item_num)
        self.settings = Distillation.from_config(config)
        name = config["student"]
        self.student = get_model(name)(config, dataset)
        table = getattr(self.student, "item_embedding", None)
        if not isinstance(table, nn.Embedding) or table.num_embeddings != self.n_items:
            rows = f"one of {table.num_embeddings} rows" if isinstance(table, nn.Embedding) else "none"
            raise ValueError(
                f"student={name}: a student needs an item_embedding table of one row per item ({self.n_items}); it has {rows}. {SUITED}"
            )
        if self.settings.embedding == "input":
            self.student.item_embedding = UntiedTable(table)

    def forward(self, *args):
        """The student's own forward."""
        return self.student(*args)

    def calculate_loss(self, interaction):
        """The student's own loss, without the teacher; DLLM2RecTrainer adds what is distilled."""
        return self.student.calculate_loss(interaction)

    def full_sort_predict(self, interaction):
        """Score of every item [B, n_items]."""
        return self.student.full_sort_predict(interaction)

    def predict(self, interaction):
        """Score of the batch's own items [B]."""
        if self.settings.embedding != "input":
            return self.student.predict(interaction)
        # RecBole's students look candidates up in the input table; with two tables only the output side may score.
        scores = self.full_sort_predict(interaction).view(len(interaction), -1)
        return scores.gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    def teach(self, vectors: Tensor, seed: int) -> None:
        """Let item vectors into the student's table.

        Args:
            vectors: One vector per item, by internal id, row 0 padding [n_items, d_z].
            seed: Seed of components that the vectors do not have.
        """
        table = self.student.item_embedding
        if self.settings.embedding == "init":
            generator = torch.Generator().manual_seed(seed)
            start = principal_components(
                vectors, table.embedding_dim, self.settings.embedding_std, self.settings.embedding_whiten, generator
            )
            table.weight.data.copy_(start)
        elif self.settings.embedding in ("input", "tied"):
            settings = self.settings
            taught = TaughtTable(table, vectors, settings.embedding_weight, settings.embedding_std, settings.offset)
            self.student.item_embedding = taught.to(table.weight.device)

    def folded_state(self) -> dict[str, Tensor]:
        """State of the plain student that ranks exactly like this model; what is saved."""
        table = self.student.item_embedding
        if not isinstance(table, TaughtTable):
            return self.state_dict()
        prefix = "student.item_embedding."
        state = {name: value for name, value in self.state_dict().items() if not name.startswith(prefix)}
        return state | {prefix + name: value for name, value in table.folded().items()}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Load a folded state, or the unfolded one of a model in training."""
        table = self.student.item_embedding
        if isinstance(table, TaughtTable) and "student.item_embedding.projector.weight" not in state_dict:
            plain = nn.Embedding(*table.input_table().shape, padding_idx=0, device=table.vectors.device)
            self.student.item_embedding = UntiedTable(plain) if self.settings.embedding == "input" else plain
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def refuse_other_scores(student: SequentialRecommender) -> None:
    """Refuse a student whose scores are not its state times its item table; all losses here are made of those.

    Raises:
        ValueError: The scores are something else (CORE's are cosines), or the student does not run; the message says which.
    """
    if fault := fault_of_scores(student):
        raise ValueError(
            f"student={type(student).__name__}: its scores are not its state times its item table ({fault}). {SUITED}"
        )


class DLLM2RecTrainer(SequenceTrainer):
    """Trains a student with L = L_base + lambda * L_ranking (Eq. 11), at all positions where the student allows it.

    Finds or builds the Knowledge first (`knowledge.ensure`), so stock RecBole pipelines need no further step.
    """

    wants_row_list = True

    def __init__(self, config, model):
        super().__init__(config, model)
        self.settings: Distillation = model.settings
        self.attached: Attached | None = None
        if self.settings.base == "bce" and self.item_loss.over != "all":
            raise ValueError(
                f"loss_over={self.item_loss.over}: distill_base=bce draws one negative of its own; there is distill_base=softmax. "
                "Set one of them."
            )
        choice(config, "teacher_trained_rows", ("drop", "drop_target", "keep"))
        refuse_other_scores(model.student)
        Part.from_config(config)  # what is no part is refused where nothing is labelled, too

    @property
    def network(self):
        """The model whose forward makes the states."""
        return self.model.student

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """Like RecBole's, after the teacher has been asked."""
        self.refuse_early(valid_data)
        dataset = train_data._dataset
        if self.settings.uses_rows:
            knowledge = ensure(self.config, train_data, valid_data)
            self.attached = attach(knowledge, dataset, self.settings.topk, self.config["teacher_history"])
            self.attached.treat_trained(self.config["teacher_trained_rows"], Log.from_dataset(dataset).items)
            self.attached.to(self.device)
            self._prepare_weights()
        if self.settings.uses_vectors:
            self.model.teach(teacher_vectors(self.config, train_data, valid_data), self.config["seed"])
            self.optimizer = self._build_optimizer()
        if self.settings.robust:
            counts = torch.bincount(dataset.inter_feat[self.config["ITEM_ID_FIELD"]], minlength=dataset.item_num)
            self.propensity = propensity_scores(counts).to(self.device)
        return super().fit(train_data, valid_data, verbose, saved, show_progress, callback_fn)

    def _prepare_weights(self):
        attached, settings = self.attached, self.settings
        used = attached.target_score[attached.index[attached.index >= 0]]
        if settings.temperature != "auto":
            temperature = float(settings.temperature)
        elif attached.scores_are == "log-probability":
            temperature = 1.0  # exp(-d) then is the probability
        else:
            temperature = (used.max().clamp_min(0) - used).median().clamp_min(1e-6).item()
        self.temperature = temperature
        self.row_confidence = torch.zeros_like(attached.target_score)
        self.row_confidence[attached.index[attached.index >= 0]] = truth_confidence(used, temperature)
        self.places = position_weight(attached.items.shape[1], settings.position_beta).to(self.device)
        self.logger.info(
            f"Ranking distillation ({settings.ranking}) on {attached.labelled} labelled rows of {attached.total}, "
            f"K={attached.items.shape[1]}, distances divided by {temperature:.4g}."
        )

    def fault_of_all(self):
        """The loss is made of the states of the student, so only causality matters; None."""
        return None

    def model_state(self):
        """What is saved: the student with its item table folded."""
        return self.model.folded_state()

    def batch_loss(self, batch):
        """Losses of a batch, as RecBole logs them: (base, ranking) or the base alone."""
        settings = self.settings
        hidden, target, row = self.targets_of(batch)
        table = self.network.item_embedding.weight
        index = self.attached.index[row] if settings.uses_rows else None
        negative = self._negatives(self._seen(batch), target) if settings.base == "bce" else None
        if settings.robust:
            return self._losses_of_all_scores(hidden, table, target, index, negative)
        if index is None:
            return self._base_loss(hidden, table, target, negative)
        if settings.ranking != "softmax":
            base = self._base_loss(hidden, table, target, negative)
            return base, self._loss_of_candidates(hidden, table, index, negative)
        rows = rows_at_a_time(self.item_loss.memory, len(table) * 2, self.device)  # scores, and those of labelled rows
        together = negative is None and self.item_loss.over == "all"  # one pass over the scores for both terms
        wanted = partial(self._wanted, index, 1 / max(1, int((index >= 0).sum())))
        base, ranking = soft_target_loss(hidden, table, target if together else None, rows, wanted)
        return base if together else base + self._base_loss(hidden, table, target, negative), ranking

    def _base_loss(self, hidden, table, target, negative):
        """The recommendation loss: over the catalogue, or of each target and one negative."""
        if negative is None:
            return self.item_loss(hidden, table, target)
        pair = scores_of(hidden, table, torch.stack([target, negative], dim=1))
        return functional.binary_cross_entropy_with_logits(pair, pair.new_tensor([1.0, 0.0]).expand_as(pair))

    def _wanted(self, index, share, scores, chunk):
        """Labelled rows among some targets, their candidates, and the weights of these in the loss (`soft_target_loss`)."""
        has, items, of_teacher, confidence = self._labels(index[chunk])
        own = self._own_lists(scores if len(has) == len(scores) else scores[has])
        return has, items, self.settings.weight * share * self._weights(items, of_teacher, confidence, own)

    def _loss_of_candidates(self, hidden, table, index, negative):
        """The ranking term in the forms that look at the candidates' scores only."""
        settings = self.settings
        has, items, of_teacher, confidence = self._labels(index)
        states = hidden[has].float()
        if not len(has):
            return states.sum()
        scores = scores_of(states, table, items)
        if settings.ranking == "kl":
            return settings.weight * kl_loss(scores, of_teacher, items > 0, self.temperature).mean()
        own = None
        if settings.consistency_weight:
            parts = states.detach().split(rows_at_a_time(self.item_loss.memory, len(table), self.device))
            with torch.autocast(states.device.type, enabled=False):
                own = torch.cat([self._own_lists(part @ table.detach().float().T) for part in parts])
        weight = self._weights(items, of_teacher, confidence, own)
        pushed = scores_of(states, table, negative[has, None])[:, 0] if settings.negative else None
        return settings.weight * ranking_loss(scores, weight, negative=pushed).mean()

    def _labels(self, index):
        """Which of some targets are labelled [l], and what the teacher said: candidates and scores [l, K], confidence [l]."""
        has = (index >= 0).nonzero().squeeze(1)
        index = index[has]
        return has, self.attached.items[index], self.attached.score[index], self.row_confidence[index]

    def _own_lists(self, scores):
        """The student's own top K for the consistency weight, if that counts."""
        return own_lists(scores, self.attached.items.shape[1]) if self.settings.consistency_weight else None

    def _losses_of_all_scores(self, hidden, table, target, index, negative):
        """Losses with the robust term, in which every score has a part of its own."""
        settings = self.settings
        # a base loss over all items shares its scores with the other terms; one over drawn items has its own
        apart = settings.base == "softmax" and self.item_loss.over != "all"
        labelled = 0 if index is None else int((index >= 0).sum())

        def terms(scores, chunk):
            """Shares of the base loss (as far as it is not computed apart) and of the ranking term."""
            drawn = None if negative is None else negative[chunk]
            base = self._base_terms(scores, target[chunk], drawn, apart) / len(target)
            if index is None:
                return (base,)
            return base, settings.weight * self._ranking(scores, index[chunk], drawn) / max(1, labelled)

        rows = rows_at_a_time(self.item_loss.memory, len(table) * RECORDED, self.device)
        first, *others = chunked_loss(hidden, table, terms, rows)
        first = first + self.item_loss(hidden, table, target) if apart else first
        return (first, *others) if others else first

    def _seen(self, batch):
        """Items that each target must not draw as its negative [T, l]."""
        items = batch[self.network.ITEM_SEQ]
        if not self.all_positions:
            return items
        upto = torch.ones(items.shape[1], items.shape[1], dtype=torch.bool, device=items.device).tril()
        return (items.unsqueeze(1) * upto)[batch["target_list"] > 0]

    def _base_terms(self, scores, target, negative, apart):
        """Sum over some targets of the robust term, and of what the base loss makes of scores over all items."""
        settings = self.settings
        total = settings.robust * robust_loss(scores, target[:, None], self.propensity, settings.robust_beta).sum()
        if negative is not None:
            pair = scores.gather(1, torch.stack([target, negative], dim=1))
            wanted = pair.new_tensor([1.0, 0.0]).expand_as(pair)
            total = total + functional.binary_cross_entropy_with_logits(pair, wanted, reduction="sum") / 2
        elif not apart:
            total = total + functional.cross_entropy(scores, target, reduction="sum")
        return total

    def _negatives(self, seen, target):
        """One uniform item per target that is neither in its history nor the target, from the trainer's own generator."""
        n_items = self.model.n_items
        taken = torch.cat([seen, target.unsqueeze(1)], dim=1)
        drawn = torch.randint(1, n_items, target.shape, generator=self.item_loss.generator).to(target.device)
        wrong = (taken == drawn.unsqueeze(1)).any(dim=1)
        for _ in range(3):  # a rejected draw is drawn again
            if not wrong.any():
                return drawn
            again = torch.randint(1, n_items, target.shape, generator=self.item_loss.generator).to(target.device)
            drawn = torch.where(wrong, again, drawn)
            wrong = (taken == drawn.unsqueeze(1)).any(dim=1)
        # what is left has read most of a small catalogue: draw from what is free, or from all if nothing is
        free = torch.ones(int(wrong.sum()), n_items).scatter(1, taken[wrong].cpu(), 0.0)
        free[:, 0] = 0
        free[free.sum(dim=1) == 0, 1:] = 1
        if len(free):
            drawn[wrong] = torch.multinomial(free, 1, generator=self.item_loss.generator).squeeze(1).to(drawn.device)
        return drawn

    def _ranking(self, logits, index, negative):
        """The ranking term with the robust one, summed over the labelled rows among some targets; 0 if there is none."""
        settings = self.settings
        has, items, of_teacher, confidence = self._labels(index)
        if not len(has):
            return logits.sum() * 0.0
        logits = logits[has]
        scores = logits.gather(1, items)
        if settings.ranking == "kl":
            return kl_loss(scores, of_teacher, items > 0, self.temperature).sum()
        weight = self._weights(items, of_teacher, confidence, self._own_lists(logits))
        total = logits[:, 1:].logsumexp(dim=1) if settings.ranking == "softmax" else None
        pushed = logits.gather(1, negative[has, None])[:, 0] if settings.negative else None
        robust = robust_loss(logits, items, self.propensity, settings.robust_beta)
        return (ranking_loss(scores, weight, total, pushed) + settings.robust * (weight * robust).sum(dim=1)).sum()

    def _weights(self, items, of_teacher, row_confidence, own):
        """gamma_p w^p + gamma_c w^c + gamma_o w^o [R, K], with the normalisation of the mode (Eqs. 6-8 and 10)."""
        settings, valid = self.settings, items > 0
        if settings.confidence == "candidate":
            confidence = candidate_confidence(of_teacher, valid, self.temperature)
        else:
            confidence = (row_confidence / items.shape[1]).unsqueeze(1)
        weight = settings.position_weight * self.places + settings.confidence_weight * confidence
        if own is not None:
            weight = weight + settings.consistency_weight * consistency(items, own)
        weight = weight * valid
        return weight / weight.sum(dim=1, keepdim=True).clamp_min(1e-12) if settings.normalize else weight
