"""Knowledge: the same labels for the same rows whatever happens to files, order or process, and never for other rows."""

import logging
import shutil
import subprocess
import sys

import pytest
import torch

from recbole_llm import attached as attached_file
from recbole_llm import knowledge as knowledge_file
from recbole_llm.artifacts import DamagedArtifact, read_json, read_tensors, write_json, write_tensors
from recbole_llm.attached import attach, teacher_vectors
from recbole_llm.config import Config
from recbole_llm.identity import Names
from recbole_llm.knowledge import Knowledge, Request, asked_rows, ensure
from recbole_llm.quick_start import run_folder
from recbole_llm.rows import POLICIES
from recbole_llm.sequences import Log
from recbole_llm.teacher import item_table, ready
from tests.conftest import ROOT
from tests.oracle import Killed, Oracle, ask, distilled, prepared, student
from tests.ring import RING, TOKENS, following, shuffled

COLUMNS = ("row", "items", "score", "target_score", "trained", "item_embedding")


def same(one, other) -> bool:
    """Whether two Knowledges are equal bit by bit."""
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in COLUMNS)


def by_token(dataset, attached) -> dict:
    """(user token, place of the target) -> tokens of the candidates and their scores, as the student will see them."""
    log = Log.from_dataset(dataset)
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    found = {}
    for position in log.rows().tolist():
        at = int(attached.index[position])
        if at >= 0:
            user = int(log.user_index(torch.tensor(position)))
            key = str(users[log.users[user]]), position - int(log.offsets[user])
            found[key] = [str(items[item]) for item in attached.items[at].tolist()], attached.score[at].tolist()
    return found


def edited(data_path, change):
    """The data folder after `change(rows of ring.inter)`, header kept."""
    file = data_path / "ring" / "ring.inter"
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, *change(rows)]) + "\n")
    return data_path


@pytest.fixture
def oracles(monkeypatch):
    """Lets `ensure` ask an oracle for its labels; the value lists the oracles that got ready."""
    made = []

    def ready(config, dataset, valid_data, checkpoint=None):
        torch.rand(7)  # as a teacher's training would
        made.append(Oracle(config, dataset))
        return made[-1]

    monkeypatch.setattr(knowledge_file, "ready", ready)
    return made


def test_what_is_built_comes_back(ring):
    parts = prepared(ring)
    built = ask(parts, "kn", rows=100)
    loaded = Knowledge.load("kn")
    assert same(built, loaded)
    assert loaded.items.dtype == torch.int32 and loaded.row.dtype == torch.int64 and loaded.score.dtype == torch.float32
    assert loaded.items.shape == (100, 5) and bool((loaded.row.diff() > 0).all())
    assert loaded.manifest["provenance"] == {"teacher": "Oracle"} and loaded.manifest["rows"] == 100
    assert sorted(loaded.manifest["parts"]) == [
        "item_embedding.safetensors",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]


def test_every_label_arrives_at_its_own_row(ring):
    parts = prepared(ring)
    dataset = parts.train._dataset
    attached = attach(ask(parts, "kn", rows=200), dataset, 3, 10)
    log = Log.from_dataset(dataset)
    tokens = [str(token) for token in dataset.field2id_token["item_id"]]
    labelled = (attached.index >= 0).nonzero()[:, 0].tolist()
    assert len(labelled) == attached.labelled == 200 and attached.total == len(log.items)
    for position in labelled:
        last = tokens[log.items[position - 1]]
        candidates = [tokens[item] for item in attached.items[attached.index[position]].tolist()]
        assert candidates == [following(last), following(following(last)), following(following(following(last)))]
    assert attached.score[0].tolist() == [0, -1, -2] and bool((attached.target_score == 0).all())
    assert torch.equal(attached.item_embedding, Oracle(parts.config, dataset).item_embeddings())
    first = log.offsets[:-1]
    assert bool((attached.index[first] == -1).all()), "a user's first item is no target"


@pytest.mark.parametrize("files", [("inter",), ("item",), ("inter", "item")])
def test_the_order_of_the_files_changes_nothing(ring, tmp_path, files):
    parts, other = prepared(ring), prepared(shuffled(ring, tmp_path / "moved", files))
    one, two = ask(parts, "one", rows=150), ask(other, "two", rows=150)
    ids = [list(each.train._dataset.field2id_token["item_id"]) for each in (parts, other)]
    assert (ids[0] != ids[1]) is ("inter" in files), "the shuffle must move RecBole's ids, or nothing is shown"
    for part in ("fingerprint", "titles", "parts"):
        assert one.manifest[part] == two.manifest[part], part
    assert same(one, two)
    seen = by_token(parts.train._dataset, attach(one, parts.train._dataset, 5, 10))
    assert len(seen) == 150
    assert by_token(other.train._dataset, attach(one, other.train._dataset, 5, 10)) == seen
    vectors = attach(one, other.train._dataset, 5, 10).item_embedding
    assert torch.equal(vectors, Oracle(other.config, other.train._dataset).item_embeddings())
    assert (
        Request.of(parts.config, parts.train._dataset).folder == Request.of(other.config, other.train._dataset).folder
    )


def swapped(rows):
    """The items of two steps of one user change places."""
    at = [number for number, row in enumerate(rows) if row.startswith("u03\t")][2:4]
    cells = [rows[number].split("\t") for number in at]
    cells[0][1], cells[1][1] = cells[1][1], cells[0][1]
    for number, cell in zip(at, cells, strict=True):
        rows[number] = "\t".join(cell)
    return rows


CHANGES = {
    "users": lambda rows: [row.replace("u07\t", "v07\t") for row in rows],
    "items": lambda rows: [row.replace("\ti05\t", "\tx05\t") for row in rows],
    "rows": lambda rows: [row for row in rows if not row.startswith("u00\ti00")],
    "histories, targets": swapped,
    "number of training rows": lambda rows: [row for row in rows if row < "u02"],
}


@pytest.mark.parametrize("part", CHANGES)
def test_other_data_are_refused_and_the_message_says_what_differs(ring, part):
    kept = ask(prepared(ring), "kn")
    file = ring / "ring" / "ring.item"
    if part == "items":  # RecBole drops interactions of items without a line
        file.write_text(file.read_text() + "x05\tblue whale\n")
    changed = prepared(edited(ring, CHANGES[part]))
    with pytest.raises(
        ValueError, match="^teacher_knowledge=kn: it is of other data than dataset=ring; what differs: "
    ) as refused:
        attach(kept, changed.train._dataset, 5, 10)
    assert part in str(refused.value) and "Let it be built again (leave teacher_knowledge empty)" in str(refused.value)


def test_interactions_that_no_row_saw_change_nothing(ring):
    """The test item is in no training row: the labels still fit."""
    kept = ask(prepared(ring), "kn")
    changed = edited(
        ring, lambda rows: [*rows[:-1], "\t".join([rows[-1].split("\t")[0], "i00", rows[-1].split("\t")[2]])]
    )
    assert attach(kept, prepared(changed).train._dataset, 5, 10).labelled == 540


def test_other_titles_are_refused_and_have_another_key(ring):
    parts = prepared(ring)
    kept, folder = ask(parts, "kn"), Request.of(parts.config, parts.train._dataset).folder
    file = ring / "ring" / "ring.item"
    file.write_text(file.read_text().replace("amber falcon", "amber eagle"))
    changed = prepared(ring)
    assert Request.of(changed.config, changed.train._dataset).folder != folder
    with pytest.raises(ValueError, match="what differs: titles. "):
        attach(kept, changed.train._dataset, 5, 10)
    plain = prepared(ring, title_field=None, load_col={"inter": ["user_id", "item_id", "timestamp"]})
    assert attach(kept, plain.train._dataset, 5, 10).labelled == 540, "without titles there is nothing to compare"


def test_another_history_of_the_teacher_is_refused(ring):
    parts = prepared(ring)
    kept = ask(parts, "kn")
    with pytest.raises(ValueError, match=r"what differs: teacher_history \(10, not 4\)"):
        attach(kept, parts.train._dataset, 5, 4)


@pytest.mark.parametrize(
    "settings",
    [
        {"teacher_rows": 7},
        {"teacher_rows_by": "recent"},
        {"teacher_rows_by": "disagreement"},
        {"teacher_history": 5},
        {"teacher_seed": 1},
        {"distill_topk": 3},
        {"teacher": "GRU4Rec"},
        {"teacher_learning_rate": 0.5},
        {"teacher_generate_beams": 4},
        {"teacher_prompt_lead": "Before:"},
        {"teacher_llm": "other/model"},
        {"teacher_config": "t.yaml"},
    ],
    ids=str,
)
def test_what_shapes_the_labels_is_in_the_key(ring, tmp_path, settings):
    (tmp_path / "t.yaml").write_text("lora_rank: 3\n")
    first, other = prepared(ring), prepared(ring, **settings)
    assert (
        Request.of(first.config, first.train._dataset).folder != Request.of(other.config, other.train._dataset).folder
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"student": "GRU4Rec"},
        {"MAX_ITEM_LIST_LENGTH": 15},
        {"learning_rate": 0.5, "epochs": 9, "train_batch_size": 3, "stopping_step": 3, "seed": 4},
        {"distill_weight": 0.3, "distill_mode": "paper", "positions": "last", "window_overlap": 3},
        {"teacher_eval_rows": 5, "teacher_embedding": "some/encoder"},
        {"topk": [2, 3], "valid_metric": "NDCG@2", "metrics": ["MRR", "NDCG"], "eval_batch_size": 7},
    ],
    ids=str,
)
def test_tuning_the_student_throws_no_label_away(ring, settings):
    first, other = prepared(ring), prepared(ring, **settings)
    assert (
        Request.of(first.config, first.train._dataset).folder == Request.of(other.config, other.train._dataset).folder
    )


@pytest.mark.parametrize(
    "setting",
    [
        {"teacher_loss_over": "gbce"},
        {"teacher_loss_negatives": 3},
        {"teacher_positions": "last"},
        {"teacher_window_overlap": 3},
        {"seen_items": "mask"},
        {"valid_metric": "Hit@1"},
        {"teacher_eval_step": 2},
    ],
    ids=str,
)
def test_a_recbole_teacher_trained_another_way_is_another_teacher(ring, setting):
    def folder(**more):
        parts = prepared(ring, teacher="SASRec", teacher_trained_rows="keep", **more)
        return Request.of(parts.config, parts.train._dataset).teacher_folder

    assert folder(**setting) != folder() == folder()


def test_how_a_p5_teacher_ranks_chooses_its_epoch_so_it_is_another_teacher(ring):
    def folder(**more):
        parts = prepared(ring, teacher="P5", teacher_trained_rows="keep", **more)
        return Request.of(parts.config, parts.train._dataset).teacher_folder

    assert len({folder(), folder(teacher_p5_beams=7), folder(teacher_p5_score="exact")}) == 3


@pytest.mark.parametrize("key", ["llm", "lite_rec_llm"])
def test_another_content_of_a_language_models_folder_is_another_teacher_and_another_run(ring, tmp_path, key):
    (tmp_path / "lm").mkdir()

    def folders(content):
        (tmp_path / "lm" / "model.safetensors").write_text(content)
        student = prepared(ring, teacher="LiteLLM4Rec", **{f"teacher_{key}": str(tmp_path / "lm")})
        settings = {name: RING[name] for name in ("load_col", "title_field")} | {key: str(tmp_path / "lm")}
        lite = Config("LiteLLM4Rec", "ring", None, settings | {"data_path": str(ring)}, read_argv=False)
        request = Request.of(student.config, student.train._dataset)
        return request.folder, request.teacher_folder, run_folder(student.config), run_folder(lite)

    for one, other in zip(folders("a"), folders("bb"), strict=True):
        assert one != other


def test_another_checkpoint_under_the_same_name_is_another_teacher(ring, tmp_path):
    folders = set()
    for content in ("one", "two", "one"):
        (tmp_path / "t.safetensors").write_text(content)
        parts = prepared(ring, teacher_checkpoint="t.safetensors")
        folders.add(Request.of(parts.config, parts.train._dataset).folder)
    assert len(folders) == 2


def test_a_kept_teacher_is_not_taken_for_files_in_another_order(ring, tmp_path):
    """Its vectors stand by internal id, which the order of the files gives; one folder holds both teachers."""

    def teach(data_path, **more):
        settings = {"teacher_trained_rows": "keep", "teacher_epochs": 1, "checkpoint_dir": "both"}
        parts = prepared(data_path, teacher="SASRec", **settings, **more)
        request, dataset = Request.of(parts.config, parts.train._dataset), parts.train._dataset
        vectors = item_table(ready(request.config, dataset, parts.valid, request.checkpoint))
        return request, vectors, list(dataset.field2id_token["item_id"])

    other = shuffled(ring, tmp_path / "other")
    (here, vectors, tokens), (there, _, others) = teach(ring), teach(other)
    assert tokens != others and here.folder == there.folder
    assert here.teacher_folder != there.teacher_folder and (there.teacher_folder / "done.json").exists()
    kept = str(here.teacher_folder / "model.safetensors")
    assert torch.equal(teach(ring, teacher_checkpoint=kept)[1], vectors)
    with pytest.raises(
        ValueError, match="teacher_checkpoint=.*: was trained on other data: its items have other internal ids"
    ):
        teach(other, teacher_checkpoint=kept)


def test_a_teacher_that_stands_by_titles_is_the_same_in_any_order_of_the_files(ring, tmp_path):
    folders = set()
    for data_path in (ring, shuffled(ring, tmp_path / "other")):
        parts = prepared(data_path)
        folders.add(Request.of(parts.config, parts.train._dataset).teacher_folder)
    assert len(folders) == 1


@pytest.mark.parametrize("length", [3, 10])
def test_labels_do_not_depend_on_the_students_history(ring, length):
    """Rows that RecBole cut to `length` items carry labels of the whole history."""
    whole, cut = prepared(ring), prepared(ring, MAX_ITEM_LIST_LENGTH=length)
    one, two = ask(whole, "one"), ask(cut, "two")
    assert same(one, two) and one.manifest["fingerprint"] == two.manifest["fingerprint"]
    attached = attach(one, cut.train._dataset, 5, 10)
    assert by_token(cut.train._dataset, attached) == by_token(
        whole.train._dataset, attach(one, whole.train._dataset, 5, 10)
    )


def test_more_candidates_than_items_are_all_items(ring):
    kept = ask(prepared(ring), "kn", k=100)
    assert kept.items.shape[1] == kept.manifest["candidates"] == 24
    assert bool((kept.items.sort(dim=1).values == torch.arange(1, 25)).all()), "each item once, the padding never"


def test_a_killed_labelling_goes_on_where_it_was_and_ends_the_same(ring):
    parts = prepared(ring)
    dataset = parts.train._dataset
    whole = ask(parts, "whole")
    with pytest.raises(Killed):
        ask(parts, "cut", Oracle(parts.config, dataset, dies_at=4))
    with pytest.raises(FileNotFoundError):
        Knowledge.load("cut")
    second = Oracle(parts.config, dataset)
    cut = ask(parts, "cut", second)
    assert same(whole, cut) and whole.manifest["parts"] == cut.manifest["parts"]
    assert sum(second.labelled) == 540 - 4 * 64, "finished shards are not labelled again"
    third = Oracle(parts.config, dataset)
    ask(parts, "cut", third)
    assert third.labelled == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("teacher_rows", -1), ("teacher_rows", 2.5), ("teacher_rows", "foo"), ("teacher_shard_rows", 0), ("teacher_eval_rows", -1),
     ("teacher_history", 0), ("distill_topk", 0)],
)  # fmt: skip
def test_numbers_that_labels_cannot_have_are_refused_before_any_work(ring, key, value):
    parts = prepared(ring, **{key: value})
    with pytest.raises(ValueError, match=f"^{key}={value}: not possible; there is whole numbers from"):
        Request.of(parts.config, parts.train._dataset)


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "of other rows"])
def test_a_damaged_shard_alone_is_built_again(ring, oracles, harm):
    parts = prepared(ring, teacher_shard_rows=100, teacher_rows=0)
    whole = ensure(parts.config, parts.train, parts.valid)
    assert len(oracles) == 1 and oracles[0].labelled == [5] * 108
    before = {file.name: file.read_bytes() for file in whole.folder.iterdir() if file.suffix == ".safetensors"}
    shard = whole.folder / "shard-00002.safetensors"
    content = shard.read_bytes()
    if harm == "cut":
        shard.write_bytes(content[: len(content) // 2])
    elif harm == "flipped":
        shard.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif harm == "missing":
        shard.unlink()
    else:
        shutil.copy(whole.folder / "shard-00001.safetensors", shard)
    with pytest.raises(DamagedArtifact, match="shard-00002.safetensors"):
        Knowledge.load(whole.folder)
    again = ensure(parts.config, parts.train, parts.valid)
    assert oracles[1].labelled == [5]
    assert same(whole, again) and whole.folder == again.folder
    assert {file.name: file.read_bytes() for file in again.folder.iterdir() if file.suffix == ".safetensors"} == before


def test_damaged_item_vectors_and_manifests_are_built_again(ring, oracles):
    parts = prepared(ring)
    whole = ensure(parts.config, parts.train, parts.valid)
    write_tensors(whole.folder / "item_embedding.safetensors", {"item_embedding": whole.item_embedding + 1})
    assert same(whole, ensure(parts.config, parts.train, parts.valid))
    (whole.folder / "manifest.json").write_text('{"parts": {')
    with pytest.raises(DamagedArtifact, match="manifest.json"):
        Knowledge.load(whole.folder)
    assert same(whole, ensure(parts.config, parts.train, parts.valid))
    assert [sum(oracle.labelled) for oracle in oracles] == [540, 0, 0]


def test_a_finished_knowledge_is_taken_and_no_teacher_is_made(ring, oracles, caplog):
    parts = prepared(ring)
    first = ensure(parts.config, parts.train, parts.valid)
    with caplog.at_level(logging.INFO):
        logging.getLogger().setLevel(logging.INFO)
        assert same(first, ensure(parts.config, parts.train, parts.valid))
    assert len(oracles) == 1 and f"Knowledge is taken from {first.folder}" in caplog.text


def test_a_knowledge_named_by_the_user_is_used_as_it_is(ring, tmp_path, oracles):
    parts = prepared(ring)
    ask(parts, "mine", rows=30)
    named = prepared(ring, teacher_knowledge="mine")
    assert len(ensure(named.config, named.train, named.valid).row) == 30 and not oracles
    (tmp_path / "mine" / "shard-00000.safetensors").write_bytes(b"")
    for folder in ("nowhere", "mine"):
        wrong = prepared(ring, teacher_knowledge=folder)
        with pytest.raises(
            ValueError,
            match=f"teacher_knowledge={folder}: no whole Knowledge there .*Name another folder, or leave it empty",
        ):
            ensure(wrong.config, wrong.train, wrong.valid)
    assert not oracles, "what the user named is never replaced by something else"


def test_the_manifest_says_where_the_labels_are_from(ring, oracles):
    parts = prepared(ring, teacher_rows=50)
    manifest = read_json(ensure(parts.config, parts.train, parts.valid).folder / "manifest.json")
    assert manifest["rows"] == 50 and manifest["candidates"] == 5 and manifest["history"] == 10
    said = manifest["provenance"]
    assert (
        said["teacher"] == "BIGRec"
        and said["settings"]["lora_rank"] == 8
        and said["checkpoint"]
        and said["checkpoint_digest"]
    )
    assert manifest["seconds"] > 0


def test_a_student_trains_the_same_whether_its_knowledge_was_there_or_not(ring, tmp_path):
    """A teacher that is trained inside `fit` draws random numbers, and goes through the student's own loader."""
    teacher = {
        "teacher": "NARM",
        "teacher_epochs": 1,
        "teacher_trained_rows": "keep",
        "teacher_rows": 100,
        "teacher_embedding_size": 16,
    }
    settings = teacher | {"teacher_hidden_size": 16, "student": "STAMP", "distill_embedding": "none"}
    settings |= {"distill_ranking": "softmax"}
    runs = []
    for _ in range(2):
        torch.manual_seed(len(runs))
        parts = student(prepared(ring, **settings))
        parts.trainer.fit(parts.train, parts.valid, saved=False)
        runs.append(parts)
    assert len(list((tmp_path / "saved").glob("knowledge/NARM-ring-*/manifest.json"))) == 1
    assert runs[0].trainer.train_loss_dict == runs[1].trainer.train_loss_dict
    states = [run.model.state_dict() for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_that_the_teacher_was_not_tuned_on_come_first(ring, policy):
    def chosen(count, seed):
        parts = prepared(ring, teacher_rows=count, teacher_seed=seed, teacher_rows_by=policy)
        return asked_rows(parts.config, Oracle(parts.config, parts.train._dataset, tuned=400), parts.train._dataset)

    parts = prepared(ring)
    flags = Oracle(parts.config, parts.train._dataset, tuned=400).trained_on(540)
    few = chosen(40, seed=1)
    assert len(few) == 40 and bool((few.diff() > 0).all()) and not flags[few].any()
    assert flags[chosen(160, seed=1)].sum() == 20
    assert chosen(0, seed=1).tolist() == chosen(999, seed=1).tolist() == list(range(540))
    assert chosen(40, seed=1).tolist() == few.tolist() != chosen(40, seed=2).tolist()


def test_flags_of_the_teachers_rows_travel(ring):
    parts = prepared(ring)
    teacher = Oracle(parts.config, parts.train._dataset, tuned=50)
    kept = ask(parts, "kn", teacher)
    assert torch.equal(kept.row[kept.trained], teacher.trained_on(540).nonzero()[:, 0])
    attached = attach(kept, parts.train._dataset, 5, 10)
    attached.treat_trained("drop", Log.from_dataset(parts.train._dataset).items)
    assert attached.labelled == 490
    position = Log.from_dataset(parts.train._dataset).rows()
    assert torch.equal((attached.index[position] < 0), teacher.trained_on(540))


def test_shards_hold_rows_of_like_work(ring):
    """The plan is a function of the rows alone: short histories together, each row once."""
    parts = prepared(ring)
    kept = ask(parts, "kn", shard_rows=60)
    log = Log.from_dataset(parts.train._dataset)
    rows = [read_tensors(kept.folder / f"shard-{number:05d}.safetensors")["row"] for number in range(9)]
    assert torch.cat(rows).sort().values.tolist() == list(range(540))
    lengths = [log.history(log.rows()[row], 10)[1] for row in rows]
    assert all(length.min() == length.max() for length in lengths)


def test_names_are_the_tokens_in_order(ring):
    dataset = prepared(ring).train._dataset
    names = Names.of(dataset, Log.from_dataset(dataset))
    assert tuple(names.items) == TOKENS and names.users == sorted(names.users) and len(names.users) == 60
    ids = torch.arange(25)
    assert torch.equal(names.number[names.internal], ids) and torch.equal(names.internal[names.number], ids)
    assert str(dataset.field2id_token["item_id"][names.internal[6]]) == "i05"


def test_item_vectors_of_an_encoder_are_embedded_once(ring, tmp_path, monkeypatch):
    asked = []

    def encode(name, titles, device, progress):
        asked.append((name, titles))
        return torch.tensor([[len(title), sum(map(ord, title))] for title in titles], dtype=torch.float32)

    monkeypatch.setattr(attached_file, "encode", encode)
    parts = prepared(ring, teacher_embedding="some/encoder")
    other = prepared(shuffled(ring, tmp_path / "moved"), teacher_embedding="some/encoder")
    for each in (parts, parts, other):
        vectors = teacher_vectors(each.config, each.train, each.valid)
        tokens = [str(token) for token in each.dataset.field2id_token["item_id"]]
        assert vectors[tokens.index("i00")].tolist() == [12, sum(map(ord, "amber falcon"))] and vectors[0].tolist() == [
            0,
            0,
        ]
    assert len(asked) == 1 and asked[0][0] == "some/encoder"
    for file in tmp_path.glob("saved/item_vectors/*"):
        file.write_bytes(b"half")
    teacher_vectors(parts.config, parts.train, parts.valid)
    assert len(asked) == 2


def test_no_llm_library_is_loaded_when_the_knowledge_exists(ring):
    """Rule 4: a teacher is a file. Trained, evaluated and asked in a process of its own."""
    ask(prepared(ring), "kn")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import recbole_llm
from tests.oracle import distilled
from recbole_llm import Knowledge, load_recommender
parts = distilled({str(ring)!r}, Knowledge.load("kn"), saved=True, distill_embedding="init", distill_ranking="softmax")
parts.trainer.evaluate(parts.test)
load_recommender(parts.trainer.saved_model_file).recommend(["i03"], 2)
assert parts.trainer.attached.labelled == 540
print(sorted({{name.split(".")[0] for name in sys.modules}} & {{"transformers", "peft", "faiss", "tokenizers", "ray"}}))
"""
    told = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip().splitlines()[-1] == "[]"


def test_a_manifest_of_unknown_parts_is_damaged(ring):
    kept = ask(prepared(ring), "kn")
    manifest = kept.manifest | {"parts": kept.manifest["parts"] | {"shard-00000.safetensors": "0" * 16}}
    write_json("kn/manifest.json", manifest)
    with pytest.raises(DamagedArtifact, match="not the content that the manifest names"):
        Knowledge.load("kn")


def test_knowledge_for_some_rows_teaches_those_only(ring):
    parts = distilled(ring, ask(prepared(ring), "kn", rows=100), learning_rate=0.0, distill_ranking="softmax")
    assert parts.trainer.attached.labelled == 100 and parts.trainer.attached.total == 600
