"""Cross-fitting: no row is labelled by a teacher that was trained on its user, and nothing depends on the order of files."""

from pathlib import Path

import pytest
import torch
from torch import nn

from recbole_llm import knowledge as knowledge_file
from recbole_llm import plan as plan_file
from recbole_llm import pretrained
from recbole_llm.attached import attach
from recbole_llm.folds import folds_of, user_table
from recbole_llm.knowledge import Knowledge, Request, ensure
from recbole_llm.quick_start import refuse_early, run_recbole_llm
from recbole_llm.sequences import Log
from recbole_llm.trainer import SequenceTrainer
from tests.oracle import Killed, Oracle, ask, distilled, prepared
from tests.pipelines import ring_settings
from tests.ring import shuffled

SASREC = {
    "teacher": "SASRec",
    "teacher_epochs": 1,
    "teacher_hidden_size": 16,
    "teacher_inner_size": 16,
    "teacher_n_layers": 1,
}
SASREC |= {"teacher_n_heads": 1, "distill_ranking": "softmax"}


class Learner(Oracle):
    """An oracle that knows which users it was trained on."""

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        log = Log.from_dataset(dataset)
        self.users, self.asked = set(log.users.tolist()), set()

    def full_sort_predict(self, interaction):
        self.asked |= set(interaction[self.USER_ID].tolist())
        return super().full_sort_predict(interaction)


@pytest.fixture
def learners(monkeypatch):
    """Lets `ensure` ask learners for its labels; the value lists them, the one of all rows first."""
    made = []

    def ready(config, dataset, valid_data, checkpoint=None):
        made.append(Learner(config, dataset))
        return made[-1]

    monkeypatch.setattr(knowledge_file, "ready", ready)
    return made


@pytest.mark.parametrize("folds", [2, 3])
def test_no_row_is_labelled_by_a_teacher_that_was_trained_on_its_user(ring, learners, folds):
    parts = prepared(ring, teacher_folds=folds, **SASREC)
    known = ensure(parts.config, parts.train, parts.valid)
    everyone, *of_folds = learners
    assert len(of_folds) == folds and not everyone.asked
    for learner in of_folds:
        assert learner.asked and not learner.asked & learner.users
        assert learner.asked | learner.users == everyone.users
    assert set.union(*(learner.asked for learner in of_folds)) == everyone.users
    assert len(known.row) == len(Log.from_dataset(parts.train._dataset).rows()) and not known.trained.any()
    assert len(known.manifest["provenance"]["folds"]) == folds
    assert torch.equal(attach(known, parts.train._dataset, 5, 10).item_embedding, everyone.item_embeddings()), (
        "item vectors are the one teacher's that saw all rows"
    )


def test_folds_are_equally_large_and_follow_from_tokens_and_key():
    users = [f"u{number}" for number in range(11)]
    fold = folds_of(users, 3, seed=1)
    assert sorted(fold.bincount().tolist()) == [3, 4, 4]
    other = folds_of(users[::-1], 3, seed=1)
    assert torch.equal(other.flip(0), fold) and not torch.equal(folds_of(users, 3, seed=2), fold)


def test_with_folds_a_model_of_recbole_teaches_end_to_end_and_the_order_of_files_means_nothing(ring, tmp_path):
    known = []
    for place, data in (("here", ring), ("there", shuffled(ring, tmp_path / "moved", ("item",)))):
        parts = prepared(data, teacher_folds=2, checkpoint_dir=place, **SASREC)
        known.append(ensure(parts.config, parts.train, parts.valid))
    assert torch.equal(known[0].items, known[1].items) and torch.equal(known[0].score, known[1].score)
    student = distilled(ring, known[0], **{"distill_ranking": "softmax", "epochs": 2})
    assert student.trainer.attached.labelled == len(known[0].row) and student.trainer.temperature == 1.0
    plain = prepared(ring, checkpoint_dir="here", **SASREC)
    one = ensure(plain.config, plain.train, plain.valid)
    assert one.trained.all() and not torch.equal(one.score, known[0].score)
    assert torch.equal(one.item_embedding, known[0].item_embedding)


def test_a_teacher_that_reads_windows_labels_every_row_unless_fewer_are_asked_for(ring):
    everything = prepared(ring, **SASREC)
    assert len(ensure(everything.config, everything.train, everything.valid).row) == 540
    asked = prepared(ring, **SASREC, teacher_rows=4096)
    assert (
        Request.of(asked.config, asked.train._dataset).folder
        != Request.of(everything.config, asked.train._dataset).folder
    )
    few = prepared(ring, **SASREC, teacher_rows=30)
    assert len(ensure(few.config, few.train, few.valid).row) == 30


def test_killed_between_folds_no_teacher_is_trained_twice(ring, monkeypatch):
    ready, calls = knowledge_file.ready, []

    def dies(*args):
        if len(calls) == 2:
            raise Killed
        calls.append(args)
        return ready(*args)

    parts = prepared(ring, teacher_folds=2, **SASREC)
    monkeypatch.setattr(knowledge_file, "ready", dies)
    with pytest.raises(Killed):
        ensure(parts.config, parts.train, parts.valid)
    monkeypatch.setattr(knowledge_file, "ready", ready)
    folder = Path(parts.config["checkpoint_dir"])
    before = sorted(path.stat().st_mtime_ns for path in folder.rglob("done.json"))
    assert len(before) == 2
    ensure(parts.config, parts.train, parts.valid)
    after = sorted(path.stat().st_mtime_ns for path in folder.rglob("done.json"))
    assert len(after) == 3 and after[:2] == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_folds": 1}, "teacher_folds=1: not possible; there is 0 .* and 2 to 60"),
        ({"teacher_folds": -2}, "teacher_folds=-2: not possible"),
        ({"teacher_folds": 61}, "teacher_folds=61: not possible"),
        (
            {"teacher_folds": 2, "teacher_checkpoint": "x.safetensors"},
            "teacher_folds=2: a teacher that is trained already",
        ),
        (
            {"teacher_folds": 2, "teacher": "BIGRec"},
            "teacher_folds=2: BIGRec is tuned on a sample of .* rows, and all others are clean already",
        ),
        (
            {"teacher_folds": 2, "teacher": "P5", "teacher_p5_train_rows": 30},
            "teacher_folds=2: P5 is tuned on a sample of 30 rows",
        ),
    ],
)
def test_folds_that_cannot_be_are_refused(ring, settings, message):
    parts = prepared(ring, **({} if settings.get("teacher") else SASREC) | settings)
    with pytest.raises(ValueError, match=message):
        refuse_early(parts.config, parts)


P5 = {"teacher": "P5", "teacher_p5_width": 16, "teacher_p5_digits": 1, "teacher_p5_beams": 10, "teacher_topk": [1, 5]}


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("FPMC", r"a vector of every user \(UI_emb\)"),
        ("FOSSIL", r"a vector of every user \(user_lambda\)"),
        ("HGN", r"a vector of every user \(user_embedding\)"),
        ("TransRec", r"a vector of every user \(user_embedding\)"),
        ("P5", r"a number of every user \(p5_user_id=True\)"),
    ],
)
def test_a_teacher_of_folds_that_learns_users_is_refused(ring, name, learned):
    own = P5 | {"teacher_p5_user_id": True} if name == "P5" else {"teacher": name}
    parts = prepared(ring, distill_ranking="softmax", distill_embedding="none", teacher_folds=3, **own)
    with pytest.raises(ValueError, match=f"teacher_folds=3: {name} learns {learned}, and a fold's users are not among"):
        refuse_early(parts.config, parts)


def test_a_table_of_positions_as_long_as_there_are_users_is_no_table_of_users(ring):
    parts = prepared(ring, teacher_folds=2, teacher_MAX_ITEM_LIST_LENGTH=61, **SASREC)
    assert parts.train._dataset.user_num == 61
    refuse_early(parts.config, parts)
    refuse_early(prepared(ring, teacher_folds=2, **P5).config, parts)


def test_parameters_are_tables_too_and_layers_are_none():
    model = nn.Module()
    model.users = nn.Linear(3, 7)
    model.item_table, model.user_scale = nn.Parameter(torch.zeros(7, 2)), nn.Parameter(torch.tensor(1.0))
    assert user_table(model, 7) is None
    model.user_vectors = nn.Parameter(torch.zeros(7, 2))
    assert user_table(model, 7) == "user_vectors" and user_table(model, 8) is None


def taught(ring, how, tuned=600):
    """What a student is left with of an oracle that was tuned on (all) its rows."""
    parts = prepared(ring)
    known = ask(parts, "kn", Oracle(parts.config, parts.train._dataset, tuned=tuned))
    attached = attach(known, parts.train._dataset, 5, 10)
    items = Log.from_dataset(parts.train._dataset).items
    attached.treat_trained(how, items)
    return attached, items


def test_dropping_the_target_leaves_the_other_candidates_in_their_order(ring):
    kept, items = taught(ring, "keep")
    dropped, _ = taught(ring, "drop_target")
    assert dropped.labelled == kept.labelled
    for position in (kept.index >= 0).nonzero()[:, 0].tolist():
        row = int(kept.index[position])
        assert kept.items[row, 0] == items[position] and dropped.items[row, 0] == 0
        assert torch.equal(kept.items[row, 1:], dropped.items[row, 1:])


def test_only_rows_the_teacher_was_tuned_on_lose_their_target(ring):
    dropped, _ = taught(ring, "drop_target", tuned=50)
    assert int((dropped.items[:, 0] == 0).sum()) == 50


def test_if_nothing_is_left_the_ways_out_are_named(ring):
    with pytest.raises(
        ValueError, match="teacher_trained_rows=drop: .* there is teacher_folds=2 .*drop_target or keep"
    ):
        taught(ring, "drop")


def test_a_teacher_without_item_vectors_is_refused_where_they_are_wanted(ring):
    parts = prepared(ring, teacher="FPMC", teacher_epochs=1)
    with pytest.raises(
        ValueError, match="teacher_embedding=auto: FPMC has no item table whose rows could be item vectors"
    ):
        refuse_early(parts.config, parts)
    refuse_early(
        prepared(
            ring, teacher="FPMC", distill_embedding="none", distill_ranking="softmax", teacher_trained_rows="keep"
        ).config,
        parts,
    )


def test_that_nothing_will_be_left_is_said_before_the_teacher_is_trained(ring):
    parts = prepared(ring, **SASREC)
    with pytest.raises(ValueError, match="teacher_trained_rows=drop: the teacher was trained on every row"):
        refuse_early(parts.config, parts)
    refuse_early(prepared(ring, **SASREC, teacher_folds=2).config, parts)
    refuse_early(prepared(ring, **SASREC | {"distill_ranking": "none"}).config, parts)


@pytest.mark.parametrize("name", ["NARM", "FPMC", "BERT4Rec", "GRU4Rec"])
def test_a_teacher_is_trained_by_loaders_of_its_own(ring, name, monkeypatch):
    """Its batches, its negatives, its masks and its length of history, not the student's."""
    length = 10 if name == "BERT4Rec" else 4  # it masks a fifth of a history
    settings = {
        "teacher": name,
        "teacher_epochs": 1,
        "teacher_train_batch_size": 32,
        "teacher_MAX_ITEM_LIST_LENGTH": length,
    }
    if name == "FPMC":
        settings |= {"teacher_embedding": "none of these", "distill_ranking": "softmax", "distill_embedding": "none"}
    seen, train = [], SequenceTrainer._prepare

    def prepare(self, train_data):
        seen.append(
            (train_data._batch_size if hasattr(train_data, "_batch_size") else train_data.step, next(iter(train_data)))
        )
        return train(self, train_data)

    monkeypatch.setattr(SequenceTrainer, "_prepare", prepare)
    parts = prepared(ring, teacher_trained_rows="keep", **settings)
    known = ensure(parts.config, parts.train, parts.valid)
    ((size, batch),) = seen
    assert size == 32 and batch["item_id_list"].shape == (32, length)
    assert ("neg_item_id" in batch) == (name == "FPMC") and ("MASK_INDEX" in batch) == (name == "BERT4Rec")
    assert known.manifest["rows"] > 0 and torch.isfinite(known.score).all()


def test_the_students_rows_stay_as_they_were(ring):
    parts = prepared(ring)
    cut = parts.train._dataset.cut_to(4)
    here, there = parts.train._dataset[torch.arange(300)], cut[torch.arange(300)]
    assert here["item_id_list"].shape[1] == 12 and there["item_id_list"].shape[1] == 4
    for row in range(0, 300, 7):
        length = int(here["item_length"][row])
        last = here["item_id_list"][row, max(0, length - 4) : length]
        assert torch.equal(there["item_id_list"][row][: len(last)], last) and there["item_length"][row] == len(last)
    assert torch.equal(here["item_id"], there["item_id"])


def test_an_unknown_treatment_is_refused(ring):
    known = ask(prepared(ring), "kn")
    with pytest.raises(
        ValueError, match="teacher_trained_rows=forget: no such choice. There is drop, drop_target, keep"
    ):
        distilled(ring, known, distill_ranking="softmax", teacher_trained_rows="forget")


@pytest.mark.parametrize("folds", [0, 2])
def test_lite_llm4rec_teaches_end_to_end(ring, tiny_lm, folds):
    """The command, with one teacher for all rows or one per fold: every row is labelled, and the table says by what."""
    settings = ring_settings(ring, "DLLM2Rec", teacher="LiteLLM4Rec", teacher_llm=str(tiny_lm), teacher_folds=folds)
    settings |= {"teacher_epochs": 20, "teacher_lite_warmup_steps": 0, "teacher_learning_rate": 0.01}
    settings |= {"teacher_trained_rows": "keep", "distill_ranking": "softmax", "teacher_MAX_ITEM_LIST_LENGTH": 5}
    ran = run_recbole_llm("DLLM2Rec", "ring", config_dict=settings)
    teacher, alone, distilled = ran["lines"]
    assert teacher.name == "Lite-LLM4Rec (re-implementation) (teacher)" and teacher.metrics["recall@1"] == 1
    assert teacher.notes["choices"]["backbone"] == str(tiny_lm) and "backbone" in ran["table"]
    known = Knowledge.load(teacher.notes["knowledge"]["folder"])
    assert len(known.row) == 540 and len(known.manifest["provenance"]["folds"]) == folds
    assert known.trained.all() == (folds == 0) and known.manifest["scores"] == "log-probability"
    assert distilled.name == "SASRec distilled" and alone.name == "SASRec alone"


def test_the_plan_says_what_is_still_to_be_trained(ring, tiny_lm):
    settings = ring_settings(ring, "DLLM2Rec", teacher="LiteLLM4Rec", teacher_llm=str(tiny_lm), teacher_folds=2)
    settings |= {"teacher_epochs": 1, "teacher_lite_unfreeze_epochs": 1, "teacher_lite_item_train": "full"}
    settings |= {"distill_ranking": "softmax", "epochs": 1}

    def plan():
        return [step.what for step in run_recbole_llm("DLLM2Rec", "ring", config_dict=settings, estimate=True)["plan"]]

    before = plan()
    assert len([what for what in before if "of 2 folds" in what]) == 2
    assert len([what for what in before if what.startswith("Train its Item LLM, too (full)")]) == 3
    assert "LiteLLM4Rec labels 540 of 540 training rows" in before
    run_recbole_llm("DLLM2Rec", "ring", config_dict=settings)
    for folder in Path("saved/knowledge").iterdir():
        (folder / "manifest.json").unlink()
    after = plan()
    assert after[0].startswith("Take the trained LiteLLM4Rec") and "Take the trained teachers of 2 folds" in after
    assert not any("Item LLM" in what for what in after)


def test_the_plan_of_lite_llm4rec_alone_names_phase_b_and_asks_no_network(ring, tiny_lm, monkeypatch):
    settings = ring_settings(ring, "LiteLLM4Rec", tiny_lm, lite_item_train="full", llm_revision="v2")
    monkeypatch.setattr(pretrained, "find", None)
    # two plans are compared, and a machine is not equally fast twice
    monkeypatch.setattr(plan_file, "multiplications_per_second", lambda: 1e11)
    plan = run_recbole_llm("LiteLLM4Rec", "ring", config_dict=settings, estimate=True)["plan"]
    assert [step.what.split(",")[0] for step in plan] == ["Train LiteLLM4Rec on 540 targets", "Train its Item LLM"]
    settings = ring_settings(
        ring, "DLLM2Rec", teacher="P5", teacher_epochs=0, teacher_p5_train_rows=30, teacher_rows=90
    )
    settings |= {"distill_ranking": "softmax"}
    few = run_recbole_llm("DLLM2Rec", "ring", config_dict=settings, estimate=True)["plan"]
    many = run_recbole_llm("DLLM2Rec", "ring", config_dict=settings | {"teacher_rows": 180}, estimate=True)["plan"]
    labels = [next(step for step in plan if "labels" in step.what) for plan in (few, many)]
    assert "labels 90 of 540" in labels[0].what and labels[1].seconds > 1.2 * labels[0].seconds
