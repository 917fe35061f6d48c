"""A saved student answers alone: in an empty folder, for any history, by tokens and titles."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from recbole.utils import get_model

from recbole_llm import Recommender, load_recommender
from recbole_llm.artifacts import DamagedArtifact
from recbole_llm.checkpoint import read_checkpoint, write_checkpoint
from recbole_llm.config import Config
from recbole_llm.recommend import Recommendation
from recbole_llm.trainer import SequenceTrainer
from tests.oracle import SIZES, SMALL, ask, distilled, prepared
from tests.ring import TITLES, TOKENS, following
from tests.small_logs import stock


def two_files(source, folder):
    """The checkpoint alone, moved to where there are no data."""
    folder.mkdir(parents=True)
    for file in (source, source.removesuffix(".safetensors") + ".json"):
        shutil.copy(file, folder)
    return folder / source.rpartition("/")[2]


@pytest.fixture(scope="module")
def trained(ring_source, tmp_path_factory):
    """A distilled student that knows the ring; its data and its teacher's file are gone when it is loaded."""
    folder = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data = shutil.copytree(ring_source, folder / "data")
        parts = distilled(data, ask(prepared(data), "kn"), saved=True, epochs=20)
        rows = parts.test._dataset.inter_feat
        parts.trainer.evaluate(parts.test)
        with torch.no_grad():
            scores = parts.model.eval().full_sort_predict(rows)
        moved = two_files(parts.trainer.saved_model_file, folder / "moved")
        ids = [str(token) for token in parts.dataset.field2id_token["item_id"]]
        for gone in ("data", "kn", "saved"):
            shutil.rmtree(folder / gone)
    return SimpleNamespace(file=moved, rows=rows, scores=scores, tokens=ids)


@pytest.fixture
def recommender(trained, tmp_path):
    """Loaded in a folder with nothing in it."""
    assert not list(tmp_path.iterdir())
    return load_recommender(trained.file)


def test_it_names_the_item_that_comes_next(recommender):
    answer = recommender.recommend(["i03", "i04", "i05"], 3)
    assert isinstance(recommender, Recommender) and len(answer) == 3
    assert all(type(item) is Recommendation for item in answer)
    assert answer[0].token == "i06" and answer[0].title == TITLES[6] == "amber otter"
    assert answer[0].score > answer[1].score > answer[2].score
    assert isinstance(answer[0].score, float)


def test_every_item_of_the_ring_and_histories_it_never_saw(recommender):
    assert [recommender.recommend([token], 1)[0].token for token in TOKENS] == [following(token) for token in TOKENS]


def test_a_batch_is_its_histories_one_by_one(recommender):
    histories = [["i03"], ["i07", "i08", "i09"], [TOKENS[step % 24] for step in range(40)]]
    batch = recommender.recommend(histories, 4)
    assert len(batch) == 3
    for history, answers in zip(histories, batch, strict=True):
        alone = recommender.recommend(history, 4)
        assert [item.token for item in answers] == [item.token for item in alone]
        assert [item.score for item in answers] == pytest.approx([item.score for item in alone], abs=1e-4)
        assert answers[0].token == following(history[-1])
    assert recommender.recommend([["i03"]], 1) == [recommender.recommend(["i03"], 1)]


def test_scores_are_those_of_evaluation(recommender, trained):
    for row in (0, 17, 59):
        length = int(trained.rows["item_length"][row])
        history = [trained.tokens[item] for item in trained.rows["item_id_list"][row, :length].tolist()]
        answer = recommender.recommend(history, 24)
        said = {item.token: item.score for item in answer}
        assert len(said) == 24 and "[PAD]" not in said
        expected = {token: trained.scores[row, at].item() for at, token in enumerate(trained.tokens) if at}
        assert said == pytest.approx(expected, abs=1e-4)


def test_an_unknown_token_is_named(recommender):
    with pytest.raises(
        ValueError, match="^history_tokens: 2 of 3 items are not known to this model, the first is 'x1'. Give tokens of"
    ):
        recommender.recommend(["i03", "x1", "x2"], 2)
    with pytest.raises(ValueError, match="'.PAD.'"):
        recommender.recommend(["[PAD]"], 2)
    assert recommender.recommend(["x1", "i03", "x2"], 2, skip_unknown=True) == recommender.recommend(["i03"], 2)


@pytest.mark.parametrize("history", [[], [[]], [["i03"], []]])
def test_an_empty_history_is_refused(recommender, history):
    with pytest.raises(ValueError, match="no known item in a history; at least one is needed"):
        recommender.recommend(history, 2)
    with pytest.raises(ValueError, match="at least one is needed"):
        recommender.recommend(["x1"], 2, skip_unknown=True)


@pytest.mark.parametrize("k", [0, -1, 25])
def test_more_than_the_catalogue_is_refused(recommender, k):
    with pytest.raises(ValueError, match=f"^k={k}: there are 24 items. Ask for 1 to 24.$"):
        recommender.recommend(["i03"], k)


def test_seen_items_are_kept_unless_they_are_left_out(recommender):
    history = ["i04", "i05", "i03"]
    everything = [item.token for item in recommender.recommend(history, 24)]
    new = [item.token for item in recommender.recommend(history, 24, exclude_seen=True)]
    assert everything[0] == "i04" and set(history) < set(everything)
    assert new == [token for token in everything if token not in history]
    assert len(recommender.recommend([history, ["i03"]], 24, exclude_seen=True)[1]) == 23


def test_only_the_end_of_a_long_history_is_read(recommender):
    long = ["i20"] * 30 + ["i01", "i02"] + ["i09"] * 12
    assert recommender.recommend(long, 5) == recommender.recommend(["i09"] * 12, 5)


def test_answers_do_not_change_from_call_to_call(recommender):
    """Dropout is off."""
    first = recommender.recommend(["i03", "i04"], 5)
    assert all(recommender.recommend(["i03", "i04"], 5) == first for _ in range(3))


@pytest.mark.parametrize("embedding", ["init", "tied"])
def test_an_export_is_a_plain_sasrec_with_equal_scores(ring, tmp_path, embedding):
    parts = distilled(ring, ask(prepared(ring), "kn"), saved=True, distill_embedding=embedding)
    recommender = load_recommender(parts.trainer.saved_model_file)
    recommender.export(tmp_path / "plain.pth")
    sizes = SIZES["SASRec"] | {"MAX_ITEM_LIST_LENGTH": 12, "embedding_size": 32}
    plain = stock(ring, "ring", **sizes).model.eval()
    assert type(plain).__module__ == "recbole.model.sequential_recommender.sasrec"
    plain.load_state_dict(torch.load(tmp_path / "plain.pth", weights_only=True))
    parts.trainer.evaluate(parts.test)
    rows = parts.test._dataset.inter_feat
    with torch.no_grad():
        assert torch.equal(plain.full_sort_predict(rows), parts.model.eval().full_sort_predict(rows))


def test_a_student_with_two_tables_answers_and_says_that_it_cannot_be_exported(ring, tmp_path):
    parts = distilled(ring, ask(prepared(ring), "kn"), saved=True, epochs=15, distill_mode="paper")
    recommender = load_recommender(parts.trainer.saved_model_file)
    parts.trainer.evaluate(parts.test)
    best = recommender.recommend(["i03", "i04"], 1)[0]
    with torch.no_grad():
        batch = {"item_id_list": torch.zeros(1, 12, dtype=torch.long), "item_length": torch.tensor([2])}
        batch["item_id_list"][0, :2] = torch.tensor(
            [parts.dataset.token2id("item_id", token) for token in ("i03", "i04")]
        )
        assert best.score == pytest.approx(parts.model.eval().full_sort_predict(batch)[0, 1:].max().item(), abs=1e-5)
    with pytest.raises(
        ValueError,
        match="distill_embedding=input: this student has two item tables; .* Train with distill_embedding=tied",
    ):
        recommender.export(tmp_path / "plain.pth")
    assert not (tmp_path / "plain.pth").exists()


@pytest.mark.parametrize("name", ["GRU4Rec", "Caser", "SASRec"])
def test_stock_models_of_our_trainer_answer_too(ring, tmp_path, monkeypatch, name):
    settings = {key: value for key, value in SMALL.items() if not key.startswith("distill")} | SIZES[name]
    config = Config(name, "ring", None, settings | {"data_path": str(ring), "epochs": 8}, read_argv=False)
    parts = prepared(ring)
    torch.manual_seed(0)
    model = get_model(name)(config, parts.train._dataset)
    trainer = SequenceTrainer(config, model)
    trainer.fit(parts.train, parts.valid)
    trainer.evaluate(parts.test)
    moved = two_files(trainer.saved_model_file, tmp_path / "moved")
    shutil.rmtree(ring)
    answer = load_recommender(moved).recommend(["i03", "i04", "i05"], 24)
    batch = {
        "item_id_list": torch.zeros(1, 12, dtype=torch.long),
        "item_length": torch.tensor([3]),
        "user_id": torch.tensor([0]),
    }
    batch["item_id_list"][0, :3] = torch.tensor(
        [parts.dataset.token2id("item_id", token) for token in ("i03", "i04", "i05")]
    )
    with torch.no_grad():
        scores = model.eval().full_sort_predict(batch)[0, 1:]
    assert [item.score for item in answer] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-4)
    assert answer[0].title == TITLES[TOKENS.index(answer[0].token)]


def test_data_without_titles_give_answers_without(ring):
    plain = {"title_field": None, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    parts = distilled(ring, None, saved=True, distill_mode="off", **plain)
    assert load_recommender(parts.trainer.saved_model_file).recommend(["i03"], 1)[0].title == ""


def test_a_checkpoint_without_tokens_or_not_whole_is_refused(trained, tmp_path):
    with pytest.raises(FileNotFoundError):
        load_recommender(tmp_path / "none.safetensors")
    saved = read_checkpoint(trained.file)
    nameless = {key: value for key, value in saved["meta"].items() if key != "items"}
    write_checkpoint(tmp_path / "nameless.safetensors", saved["state_dict"], nameless)
    with pytest.raises(ValueError, match="this checkpoint names no items"):
        load_recommender(tmp_path / "nameless.safetensors")
    (tmp_path / "half.safetensors").write_bytes(trained.file.read_bytes()[:500])
    with pytest.raises(DamagedArtifact, match="half.safetensors"):
        load_recommender(tmp_path / "half.safetensors")
