"""BIGRec: an LLM writes the title of the next item, and the title is grounded in the catalogue by its vector.

Paper: Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems" (arXiv 2308.08434).

Differs from the authors' code: one prompt function for training and inference; the loss is on the answer alone unless
`lora_train_on_prompt`; early stopping on the answer loss; a text that equals a catalogue title takes that title's vector, so
that its distance is exactly 0; gamma of the re-weighting is chosen once on validation, not per metric and cut-off.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from recbole.utils import InputType, get_model
from torch import Tensor

from recbole_llm.artifacts import cached_tensor, digest
from recbole_llm.checkpoint import SUFFIX, read_checkpoint
from recbole_llm.config import check_range, check_topk, choice
from recbole_llm.grounding import INDEXES, METRICS, Grounder, best_gamma, min_max, popularity_weight, reweight
from recbole_llm.item_text import ItemText
from recbole_llm.prompts import PREAMBLE, Words, answer, beginning, prompt, read_answer
from recbole_llm.recommend import SavedCatalogue
from recbole_llm.report import SINGLE_TARGET, row_metric
from recbole_llm.rows import chosen_rows, eval_rows, some_of
from recbole_llm.sequences import Log
from recbole_llm.teacher import Teacher, sample_of_rows
from recbole_llm.trainer import SequenceTrainer

LEAST = {
    "generate_beams": 1, "generate_tokens_per_batch": 1, "generate_max_new_tokens": 1, "lora_max_length": 2, "ground_found": 1,
}  # fmt: skip
"""Least value of settings of what it writes, and learns to."""


class Shared:
    """The parts that a copy of the model shares with it: RecBole's FLOPs counter copies whole models."""

    def __init__(self):
        self.lm = None
        self.encoder = None
        self.grounder: Grounder | None = None
        self.collaborator = None
        self.vectors: dict[str, Tensor] = {}
        self.written: dict[str, Tensor] = {}

    def __deepcopy__(self, memo):
        return self


class BIGRec(Teacher):
    """An LLM as a RecBole sequential model: ranks the catalogue by the distance to the title it writes.

    The LLM is no registered submodule and is loaded at its first use; the adapters alone are the model's state.

    Args:
        config: RecBole Config; keys `llm*`, `prompt_*`, `lora_*`, `generate_*`, `ground_*`.
        dataset: RecBole's dataset with its title column loaded.

    Raises:
        ValueError: No title column, or a setting that is none of its choices.
    """

    input_type = InputType.POINTWISE
    scores_are = "distance"
    knows_by_token = True

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        check_topk(config, dataset.item_num)
        self.config = config
        self.text = ItemText.from_dataset(dataset, config["title_field"])
        self.words = Words(config["prompt_instruction"], config["prompt_lead"], config["prompt_preamble"] or PREAMBLE)
        self.history_items = config["teacher_history"]
        self.reweight = choice(config, "ground_reweight", ("none", "popularity", "collaborative"))
        choice(config, "ground_metric", METRICS)
        choice(config, "ground_index", INDEXES)
        choice(config, "llm_dtype", ("auto", "float32", "bfloat16"))
        for key, least in LEAST.items():
            check_range(config, key, least)
        if find_spec("faiss") is None:
            raise ValueError(
                "model=BIGRec: grounding needs FAISS, which is not installed. Install it: pip install faiss-cpu"
            )
        if self.reweight == "collaborative" and not Path(config["ground_collaborator"] or "").is_file():
            raise ValueError(
                f"ground_collaborator={config['ground_collaborator']}: no such file; ground_reweight=collaborative needs a sequential "
                "model of ours. Set ground_collaborator to its .safetensors file, or ground_reweight to none or popularity."
            )
        if self.history_items > self.max_seq_length:
            raise ValueError(
                f"teacher_history={self.history_items}: RecBole keeps {self.max_seq_length} items of a history only. Set "
                "MAX_ITEM_LIST_LENGTH to that much or teacher_history to less."
            )
        counts = torch.bincount(dataset.inter_feat[self.ITEM_ID].long(), minlength=self.n_items)
        self.popularity = popularity_weight(counts)
        self.gamma = 0.0
        self.plain_scores: Tensor | None = None
        self.tuned_on = (config["train_rows"], config["teacher_seed"])
        self.duplicates = {item for items in self.text.duplicates().values() for item in items}
        self.catalogue = set(self.text.titles[1:])
        self.outputs: list[tuple[str, bool, bool]] = []
        self.shared = Shared()
        self.pending: dict[str, Tensor] = {}

    @property
    def history_length(self) -> int:
        """Most titles in a prompt."""
        return self.history_items

    @property
    def lm(self):
        """The language model, loaded at its first use, with the adapters of a loaded checkpoint."""
        if self.shared.lm is None:
            from recbole_llm.lm import LanguageModel  # importing this file must not import an LLM library

            config = self.config
            self.shared.lm = LanguageModel.load(
                config["llm"], revision=config["llm_revision"], device=self.device, dtype=config["llm_dtype"]
            )
        if self.pending:
            self.shared.lm.load_adapter_state(self.pending)
            self.pending = {}
        return self.shared.lm

    @property
    def encoder(self):
        """What turns texts into vectors: the LLM with its adapters off, or the model that `ground_encoder` names."""
        name = self.config["ground_encoder"]
        if not name:
            return self.lm
        if self.shared.encoder is None:
            from recbole_llm.lm import LanguageModel

            self.shared.encoder = LanguageModel.load(name, device=self.device, key="ground_encoder")
        return self.shared.encoder

    @property
    def grounder(self) -> Grounder:
        """The catalogue as vectors, made at its first use."""
        if self.shared.grounder is None:
            self.shared.grounder = Grounder(self.config["ground_metric"], self.config["ground_index"]).fit(
                self.item_embeddings()
            )
        return self.shared.grounder

    def prompts(self, histories: Tensor) -> list[str]:
        """Prompts of histories of internal ids, padded on the right with 0 [B, L]; the last titles, oldest first."""
        return [prompt(self.words, self.text.of(row[row > 0][-self.history_items :])) for row in histories.cpu()]

    def work(self, histories: Tensor) -> Tensor:
        """Length of the prompts in characters [B]."""
        return torch.tensor([sum(map(len, self.text.of(row))) for row in histories.cpu()])

    def trained_on(self, n_rows: int) -> Tensor:
        """Which training rows the LLM is tuned on; bool [n_rows]."""
        flags = torch.zeros(n_rows, dtype=torch.bool)
        flags[sample_of_rows(n_rows, *self.tuned_on)] = True
        return flags

    def item_embeddings(self) -> Tensor:
        """Vectors of all titles by internal id, row 0 zero [n_items, d]; equal titles have equal vectors."""
        if not self.shared.vectors:
            titles, encoder, config = sorted(self.catalogue), self.encoder, self.config
            file = f"{config['dataset']}-{digest({'encoder': encoder.digest, 'titles': titles})}.safetensors"
            vectors = cached_tensor(
                Path(config["checkpoint_dir"]) / "item_vectors" / file,
                lambda: encoder.embed(titles, progress=config["show_progress"], description="Embed titles"),
            )
            self.shared.vectors = dict(zip(titles, vectors, strict=True))
        table = torch.stack([self.shared.vectors[title] for title in self.text.titles[1:]])
        return torch.cat([torch.zeros_like(table[:1]), table])

    def write_titles(self, histories: Tensor) -> list[str]:
        """The title that the LLM writes after each history [B, L]."""
        config = self.config
        allowed = (
            self.lm.answer_tokens([answer(title) for title in sorted(self.catalogue)])
            if config["generate_constrained"]
            else None
        )
        texts = self.lm.generate(
            self.prompts(histories),
            max_new_tokens=config["generate_max_new_tokens"],
            beams=config["generate_beams"],
            tokens_per_batch=config["generate_tokens_per_batch"],
            allowed=allowed,
            prefix=beginning(self.words),
            progress=False,
        )
        return [read_answer(text) for text in texts]

    def vectors_of(self, titles: list[str]) -> Tensor:
        """Vectors of written titles [B, d]; no title is embedded twice, an empty text is the catalogue's mean."""
        if not self.shared.vectors:
            self.item_embeddings()
        written = self.shared.written
        unknown = sorted({title for title in titles if title} - self.shared.vectors.keys() - written.keys())
        if unknown:
            written |= zip(unknown, self.encoder.embed(unknown), strict=True)
        if not all(titles) and "" not in written:
            written[""] = self.item_embeddings()[1:].mean(dim=0)
        return torch.stack([self.shared.vectors.get(title, written.get(title)) for title in titles])

    def full_sort_predict(self, interaction):
        """Minus the distance from the written title to every item [B, n_items]; re-weighted if the settings say so."""
        scores = self.plain_scores = self.grounded(self.vectors_after(interaction)).to(self.device)
        if self.gamma and self.reweight != "none":
            scores = with_finite_padding(-reweight(-scores, self.statistics(interaction), self.gamma))
        return scores.clone()  # RecBole writes into what it is given

    def vectors_after(self, interaction) -> Tensor:
        """Vectors of what the LLM writes after each history [B, d]; what it wrote is kept in `outputs`."""
        histories = interaction[self.ITEM_SEQ]
        titles = self.write_titles(histories)
        seen = [set(self.text.of(row)) for row in histories.cpu()]
        self.outputs += [
            (title, title in self.catalogue, title in past) for title, past in zip(titles, seen, strict=True)
        ]
        return self.vectors_of(titles)

    def candidates(self, batch, k):
        """Like any teacher's, but nobody looks at the distances to all items unless they are re-weighted."""
        # the last bits of a vector depend on the titles it is embedded with, and those must not depend on what was labelled before
        self.shared.written.clear()
        if self.gamma and self.reweight != "none":
            return super().candidates(batch, k)
        vectors = self.vectors_after(batch)
        items, score = self.grounder.search(vectors, k)
        target = self.grounder.score_of(vectors, batch[self.ITEM_ID].cpu().unsqueeze(1))
        return items, with_finite_tail(score), target.squeeze(1)

    def grounded(self, vectors: Tensor) -> Tensor:
        """Score of every item [B, n_items]; items that an approximate index does not find stand below all that it finds."""
        if self.config["ground_index"] == "exact":
            return with_finite_padding(self.grounder.scores(vectors))
        items, score = self.grounder.search(vectors, min(self.config["ground_found"], self.n_items - 1))
        score = score.masked_fill(items == 0, score[torch.isfinite(score)].min() - 1)
        below = (score.min(dim=1, keepdim=True).values - 1).expand(-1, self.n_items)
        return with_finite_padding(below.scatter(1, items, score))

    def statistics(self, interaction) -> Tensor:
        """BIGRec's W: popularity [n_items], or what another recommender says of these rows, min-max per row [B, n_items]."""
        if self.reweight == "popularity":
            return self.popularity.to(self.device)
        if self.shared.collaborator is None:
            self.shared.collaborator = self._load_collaborator()
        with torch.no_grad():
            scores = self.shared.collaborator.full_sort_predict(interaction).view(len(interaction), -1)
        weight = torch.zeros_like(scores)
        weight[:, 1:] = min_max(scores[:, 1:])
        return weight

    def _load_collaborator(self):
        file = self.config["ground_collaborator"]
        saved = read_checkpoint(file, self.device)
        if list(saved["meta"]["items"]) != list(self.text.tokens):
            raise ValueError(
                f"ground_collaborator={file}: was trained on other items than these data have, or in another order. Train it on the "
                "same data files."
            )
        catalogue = SavedCatalogue(self.ITEM_ID, self.n_items, saved["meta"]["n_users"])
        model = get_model(saved["config"]["model"])(saved["config"], catalogue).to(self.device)
        model.load_state_dict(saved["state_dict"])
        return model.eval()

    def predict(self, interaction):
        """Score of the batch's own items [B]."""
        return self.full_sort_predict(interaction).gather(1, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    def calculate_loss(self, interaction):
        """BIGRec is tuned by its own trainer.

        Raises:
            NotImplementedError: Always; names the trainer.
        """
        raise NotImplementedError(
            "BIGRec is tuned on text by BIGRecTrainer: use RecBole's get_trainer, which finds it."
        )

    def legality(self) -> dict[str, float]:
        """What the LLM wrote since the last reset: shares of catalogue titles and of repeats, and of distinct outputs."""
        count = max(1, len(self.outputs))
        return {
            "rows": len(self.outputs),
            "catalogue_titles": sum(legal for _, legal, _ in self.outputs) / count,
            "repeats_history": sum(repeat for _, _, repeat in self.outputs) / count,
            "distinct": len({title for title, _, _ in self.outputs}) / count,
        }

    def provenance(self) -> dict[str, Any]:
        """Where the weights come from, for tables and manifests."""
        return {"llm": self.lm.provenance, "llm_digest": self.lm.digest}

    def state_dict(self, *args, **kwargs):
        """The adapters."""
        if self.pending:
            return dict(self.pending)
        return self.shared.lm.adapter_state() if self.shared.lm is not None and self.shared.lm.has_adapter else {}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """Take adapters; they reach the LLM when it is used."""
        self.pending = dict(state_dict)

    def other_parameter(self):
        """What was chosen on validation, and which rows the LLM was tuned on (number and seed)."""
        return {"gamma": self.gamma, "tuned_on": list(self.tuned_on)}

    def load_other_parameter(self, para):
        """Take what was chosen on validation."""
        self.gamma = (para or {}).get("gamma", 0.0)
        self.tuned_on = tuple((para or {}).get("tuned_on", self.tuned_on))


class BIGRecTrainer(SequenceTrainer):
    """Tunes the LLM on a few training rows, early stopped on the answer loss of a few validation rows."""

    twin_rows = 0
    """Rows of the last evaluation whose target shares its title."""

    def _build_optimizer(self, **kwargs):
        return None  # the LLM's adapters do not exist yet; lm.tune has the optimizer

    def fit(self, train_data, valid_data=None, verbose=True, saved=True, show_progress=False, callback_fn=None):
        """Like RecBole's: returns minus the best answer loss, and the losses; nothing is selected on rankings."""
        config, model, self.dataset = self.config, self.model, train_data._dataset
        model.lm.refuse_longer(config["generate_max_new_tokens"])
        log = Log.from_dataset(self.dataset)
        rows = log.rows()[sample_of_rows(len(log.rows()), config["train_rows"], config["teacher_seed"])]
        histories, _ = log.history(rows, model.history_length)
        valid = eval_rows(valid_data, config["valid_rows"], config["teacher_seed"]) if valid_data else None
        self.logger.info(
            f"Tuning {config['llm']} with LoRA on {len(rows)} rows, stopping on {len(valid) if valid else 0} validation rows."
        )
        result = model.lm.tune(
            model.prompts(histories),
            [answer(title) for title in model.text.of(log.items[rows])],
            model.prompts(valid[model.ITEM_SEQ]) if valid else [],
            [answer(title) for title in model.text.of(valid[model.ITEM_ID])] if valid else [],
            learning_rate=config["learning_rate"],
            epochs=config["epochs"],
            batch_size=config["train_batch_size"],
            rank=config["lora_rank"],
            alpha=config["lora_alpha"],
            dropout=config["lora_dropout"],
            train_on_prompt=config["lora_train_on_prompt"],
            warmup_steps=config["lora_warmup_steps"],
            patience=config["stopping_step"],
            evals_per_epoch=config["lora_evals_per_epoch"],
            max_length=config["lora_max_length"],
            seed=config["teacher_seed"],
            state_folder=self.state_folder if saved else None,
            progress=show_progress,
        )
        loss = result["best_valid_loss"] if valid else result["train_loss"][-1]
        self.best_valid_result = {"answer_loss": loss}
        self.best_valid_score = -loss  # RecBole takes the larger score for the better one
        if model.reweight != "none" and valid:
            self._choose_gamma(valid)
        if saved:
            self._save_checkpoint(-1, verbose=verbose)
        if callback_fn:
            callback_fn(0, self.best_valid_score)
        return self.best_valid_score, self.best_valid_result

    def _save_checkpoint(self, epoch, verbose=True, **kwargs):
        """Like SequenceTrainer's; the adapters also go to a folder that `PeftModel.from_pretrained` opens."""
        super()._save_checkpoint(epoch, verbose=verbose, **kwargs)
        self.model.lm.save_adapter(self.saved_model_file.removesuffix(SUFFIX) + "-adapter")

    def _choose_gamma(self, valid):
        model = self.model
        model.gamma = 0.0
        valid = valid.to(model.device)
        distances = -model.full_sort_predict(valid).cpu()
        distances[:, 0] = float("inf")
        model.gamma, ndcg = best_gamma(
            distances, model.statistics(valid).cpu(), valid[model.ITEM_ID].cpu(), self.config["ground_gammas"]
        )
        self.logger.info(
            f"gamma={model.gamma} for {model.reweight}, chosen on {len(valid)} validation rows (NDCG@20 {ndcg:.4f})."
        )

    def evaluate(self, eval_data, load_best_model=True, model_file=None, show_progress=False):
        """Like RecBole's, on `teacher_eval_rows` seeded rows; also keeps what the LLM's outputs were like."""
        self.model.outputs.clear()
        self.twin_rows = 0
        rows = chosen_rows(eval_data._dataset, self.config["teacher_eval_rows"], self.config["teacher_seed"])
        self.evaluated_rows = rows.tolist() if len(rows) < len(eval_data._dataset) else None
        result = super().evaluate(some_of(eval_data, rows, self.config), load_best_model, model_file, show_progress)
        self.legality = self.model.legality()
        self.legality |= {"shared_titles": len(self.model.duplicates), "twin_rows": self.twin_rows}
        self.legality["without_repeats"] = self._without_repeats(eval_data._dataset[rows])
        shares = ", ".join(f"{name} {value:.1%}" for name, value in self.legality.items() if isinstance(value, float))
        self.logger.info(f"What the LLM wrote for {self.legality['rows']} rows: {shares}.")
        return result

    def _without_repeats(self, rows) -> dict[str, Any]:
        """Metrics over the rows whose target is not in the history: a text teacher gains much by repeating it."""
        model = self.model
        repeat = (rows[model.ITEM_SEQ] == rows[model.ITEM_ID].unsqueeze(1)).any(dim=1).tolist()
        ranks = [rank for rank, again in zip(self.ranks, repeat, strict=True) if not again]
        values = {
            f"{metric.lower()}@{k}": float(row_metric(ranks, metric, k).mean()) if ranks else 0.0
            for k in self.config["topk"]
            for metric in self.config["metrics"]
            if metric.lower() in SINGLE_TARGET
        }
        return {"rows": len(ranks), "repeat_rows": sum(repeat), "metrics": values}

    def _full_sort_batch_eval(self, batched_data):
        """Like RecBole's; among items of one title the target counts as the first, as in the authors' evaluation."""
        interaction, scores, positive_u, positive_i = super()._full_sort_batch_eval(batched_data)
        twins = [row for row, item in enumerate(positive_i.tolist()) if item in self.model.duplicates]
        self.twin_rows += len(twins)
        for row in twins:
            user, item = positive_u[row], positive_i[row]
            scores[user, item] = torch.nextafter(scores[user, item], torch.tensor(float("inf"), device=scores.device))
        return interaction, scores, positive_u, positive_i


def with_finite_padding(scores: Tensor) -> Tensor:
    """Scores whose padding item is last; RecBole sets it to -inf itself, and a finite row is the contract."""
    scores = scores.clone()
    scores[:, 0] = scores[:, 1:].min(dim=1).values - 1
    return scores


def with_finite_tail(score: Tensor) -> Tensor:
    """Scores of candidates, best first [B, K], where the last one's stands where an approximate index found no more."""
    last = score.masked_fill(score == -torch.inf, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(score == -torch.inf, last, score)
