"""DLLM2Rec: the whole objective row by row, every student and switch, and a student that serves without its teacher."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.data.interaction import Interaction
from torch import nn
from torch.nn import functional

from recbole_llm.artifacts import tensors_digest, write_json, write_tensors
from recbole_llm.attached import attach
from recbole_llm.distillation import own_lists, position_weight, principal_components
from recbole_llm.knowledge import Knowledge
from recbole_llm.losses import RECORDED
from recbole_llm.model import dllm2rec
from recbole_llm.model.dllm2rec import Distillation
from recbole_llm.sequences import Log, row_positions
from recbole_llm.tables import TaughtTable, UntiedTable
from tests.oracle import NO_DROPOUT, SIZES, Killed, Oracle, ask, distilled, prepared, student
from tests.ring import N_ITEMS, TOKENS, following
from tests.small_logs import write_log

STILL = {**NO_DROPOUT, "learning_rate": 0.0, "train_batch_size": 100_000, "epochs": 1}
NOISE = {"dataset": "noise", "title_field": None, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
RANKING_ALONE = {"distill_embedding": "none", "distill_ranking": "softmax", "distill_base": "softmax"}

LABELS_ONLY = {
    **NOISE, **RANKING_ALONE, "epochs": 25, "eval_step": 0, "distill_topk": 1, "distill_weight": 10.0,
    "distill_position_weight": 1.0, "distill_confidence_weight": 0.0, "distill_consistency_weight": 0.0,
}  # fmt: skip


@pytest.fixture
def noise(tmp_path):
    """A log of the ring's items in random order: what follows what is known to the oracle alone."""
    generator = torch.Generator().manual_seed(3)
    length = torch.randint(5, 12, (60,), generator=generator).tolist()
    users = {
        f"u{user}": [TOKENS[item] for item in torch.randint(24, (n,), generator=generator)]
        for user, n in enumerate(length)
    }
    users["all"] = list(TOKENS[:12])
    users["rest"] = list(TOKENS[12:])
    return write_log(tmp_path / "data", "noise", users)


def losses(parts):
    """What fit logged as the loss of its only epoch."""
    return parts.trainer.train_loss_dict[0]


def still(data_path, knowledge, **settings):
    """Loss of all training targets in one batch, for a student that does not move."""
    return losses(distilled(data_path, knowledge, **STILL | settings))


def scores_of(parts, model=None):
    """Scores of all test rows."""
    model = (model or parts.model).eval()
    with torch.no_grad():
        return model.full_sort_predict(parts.test._dataset.inter_feat)


def rewritten(knowledge, folder, **columns):
    """The same Knowledge with some columns replaced, in another folder."""
    changed = replace(knowledge, **columns)
    shard = {name: getattr(changed, name) for name in ("row", "items", "score", "target_score", "trained")}
    vectors = {"item_embedding": changed.item_embedding}
    write_tensors(folder / "shard-00000.safetensors", shard)
    write_tensors(folder / "item_embedding.safetensors", vectors)
    parts = {"shard-00000.safetensors": tensors_digest(shard), "item_embedding.safetensors": tensors_digest(vectors)}
    write_json(folder / "manifest.json", knowledge.manifest | {"parts": parts})
    return Knowledge.load(folder)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("embedding", ["input", "tied"])
def test_a_taught_table_is_equation_13(ring, embedding, offset):
    settings = {"distill_embedding": embedding, "distill_embedding_weight": 0.5, "distill_offset": offset}
    parts = student(prepared(ring, **settings))
    own = parts.model.student.item_embedding.weight.detach().clone()
    vectors = Oracle(parts.config, parts.train._dataset).item_embeddings()
    parts.model.teach(vectors, seed=0)
    table = parts.model.student.item_embedding
    assert isinstance(table, TaughtTable)
    projected = vectors @ table.projector.weight.T + table.projector.bias
    assert projected[1:].std().item() == pytest.approx(0.1, rel=1e-3)
    expected = 0.5 * projected + (own if offset else 0)
    assert torch.allclose(table.input_table()[1:], expected[1:], atol=1e-6)
    assert table.input_table()[0].abs().max() == 0 and table(torch.tensor([0, 3]))[0].abs().max() == 0
    assert torch.equal(table.weight, own if embedding == "input" else table.input_table())
    trained = {name for name, _ in table.named_parameters()}
    expected_names = {"projector.weight", "projector.bias"} | ({"offset"} if offset else set())
    assert trained == expected_names | ({"output"} if embedding == "input" else set()), "z itself stays frozen"


def test_init_starts_from_the_components_and_is_a_plain_table(ring):
    parts = student(prepared(ring, distill_embedding="init"))
    vectors = Oracle(parts.config, parts.train._dataset).item_embeddings()
    parts.model.teach(vectors, seed=7)
    table = parts.model.student.item_embedding
    assert type(table) is nn.Embedding
    assert torch.equal(
        table.weight.data, principal_components(vectors, 32, 0.1, True, torch.Generator().manual_seed(7))
    )


@pytest.mark.parametrize("embedding", ["none", "init", "input", "tied"])
def test_a_folded_student_ranks_exactly_like_the_taught_one(ring, embedding):
    parts = prepared(ring, distill_embedding=embedding)
    knowledge = ask(parts, "kn")
    parts = distilled(ring, knowledge, distill_embedding=embedding, epochs=2, **NO_DROPOUT)
    before = scores_of(parts)
    state = {name: value.clone() for name, value in parts.model.folded_state().items()}
    plain = student(prepared(ring, distill_embedding=embedding))
    names = {name.removeprefix("student.item_embedding.") for name in state if "item_embedding" in name}
    assert names == ({"input", "output"} if embedding == "input" else {"weight"})
    assert state.keys() == plain.model.state_dict().keys(), "a saved student has no teacher in it"
    plain.model.load_state_dict(state)
    assert torch.equal(scores_of(parts, plain.model), before)
    kind = UntiedTable if embedding == "input" else nn.Embedding
    parts.model.load_state_dict(state)
    assert type(parts.model.student.item_embedding) is kind
    assert torch.equal(scores_of(parts), before)


@pytest.mark.parametrize("embedding", ["input", "tied"])
def test_predict_is_a_column_of_full_sort_predict(ring, embedding):
    knowledge = ask(prepared(ring), "kn")
    parts = distilled(ring, knowledge, distill_embedding=embedding)
    rows = parts.test._dataset.inter_feat
    with torch.no_grad():
        expected = scores_of(parts).gather(1, rows["item_id"].unsqueeze(1)).squeeze(1)
        assert torch.allclose(parts.model.predict(rows), expected, atol=1e-5)


@pytest.mark.parametrize("embedding", ["input", "tied"])
def test_every_part_of_a_taught_table_is_trained(ring, embedding):
    """The parts come after the optimizer was made; z never moves."""
    knowledge = ask(prepared(ring), "kn")
    before, after = (
        distilled(ring, knowledge, distill_embedding=embedding, learning_rate=rate).model.student.item_embedding
        for rate in (0.0, 0.01)
    )
    moved = {name for name, value in after.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    assert moved == {"offset", "projector.weight", "projector.bias"} | ({"output"} if embedding == "input" else set())
    assert torch.equal(before.vectors, after.vectors)


def test_padding_rows_stay_zero_and_are_never_ranked(ring):
    knowledge = ask(prepared(ring), "kn")
    parts = distilled(ring, knowledge, distill_embedding="tied", epochs=2, saved=True)
    assert parts.model.folded_state()["student.item_embedding.weight"][0].abs().max() == 0
    assert parts.trainer.evaluate(parts.test)["hit@5"] > 0


def test_a_model_can_be_copied_at_any_time(ring):
    """RecBole's FLOPs counter copies whole models; a table must not hold on to the graph of a step."""
    parts = prepared(ring, distill_embedding="tied")
    knowledge = ask(parts, "kn")
    parts.config["teacher_knowledge"] = str(knowledge.folder)
    student(parts).trainer.fit(parts.train, saved=False)
    again = copy.deepcopy(parts.model)
    assert torch.equal(scores_of(parts, again), scores_of(parts))


@pytest.mark.parametrize("name", SIZES)
def test_every_promised_student_is_taught(ring, name):
    knowledge = ask(prepared(ring), "kn")
    parts = distilled(ring, knowledge, student=name, saved=True)
    assert parts.trainer.all_positions is (name in ("SASRec", "GRU4Rec"))
    assert math.isfinite(losses(parts)) and 0 <= parts.trainer.evaluate(parts.test)["hit@5"] <= 1
    alone = distilled(ring, None, student=name, distill_mode="off")
    assert losses(alone) != losses(parts)


def test_a_taught_sasrec_knows_the_ring(ring):
    knowledge = ask(prepared(ring), "kn")
    parts = distilled(ring, knowledge, epochs=20, saved=True)
    assert parts.trainer.evaluate(parts.test)["hit@1"] == 1


@pytest.mark.parametrize("mode", ["best", "paper", "code", "off"])
def test_every_mode_trains(ring, mode):
    knowledge = ask(prepared(ring), "kn")
    parts = distilled(ring, knowledge, distill_mode=mode, epochs=8, saved=True)
    assert all(map(math.isfinite, parts.trainer.train_loss_dict.values()))
    first, *_, last = parts.trainer.train_loss_dict.values()
    assert last < first
    assert parts.trainer.evaluate(parts.test)["hit@5"] > 0.9
    if mode == "off":
        assert parts.trainer.attached is None


def test_off_is_the_student_as_it_is(ring):
    """With the teacher off the loss is that of the stock model under our trainer."""
    off = distilled(ring, None, distill_mode="off", **STILL)
    rows = off.train._dataset.inter_feat
    off.model.eval()
    with torch.no_grad():
        assert losses(off) == pytest.approx(off.model.student.calculate_loss(rows).item(), rel=1e-5)


def test_modes_mean_what_the_yaml_says_and_single_keys_win(ring):
    def chosen(**settings):
        return Distillation.from_config(prepared(ring, **settings).config)

    paper, code, best = (chosen(distill_mode=mode) for mode in ("paper", "code", "best"))
    for settings in (paper, code, best):
        assert (settings.position_weight, settings.confidence_weight, settings.consistency_weight) == (0.3, 0.5, 0.1)
    assert (paper.base, paper.ranking, paper.confidence, paper.normalize, paper.negative) == (
        "bce",
        "sigmoid",
        "truth",
        False,
        False,
    )
    assert (code.base, code.ranking, code.confidence, code.normalize, code.negative) == (
        "bce",
        "sigmoid",
        "candidate",
        True,
        True,
    )
    assert (code.embedding, code.embedding_weight, code.weight, code.robust) == ("input", 0.2, 0.8, 1.0)
    assert best.base == "softmax" and best.ranking in ("softmax", "kl", "none")
    mixed = chosen(distill_mode="code", distill_weight=0.25, distill_normalize=False)
    assert mixed == replace(code, weight=0.25, normalize=False)


def row_by_row(parts, knowledge, settings):
    """The ranking term as the paper states it, in plain Python, from the scores of RecBole's own rows."""
    dataset = parts.train._dataset
    rows, log = dataset.inter_feat, Log.from_dataset(dataset)
    with torch.no_grad():
        scores = parts.model.eval().full_sort_predict(rows).double().tolist()
    tokens = [str(token) for token in dataset.field2id_token["item_id"]]
    number = torch.searchsorted(log.rows(), row_positions(dataset)).tolist()
    length, history, target = rows["item_length"].tolist(), rows["item_id_list"].tolist(), rows["item_id"].tolist()
    labelled, distances = [], {}
    for at, row in enumerate(number):
        if row in set(knowledge.row.tolist()):
            candidates = [following(tokens[history[at][length[at] - 1]])]
            while len(candidates) < settings.topk:
                candidates.append(following(candidates[-1]))
            labelled.append((at, [tokens.index(token) for token in candidates]))
            distances[at] = (TOKENS.index(tokens[target[at]]) - TOKENS.index(candidates[0])) % N_ITEMS
    temperature = sorted(distances.values())[(len(distances) - 1) // 2]
    mean = sum(math.exp(-d / temperature) for d in distances.values()) / len(distances)
    k, total = settings.topk, 0.0
    for at, items in labelled:
        s = scores[at]
        own = sorted(range(1, len(s)), key=lambda item: -s[item])[:k]
        position = [math.exp(-r) / sum(math.exp(-q) for q in range(1, k + 1)) for r in range(1, k + 1)]
        softened = [math.exp(-r / temperature) for r in range(k)]  # the oracle's candidates are 0, 1, 2, ... away
        if settings.ranking == "kl":
            p = [value / sum(softened) for value in softened]
            q = [math.exp(s[item]) / sum(math.exp(s[other]) for other in items) for item in items]
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            continue
        weights = []
        for r, item in enumerate(items):
            truth = math.exp(-distances[at] / temperature) / mean / k
            confidence = truth if settings.confidence == "truth" else softened[r] / sum(softened)
            weight = settings.position_weight * position[r] + settings.confidence_weight * confidence
            weights.append(weight + settings.consistency_weight * (item in own))
        if settings.normalize:
            weights = [weight / sum(weights) for weight in weights]
        for weight, item in zip(weights, items, strict=True):
            p = (
                math.exp(s[item]) / sum(map(math.exp, s[1:]))
                if settings.ranking == "softmax"
                else 1 / (1 + math.exp(-s[item]))
            )
            total -= weight * math.log(p)
    return total / len(labelled)


@pytest.mark.parametrize("positions", ["all", "last"])
@pytest.mark.parametrize(
    "settings",
    [
        {"distill_ranking": "sigmoid"},
        {"distill_ranking": "softmax"},
        {"distill_ranking": "kl"},
        {"distill_ranking": "sigmoid", "distill_confidence": "candidate", "distill_normalize": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_objective_is_equations_5_to_11_row_by_row(noise, settings, positions):
    chosen = {
        **NOISE,
        **STILL,
        **RANKING_ALONE,
        "distill_weight": 0.7,
        "positions": positions,
        "distill_topk": 3,
        **settings,
    }
    knowledge = ask(prepared(noise, **chosen), "kn", rows=90)
    assert len(knowledge.row) == 90
    parts = distilled(noise, knowledge, **chosen)
    base = still(noise, knowledge, **chosen | {"distill_weight": 0.0})
    expected = row_by_row(parts, knowledge, parts.model.settings)
    assert losses(parts) - base == pytest.approx(0.7 * expected, rel=2e-4)
    with torch.no_grad():
        rows = parts.train._dataset.inter_feat
        assert base == pytest.approx(
            functional.cross_entropy(parts.model.full_sort_predict(rows), rows["item_id"]).item(), rel=1e-5
        )


def test_shares_of_the_weight_add_up(noise):
    """Eq. 10 is a sum: without normalisation the ablation rows are its parts."""
    chosen = {**NOISE, **RANKING_ALONE, "distill_weight": 1.0}
    knowledge = ask(prepared(noise, **NOISE), "kn", rows=50)
    shares = {"position": 0.3, "confidence": 0.5, "consistency": 0.1}
    none = {f"distill_{name}_weight": 0.0 for name in shares}
    base = still(noise, knowledge, **chosen, **none)
    part = {
        name: still(noise, knowledge, **chosen | none | {f"distill_{name}_weight": share}) - base
        for name, share in shares.items()
    }
    assert all(value > 1e-3 for value in part.values())
    assert still(noise, knowledge, **chosen) - base == pytest.approx(sum(part.values()), rel=1e-3)
    assert still(noise, knowledge, **chosen | {"distill_weight": 2.0}) - base == pytest.approx(
        2 * sum(part.values()), rel=1e-3
    )


@pytest.mark.parametrize(
    "switch",
    [
        {"distill_ranking": "none"},
        {"distill_weight": 0.0},
        {"distill_position_weight": 0.0},
        {"distill_confidence_weight": 0.0},
        {"distill_consistency_weight": 0.0},
        {"distill_robust": 0.0},
        {"distill_negative": False},
        {"distill_normalize": False},
        {"distill_confidence": "truth"},
        {"distill_base": "softmax", "distill_negative": False},
        {"distill_position_beta": 3.0},
        {"distill_temperature": 0.5},
        {"distill_topk": 2},
        {"distill_robust_beta": 3.0},
    ],
    ids=lambda switch: next(iter(switch)),
)
def test_every_term_of_the_released_code_can_be_switched_off(noise, switch):
    knowledge = ask(prepared(noise, **NOISE), "kn")
    whole = still(noise, knowledge, **NOISE, distill_mode="code")
    assert still(noise, knowledge, **NOISE, distill_mode="code", **switch) != pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    "switch", [{"distill_embedding": "none"}, {"distill_embedding_weight": 0.0}, {"distill_offset": False}]
)
def test_the_item_vectors_can_be_switched_off(ring, switch):
    knowledge = ask(prepared(ring), "kn")
    whole = still(ring, knowledge, distill_embedding="tied", distill_weight=0.0)
    assert still(ring, knowledge, **{"distill_embedding": "tied", "distill_weight": 0.0} | switch) != pytest.approx(
        whole, rel=1e-6
    )


def test_the_embedding_weight_scales_the_projection_only(ring):
    """Eq. 13 with a = 0 is the offset alone: the student as it was."""
    knowledge = ask(prepared(ring), "kn")
    settings = {"distill_weight": 0.0, "distill_base": "softmax"}
    nothing = still(ring, knowledge, distill_embedding="tied", distill_embedding_weight=0.0, **settings)
    assert nothing == pytest.approx(still(ring, knowledge, distill_embedding="none", **settings), rel=1e-3)
    assert nothing != pytest.approx(
        still(ring, knowledge, distill_embedding="tied", distill_embedding_weight=5.0, **settings), rel=1e-2
    )


@pytest.mark.parametrize(
    ("name", "ranking", "embedding"),
    [
        ("SASRec", "softmax", "none"),
        ("GRU4Rec", "sigmoid", "input"),
        ("SASRec", "kl", "tied"),
        ("GRU4Rec", "softmax", "init"),
    ],
)
def test_all_positions_train_what_prefix_rows_train(noise, name, ranking, embedding):
    """Same loss, and one plain gradient step lands on the same weights."""
    settings = {
        **NOISE,
        "student": name,
        "learner": "sgd",
        "learning_rate": 1.0 if embedding == "init" else 0.5,  # a table with a large start has small gradients
        "train_batch_size": 100_000,
        "distill_topk": 3,
    }
    settings |= {
        "distill_embedding": embedding,
        "distill_base": "softmax",
        "distill_ranking": ranking,
        "distill_weight": 1.0,
    }
    settings |= NO_DROPOUT if name == "SASRec" else {"dropout_prob": 0.0}
    knowledge = ask(prepared(noise, **NOISE), "kn", rows=60)
    runs = [distilled(noise, knowledge, positions=positions, **settings) for positions in ("all", "last")]
    assert [run.trainer.all_positions for run in runs] == [True, False]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    moved = 0.0
    start = distilled(noise, knowledge, positions="last", **settings | {"learning_rate": 0.0}).model.state_dict()
    for (key, one), other in zip(runs[0].model.state_dict().items(), runs[1].model.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=2e-5), key
        moved = max(moved, (one - start[key]).abs().max().item())
    assert moved > 1e-2, "a step that moves nothing shows nothing"


@pytest.mark.parametrize(
    "settings", [{"distill_ranking": "softmax"}, {"distill_mode": "code", "distill_negative": False}]
)
def test_targets_of_a_window_lose_what_prefixes_cut_at_its_start_lose(noise, settings):
    """Users longer than L + 1: the same loss terms for the rows of a window as for its prefixes, one by one."""
    chosen = {**NOISE, "MAX_ITEM_LIST_LENGTH": 4, "window_overlap": 1, "distill_embedding": "tied", **settings}
    knowledge = ask(prepared(noise, **NOISE), "kn", rows=80)
    trainer = distilled(noise, knowledge, **chosen, **STILL).trainer
    trainer._negatives = lambda seen, target: target % 24 + 1  # the same ones on both sides
    cut = trainer.loader.windows
    assert len(cut.start) > len(trainer.loader.log.users)
    batch = trainer.loader.batch(torch.arange(len(cut.start)))
    every = trainer.batch_loss(batch)
    window, at = (batch["row_list"] >= 0).nonzero(as_tuple=True)
    prefixes = {
        "user_id": batch["user_id"][window],
        "item_id_list": torch.where(torch.arange(4) <= at[:, None], batch["item_id_list"][window], 0),
        "item_length": at + 1,
        "item_id": batch["target_list"][window, at],
        "row_list": batch["row_list"][window, at],
    }
    trainer.all_positions = False
    alone = trainer.batch_loss(Interaction(prefixes))
    assert len(every) == len(alone) == 2 and every[1] != 0
    assert [part.item() for part in every] == pytest.approx([part.item() for part in alone], rel=1e-5)
    gradients = [
        torch.autograd.grad(sum(part), list(trainer.model.parameters()), allow_unused=True) for part in (every, alone)
    ]
    assert all(
        one is other is None or torch.allclose(one, other, atol=1e-5) for one, other in zip(*gradients, strict=True)
    )


def share_of_ring_steps(parts):
    """For how many of many random histories a student names the item that follows on the ring."""
    tokens = [str(token) for token in parts.dataset.field2id_token["item_id"]]
    history = torch.randint(1, N_ITEMS + 1, (200, 6), generator=torch.Generator().manual_seed(9))
    batch = {
        "item_id_list": history,
        "item_length": torch.full((200,), 6),
        "user_id": torch.ones(200, dtype=torch.long),
    }
    with torch.no_grad():
        best = parts.model.eval().full_sort_predict(batch)[:, 1:].argmax(dim=1) + 1
    right = [
        following(tokens[last]) == tokens[item]
        for last, item in zip(history[:, -1].tolist(), best.tolist(), strict=True)
    ]
    return sum(right) / len(right)


def test_what_only_the_teacher_knows_reaches_the_student_and_a_shuffle_destroys_it(noise, tmp_path):
    """The log is noise, the labels are the ring; labels of other rows (the public pipeline's silent fault) teach nothing."""
    knowledge = ask(prepared(noise, **NOISE), tmp_path / "kn", k=1)
    taught = share_of_ring_steps(distilled(noise, knowledge, **LABELS_ONLY))
    order = torch.randperm(len(knowledge.row), generator=torch.Generator().manual_seed(0))
    columns = {name: getattr(knowledge, name)[order].clone() for name in ("items", "score", "target_score", "trained")}
    shuffled = share_of_ring_steps(
        distilled(noise, rewritten(knowledge, tmp_path / "shuffled", **columns), **LABELS_ONLY)
    )
    alone = share_of_ring_steps(
        distilled(noise, None, **LABELS_ONLY | {"distill_mode": "off", "distill_ranking": None})
    )
    assert taught > 0.9
    assert shuffled < 0.2 and alone < 0.2


@pytest.mark.parametrize("name", ["STAMP", "GRU4Rec"])
def test_labels_reach_every_kind_of_student(noise, tmp_path, name):
    knowledge = ask(prepared(noise, **NOISE), tmp_path / "kn", k=1)
    assert share_of_ring_steps(distilled(noise, knowledge, student=name, **LABELS_ONLY)) > 0.6


def test_rows_that_the_teacher_was_tuned_on_get_no_ranking_term(noise, tmp_path):
    parts = prepared(noise, **NOISE)
    teacher = Oracle(parts.config, parts.train._dataset, tuned=60)
    knowledge = ask(parts, tmp_path / "kn", teacher)
    assert int(knowledge.trained.sum()) == 60
    wrong = knowledge.items.clone()
    wrong[knowledge.trained] = wrong[knowledge.trained].flip(1)
    memorised = rewritten(knowledge, tmp_path / "memorised", items=wrong)
    chosen = {**NOISE, **RANKING_ALONE}
    for choice, same in (("drop", True), ("keep", False)):
        runs = [
            distilled(noise, each, **chosen, **STILL, teacher_trained_rows=choice) for each in (knowledge, memorised)
        ]
        assert (losses(runs[0]) == losses(runs[1])) is same
        assert runs[0].trainer.attached.labelled == len(knowledge.row) - (60 if choice == "drop" else 0)
    # a distance that is in use sets the scale, too: memorised rows are nearer to their targets
    nearer = knowledge.target_score.clone()
    nearer[knowledge.trained] = 0.0
    assert still(noise, rewritten(knowledge, tmp_path / "nearer", target_score=nearer), **chosen) == pytest.approx(
        still(noise, knowledge, **chosen)
    )


@pytest.mark.parametrize("loss, tables, robust", [("soft_target_loss", 2, 0.0), ("chunked_loss", RECORDED, 0.1)])
def test_a_distilled_batch_is_scored_in_chunks(noise, tmp_path, monkeypatch, loss, tables, robust):
    knowledge = ask(prepared(noise, **NOISE), tmp_path / "kn")
    chosen = {**NOISE, **RANKING_ALONE, **STILL, "distill_ranking": "softmax", "distill_robust": robust}
    trainer = distilled(noise, knowledge, **chosen, loss_memory=0.01).trainer
    batch, scored = next(iter(trainer.loader)), []
    whole = getattr(dllm2rec, loss)

    def spied(*given):
        """The scores come to the one function among what is given."""
        (terms,) = filter(callable, given)
        watched = lambda scores, chunk: scored.append(scores.shape) or terms(scores, chunk)  # noqa: E731
        return whole(*(watched if each is terms else each for each in given))

    monkeypatch.setattr(dllm2rec, loss, spied)
    trainer.batch_loss(batch)
    assert sum(rows for rows, _ in scored) == int((batch["target_list"] > 0).sum())
    most = max(rows * n_items for rows, n_items in scored)
    assert len(scored) > 5 and 4 * most * tables <= 0.01 * 2**20


def test_drawn_negatives_replace_the_full_softmax_of_the_base_loss(noise, tmp_path):
    """With sampled softmax the labels still reach the student; a base of bce draws its own negative and is refused."""
    knowledge = ask(prepared(noise, **NOISE), tmp_path / "kn", k=1)
    sampled = {"loss_over": "sampled", "loss_negatives": 8}
    assert share_of_ring_steps(distilled(noise, knowledge, **LABELS_ONLY, **sampled)) > 0.9
    still_full = still(noise, knowledge, **LABELS_ONLY | {"epochs": 1})
    assert still(noise, knowledge, **LABELS_ONLY | {"epochs": 1}, **sampled) != still_full
    with pytest.raises(ValueError, match="loss_over=sampled: distill_base=bce draws one negative of its own"):
        student(prepared(noise, **NOISE, **sampled, distill_mode="paper"))


def test_a_teacher_that_was_tuned_on_every_row_is_refused(noise):
    parts = prepared(noise, **NOISE)
    knowledge = ask(parts, "kn", Oracle(parts.config, parts.train._dataset, tuned=10_000))
    with pytest.raises(
        ValueError,
        match="teacher_trained_rows=drop: the teacher was trained on every row .* there is teacher_folds=2 .* Set one of them",
    ):
        distilled(noise, knowledge, **NOISE, distill_ranking="softmax")
    distilled(noise, knowledge, **NOISE, distill_ranking="softmax", teacher_trained_rows="keep")


def test_scores_of_a_recbole_teacher_are_not_taken_for_distances(noise, tmp_path):
    """Logits are positive, too; a temperature of nearly 0 would leave one row with all the confidence."""
    knowledge = ask(prepared(noise, **NOISE), tmp_path / "kn")
    shift = {"score": knowledge.score + 40, "target_score": knowledge.target_score + 40}
    logits = rewritten(knowledge, tmp_path / "logits", **shift)
    runs = [distilled(noise, each, **NOISE, **STILL, distill_ranking="softmax") for each in (knowledge, logits)]
    assert runs[0].trainer.temperature == -knowledge.target_score.median().item()
    assert (runs[1].trainer.row_confidence > 0.01).float().mean() > 0.5
    set_by_hand = distilled(noise, knowledge, **NOISE, **STILL, distill_ranking="softmax", distill_temperature=3.5)
    assert set_by_hand.trainer.temperature == 3.5


@given(seed=st.integers(0, 500), seen=st.integers(1, 23))
def test_negatives_are_neither_history_nor_target(ring_trainer, seed, seen):
    generator = torch.Generator().manual_seed(seed)
    history = torch.stack([torch.randperm(24, generator=generator)[:seen] + 1 for _ in range(20)])
    history[::3, seen // 2 :] = 0
    target = torch.randint(1, 25, (20,), generator=generator)
    drawn = ring_trainer._negatives(history, target)
    for row in range(20):
        free = set(range(1, 25)) - set(history[row].tolist()) - {int(target[row])}
        assert not free or drawn[row].item() in free
        assert 1 <= drawn[row] <= 24


@pytest.fixture(scope="module")
def ring_trainer(ring_source, tmp_path_factory):
    """A trainer that was given no data yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trainer"))
        return student(prepared(ring_source, distill_base="bce")).trainer


def test_negatives_are_uniform_over_what_is_free(ring_trainer):
    history = torch.arange(1, 19).repeat(6000, 1)
    drawn = ring_trainer._negatives(history, torch.full((6000,), 19))
    count = torch.bincount(drawn, minlength=25)[20:]
    assert count.sum() == 6000 and bool(((count / 6000 - 0.2).abs() < 0.025).all())


@pytest.mark.parametrize("positions", ["all", "last"])
def test_negatives_know_the_history_of_their_own_position(ring, positions):
    parts = distilled(ring, ask(prepared(ring), "kn"), positions=positions, distill_mode="paper", **STILL)
    trainer = parts.trainer
    log = Log.from_dataset(parts.train._dataset)
    checked = 0
    for batch in trainer.loader:
        _, target, row = trainer.targets_of(batch)
        seen = trainer._seen(batch)
        history, length = log.history(row, 12)
        assert torch.equal(target, log.items[row])
        for own, kept, count in zip(history.tolist(), seen.tolist(), length.tolist(), strict=True):
            assert [item for item in kept if item] == own[:count]
            checked += 1
    assert checked == len(log.rows())


def test_negatives_come_from_a_generator_of_the_trainers_own(ring):
    """Another student seed moves the negatives; drawing them leaves the global generator alone."""
    knowledge = ask(prepared(ring), "kn")
    paper = {"distill_mode": "paper", "distill_embedding": "none"}
    first, again = (still(ring, knowledge, **paper) for _ in range(2))
    assert first == again
    trainer = distilled(ring, knowledge, **paper, **STILL).trainer
    before = torch.get_rng_state()
    trainer._negatives(torch.ones(4, 1, dtype=torch.long), torch.full((4,), 2))
    assert torch.equal(before, torch.get_rng_state())


KILLED = [{"distill_mode": "code"}, {"student": "STAMP", "distill_embedding": "tied"}]


@pytest.mark.parametrize("settings", KILLED, ids=["windows", "rows"])
def test_a_killed_training_goes_on_exactly(ring, tmp_path, settings):
    knowledge = ask(prepared(ring), tmp_path / "kn")
    chosen = settings | {"epochs": 3, "teacher_knowledge": str(knowledge.folder)}

    def run(folder, die_at=None):
        def callback(epoch, score):
            if epoch == die_at:
                raise Killed

        parts = student(prepared(ring, **chosen))
        parts.trainer.keep_in(tmp_path / folder)
        parts.trainer.fit(parts.train, parts.valid, callback_fn=callback)
        return parts

    whole = run("whole")
    with pytest.raises(Killed):
        run("cut", die_at=0)
    cut = run("cut")
    assert cut.trainer.train_loss_dict == whole.trainer.train_loss_dict
    one, other = whole.model.state_dict(), cut.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert cut.trainer.evaluate(cut.test) == whole.trainer.evaluate(whole.test)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepeatNet", "needs an item_embedding table of one row per item .25.; it has none. Set student to SASRec"),
        ("BERT4Rec", "needs an item_embedding table of one row per item .25.; it has one of 26 rows. Set student"),
        ("CORE", "its scores are not its state times its item table .they differ.. Set student to SASRec"),
        ("TransRec", "its scores are not its state times its item table"),
        ("S3Rec", "it has a Trainer of its own in RecBole and takes more than item sequences"),
        ("FDSA", "it has features of the items as input and takes more than item sequences"),
    ],
)
def test_students_that_cannot_be_taught_are_refused_before_anything_is_trained(ring, name, message):
    with pytest.raises(ValueError, match=f"^student={name}: .*{message}"):
        student(prepared(ring, student=name))


def test_the_check_of_a_student_leaves_no_trace(ring):
    """Its random numbers would shift the student's own: the stock model's weights must be those of RecBole."""
    parts = prepared(ring)
    torch.manual_seed(1)
    student(parts)
    after = torch.get_rng_state()
    torch.manual_seed(2)
    student(parts)
    assert torch.equal(after, torch.get_rng_state())
    assert parts.model.training


def test_more_candidates_than_the_catalogue_has(ring):
    with pytest.raises(ValueError, match="distill_topk=30: more than the catalogue holds; there are 24 items"):
        student(prepared(ring, distill_topk=30))


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_short_lists_of_the_teacher_carry_no_weight_where_they_end(noise, tmp_path, mode):
    """Item 0 means "no candidate", also for all candidates of a row."""
    knowledge = ask(prepared(noise, **NOISE), tmp_path / "kn")
    items = knowledge.items.clone()
    items[:, 3:] = 0
    items[::4] = 0
    short = rewritten(knowledge, tmp_path / "short", items=items)
    parts = distilled(noise, short, **NOISE, distill_mode=mode)
    assert math.isfinite(losses(parts))
    trainer, attached = parts.trainer, parts.trainer.attached
    logits = torch.randn(len(items), 25, generator=torch.Generator().manual_seed(0))
    own = own_lists(logits, attached.items.shape[1])
    weight = trainer._weights(attached.items, attached.score, trainer.row_confidence, own)
    assert bool((weight[attached.items == 0] == 0).all()) and bool((weight[attached.items > 0] > 0).all())
    if mode == "code":
        whole = torch.ones(len(items)).index_fill(0, torch.arange(0, len(items), 4), 0.0)
        assert torch.allclose(weight.sum(dim=1), whole, atol=1e-5)


def test_fewer_candidates_than_the_knowledge_has(noise):
    parts = prepared(noise, **NOISE)
    knowledge = ask(parts, "kn", k=5)
    attached = attach(knowledge, parts.train._dataset, 2, 10)
    assert attached.items.shape == attached.score.shape == (len(knowledge.row), 2)
    assert (
        distilled(noise, knowledge, **NOISE, **STILL, distill_ranking="softmax", distill_topk=2).trainer.places.tolist()
        == position_weight(2, 1.0).tolist()
    )
