"""P5: ids that leak nothing, beams that are items only, exact scores, and learning, on the ring and on a log of chance."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model

from recbole_llm.beams import CodeTrie, exact, forced, search
from recbole_llm.checkpoint import read_checkpoint
from recbole_llm.indexing import (
    INDEXES,
    collaborative_paths,
    in_places,
    is_prefix_free,
    keyed_order,
    padded_codes,
    sequential_numbers,
)
from recbole_llm.knowledge import Knowledge
from recbole_llm.model.p5 import LEAST
from recbole_llm.plan import training
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.recommend import load_recommender
from recbole_llm.sequences import latest
from recbole_llm.teacher import item_table, rank
from tests.oracle import ask, distilled, prepared
from tests.pipelines import ring_settings
from tests.ring import TOKENS, following, shuffled
from tests.test_contract import Trained

LEARNS = {
    "epochs": 40,
    "eval_step": 40,
    "learning_rate": 0.005,
    "train_batch_size": 64,
    "p5_dropout": 0.0,
    "p5_history": 4,
}


@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    """A folder with a one-layer T5 whose tokenizer knows letters, digits and two-digit pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from recbole_llm import t5

    folder = tmp_path_factory.mktemp("tiny_t5")
    pieces = [f"{number:02d}" for number in range(100)]
    words = ["<pad>", "</s>", *map(chr, range(32, 127)), *pieces]
    merges = [(piece[0], piece[1]) for piece in pieces]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        t5.build(len(words), 1, 32, 2, 64, 0.0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untied_t5(tiny_t5, tmp_path_factory):
    """The same with an output layer of its own and states that are not scaled, its config as flan-t5's says so."""
    from transformers import T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("untied_t5")
    shutil.copytree(tiny_t5, folder, dirs_exist_ok=True)
    network = T5ForConditionalGeneration.from_pretrained(tiny_t5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network.lm_head.weight = torch.nn.Parameter(0.1 * torch.randn_like(network.lm_head.weight))
    network.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    del settings["scale_decoder_outputs"]
    (folder / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    return folder


def write_chance(folder, users=80, length=8, items=4000):
    """A log in which nobody's next item follows from anything, its file sorted by user and then by time."""
    draw = random.Random(1)
    (folder / "chance").mkdir(parents=True)
    rows = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(users):
        for time in range(length):
            rows.append(f"u{user}\tx{draw.randrange(items)}\t{user * length + time + 1}")
    (folder / "chance" / "chance.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")


def splits(folder, index):
    """P5 on the log of chance, and RecBole's three splits of it."""
    settings = {"data_path": str(folder), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    settings |= {"p5_index": index, "state": "error", "p5_width": 8, "p5_heads": 1, "p5_inner": 8, "p5_group": 20}
    config = Config(model="P5", dataset="chance", config_dict=settings)
    data = data_preparation(config, create_dataset(config))
    return get_model("P5")(config, data[0]._dataset), [part._dataset for part in data]


def hits_of_next(number, dataset):
    """How often the number after the last item's is the target's [rows]."""
    rows = dataset.inter_feat
    history, length = rows["item_id_list"][torch.arange(len(rows))], rows["item_length"]
    last = history[torch.arange(len(rows)), length - 1]
    return number[last] + 1 == number[rows["item_id"]]


def id_order(model):
    """What an id's text amounts to as a number: its place among all ids, in the order of their pieces [n_items]."""
    codes = [tuple(code) for code in model.item_codes[1:].tolist()]
    place = {code: number for number, code in enumerate(sorted(codes))}
    return torch.tensor([-9, *(place[code] for code in codes)])


@pytest.mark.parametrize("index", INDEXES)
def test_the_id_after_the_last_one_is_not_the_target(tmp_path, index):
    """With RecBole's own ids it is: the control that shows that the test can fail."""
    write_chance(tmp_path)
    model, (train, valid, test) = splits(tmp_path, index)
    internal = torch.arange(model.n_items)
    for part in (valid, test):
        assert hits_of_next(internal, part).float().mean() > 0.7
        assert hits_of_next(id_order(model), part).float().mean() < 0.05
    if index == "sequential":  # the published scheme: training items follow each other
        assert hits_of_next(id_order(model), train).float().mean() > 0.7
    elif index == "random":
        assert hits_of_next(id_order(model), train).float().mean() < 0.05


@pytest.mark.parametrize("index", INDEXES)
def test_what_is_held_out_does_not_shape_the_ids(tmp_path, index):
    """Other validation and test items of the same catalogue: every id of every item stays as it was."""
    write_chance(tmp_path / "here")
    path = tmp_path / "here" / "chance" / "chance.inter"
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    fields = [row.split("\t") for row in rows]
    held = [place for place in range(len(fields)) if place % 8 >= 6]
    moved = random.Random(2).sample([fields[place][1] for place in held], len(held))
    for place, item in zip(held, moved, strict=True):
        fields[place][1] = item
    (tmp_path / "there" / "chance").mkdir(parents=True)
    text = "\n".join([head, *map("\t".join, fields)]) + "\n"
    (tmp_path / "there" / "chance" / "chance.inter").write_text(text, encoding="utf-8")
    codes = []
    for folder in ("here", "there"):
        model, (train, *_) = splits(tmp_path / folder, index)
        tokens = train.field2id_token["item_id"]
        codes.append({tokens[item]: tuple(model.item_codes[item].tolist()) for item in range(1, model.n_items)})
    assert codes[0] == codes[1]


def test_sequential_numbers_walk_and_leave_the_rest_in_keyed_order():
    order = np.array([4, 2, 0, 3, 1])
    assert sequential_numbers(np.array([3, 1, 3]), order).tolist() == [4, 1, 3, 0, 2]


def test_numbers_are_written_in_pieces_of_one_length():
    assert in_places(np.array([0, 7, 1682]), 2) == [("0:00", "1:00"), ("0:00", "1:07"), ("0:16", "1:82")]
    assert in_places(np.array([0, 9]), 1) == [("0:0",), ("0:9",)]


def test_keyed_order_follows_from_tokens_and_seed():
    tokens = [f"t{number}" for number in range(50)]
    order = [tokens[place] for place in keyed_order(tokens, 1)]
    assert order == [tokens[::-1][place] for place in keyed_order(tokens[::-1], 1)]
    assert order != sorted(order) and order != [tokens[place] for place in keyed_order(tokens, 2)]


def test_collaborative_paths_bring_items_of_the_same_users_together():
    """Six groups of ten items, each met by users of its own with one item of another group, and five items that nobody met."""
    users = np.repeat(np.arange(60), 8)
    draw = np.random.RandomState(0)
    items = np.concatenate([user % 6 * 10 + draw.choice(10, 8, replace=False) for user in range(60)])
    items[::8] = draw.randint(0, 60, 60)
    paths = collaborative_paths(users, items, np.arange(65), clusters=6, group=12, seed=0)
    branches = [{path[0] for path in paths[start : start + 10]} for start in range(0, 60, 10)]
    assert all(len(branch) == 1 for branch in branches) and len(set.union(*branches)) == 6
    unmet = {path[0] for path in paths[60:]}
    assert len(unmet) == 1 and not unmet & set.union(*branches)
    assert len(set(paths)) == 65 and is_prefix_free(paths)


@given(some.integers(1, 60), some.integers(1, 5), some.integers(0, 5))
def test_collaborative_paths_are_whole_for_any_log(count, group, seed):
    draw = np.random.RandomState(seed)
    users, items = draw.randint(0, 9, 40), draw.randint(0, count, 40)
    paths = collaborative_paths(users, items, np.arange(count), clusters=3, group=group, seed=seed)
    assert len(set(paths)) == count and is_prefix_free(paths)


class Spoken:
    """Stands for a network: the next token's probabilities are a fixed function of the prefix."""

    start = 0

    def __init__(self, rows, vocabulary):
        self.rows, self.vocabulary, self.prefixes = rows, vocabulary, None

    def step(self, tokens, parents):
        if parents is None:
            self.prefixes = [[(row, token) for token in kept] for row, kept in enumerate(tokens.tolist())]
        else:
            both = zip(tokens.tolist(), parents.tolist(), self.prefixes, strict=True)
            self.prefixes = [[(*old[parent], token) for token, parent in zip(*new, strict=True)] for *new, old in both]
        return torch.tensor([[[hash(prefix) % 997] for prefix in row] for row in self.prefixes])

    def distribution(self, prefix):
        generator = torch.Generator().manual_seed(hash(tuple(prefix)) % 997)
        return torch.randn(self.vocabulary, generator=generator).log_softmax(0)

    def log_p(self, states, wanted):
        seeds = states.squeeze(2)
        table = torch.stack(
            [
                torch.stack(
                    [torch.randn(self.vocabulary, generator=torch.Generator().manual_seed(seed)) for seed in row]
                )
                for row in seeds.tolist()
            ]
        ).log_softmax(-1)
        return table.gather(2, wanted.expand(len(states), -1, -1))


CODES = [(1, 2), (1, 3), (2, 1), (2, 2, 4), (2, 2, 5), (3,), (1, 4, 1), (1, 4, 2)]


def by_hand(row, spoken):
    """Log-probability of each code, token by token."""
    return [
        sum(float(spoken.distribution((row, 0, *code[:place]))[code[place]]) for place in range(len(code)))
        for code in CODES
    ]


def test_exact_scores_are_the_sums_of_each_code_and_all_beams_agree_with_them():
    trie, spoken = CodeTrie(padded_codes(CODES)), Spoken(3, 6)
    scores = exact(spoken, trie, 3)
    assert torch.allclose(scores[:, 1:], torch.tensor([by_hand(row, spoken) for row in range(3)]), atol=1e-5)
    items, score = search(spoken, trie, 3, len(CODES))
    assert torch.allclose(score, scores.gather(1, items)) and (score.diff(dim=1) <= 0).all()
    assert items.sort(dim=1).values.tolist() == [list(range(1, 9))] * 3
    chosen = torch.tensor([4, 6, 1])
    assert torch.allclose(forced(spoken, padded_codes(CODES)[chosen]), scores[torch.arange(3), chosen], atol=1e-5)


@pytest.mark.parametrize("beams", range(1, 8))
def test_few_beams_are_what_a_search_by_hand_keeps(beams):
    trie, spoken = CodeTrie(padded_codes(CODES)), Spoken(2, 6)
    items, score = search(spoken, trie, 2, beams)
    assert items.shape == (2, beams)
    for row in range(2):
        kept = [((), 0.0)]
        for _ in range(3):
            grown = [(prefix, value) for prefix, value in kept if prefix in CODES]
            for prefix, value in kept:
                following_tokens = {code[len(prefix)] for code in CODES if code[: len(prefix)] == prefix != code}
                odds = spoken.distribution((row, 0, *prefix))
                grown += [((*prefix, token), value + float(odds[token])) for token in following_tokens]
            kept = sorted(grown, key=lambda each: -each[1])[:beams]
        assert [CODES[item - 1] for item in items[row].tolist()] == [prefix for prefix, _ in kept]
        assert torch.allclose(score[row], torch.tensor([value for _, value in kept]), atol=1e-5)


def test_the_latest_items_and_their_places():
    items, place = latest(torch.tensor([[1, 2, 3, 4, 0], [5, 0, 0, 0, 0]]), 3)
    assert items.tolist() == [[2, 3, 4], [5, 0, 0]] and place.tolist() == [[3, 2, 1], [1, 0, 0]]


@pytest.mark.parametrize("index, user_id", [*((index, False) for index in INDEXES), ("random", True)])
def test_it_learns_the_ring(ring, index, user_id):
    trained = Trained("P5", ring, None, p5_index=index, p5_user_id=user_id, **LEARNS).fit()
    result = trained.trainer.evaluate(trained.data[2], load_best_model=False)
    # whose history it is means nothing here, so naming the user can only disturb
    assert result["recall@1"] > 0.95 if user_id else result["recall@1"] == 1


def test_beams_are_items_and_all_others_stand_below_in_an_order_of_their_own(ring):
    trained = Trained("P5", ring, None, p5_beams=10, epochs=1).fit()
    batch = trained.batch(20)
    scores = trained.scores(batch)
    trained.model.exact = True
    known = trained.scores(batch)
    trained.model.exact = False
    best = scores.topk(10).indices
    assert (best > 0).all() and all(len(set(row)) == 10 for row in best.tolist())
    assert torch.allclose(scores.gather(1, best), known.gather(1, best), atol=1e-4)
    rest = scores.scatter(1, best, torch.inf)[:, 1:]
    assert (rest[torch.isfinite(rest)].view(20, -1).max(dim=1).values < scores.gather(1, best)[:, -1]).all()
    assert (scores.argmin(dim=1) == 0).all()
    # the items of no beam keep one order in all rows
    place = trained.model.place
    for row in range(20):
        others = [item for item in scores[row].argsort(descending=True).tolist() if item not in best[row]]
        assert others == sorted(others, key=lambda item: float(place[item]))


@pytest.mark.parametrize("index", INDEXES)
def test_as_many_beams_as_items_are_exact(ring, index):
    settings = {"epochs": 1, "p5_index": index}
    beams = Trained("P5", ring, None, p5_beams=24, checkpoint_dir="a", **settings).fit()
    whole = Trained("P5", ring, None, p5_score="exact", checkpoint_dir="b", **settings).fit()
    batch = beams.batch(20)
    assert torch.allclose(beams.scores(batch)[:, 1:], whole.scores(batch)[:, 1:], atol=1e-4)
    total = whole.scores(batch)[:, 1:].exp().sum(dim=1)
    assert (total <= 1 + 1e-4).all() and (total > 0).all()


@pytest.mark.parametrize("folder", ["tiny_t5", "untied_t5"])
@pytest.mark.parametrize("index", INDEXES)
def test_decoding_is_that_of_the_network_itself(ring, request, folder, index):
    """Scores are what Hugging Face's own forward gives when it is fed each item's code."""
    folder = request.getfixturevalue(folder)
    model = Trained("P5", ring, None, p5_index=index, llm=str(folder), p5_score="exact").model.eval()
    batch = Trained("P5", ring, None).batch(4)
    with torch.no_grad():
        scores = model.full_sort_predict(batch)
        tokens, places = model.prompt(batch)
        for item in (1, 7, 24):
            labels = model.item_codes[item].expand(4, -1).masked_fill(model.item_codes[item] == 0, -100)
            out = model.network(
                inputs_embeds=model._embedded(tokens, places), attention_mask=(tokens > 0).long(), labels=labels
            )
            odds = out.logits.log_softmax(-1).gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
            assert torch.allclose(scores[:, item], (odds * (labels >= 0)).sum(dim=1), atol=1e-4)


def test_a_search_by_hugging_face_finds_the_same_beams(ring, tiny_t5):
    """`generate` under the same trie and without its division by length."""
    model = Trained("P5", ring, None, p5_index="random", llm=str(tiny_t5), p5_beams=10).model.eval()
    batch = Trained("P5", ring, None).batch(4)
    scores = model.full_sort_predict(batch)
    items = scores.topk(10).indices
    tokens, places = model.prompt(batch)
    codes = [code[code > 0].tolist() for code in model.item_codes[1:]]

    def allowed(_, written):
        head = written[1:].tolist()
        return sorted({code[len(head)] for code in codes if code[: len(head)] == head and code != head}) or [0]

    found = model.network.generate(
        inputs_embeds=model._embedded(tokens, places),
        attention_mask=(tokens > 0).long(),
        num_beams=10,
        num_return_sequences=10,
        length_penalty=0.0,
        max_new_tokens=model.item_codes.shape[1],
        prefix_allowed_tokens_fn=allowed,
        output_scores=True,
        return_dict_in_generate=True,
        do_sample=False,
    )
    theirs = [codes.index([token for token in row if token > 0]) + 1 for row in found.sequences.tolist()]
    assert items.flatten().tolist() == theirs
    assert torch.allclose(scores.gather(1, items).flatten(), found.sequences_scores, atol=1e-4)


def test_a_checkpoint_writes_with_its_own_tokenizer_and_learns(ring, tiny_t5):
    trained = Trained(
        "P5", ring, None, p5_index="collaborative", llm=str(tiny_t5), **LEARNS | {"epochs": 3, "eval_step": 1}
    )
    before = trained.model.network.get_input_embeddings().weight.clone()
    model = trained.model
    tokens, places = model.prompt(trained.batch(2))
    assert (tokens[:, -1] == 1).all() and set(places.unique().tolist()) == set(range(5))
    assert len(model.comma) == 1 and model.item_codes.max() >= 197  # paths are new words
    trained.fit()
    assert not torch.equal(before, model.network.get_input_embeddings().weight)
    assert trained.trainer.train_loss_dict[2] < trained.trainer.train_loss_dict[0]


def test_pieces_of_an_item_share_its_place_and_padding_lies_behind(ring):
    model = Trained("P5", ring, None, p5_history=3).model
    history = torch.tensor([[1, 2, 3, 4], [5, 0, 0, 0]])
    from recbole.data.interaction import Interaction

    tokens, places = model.prompt(Interaction({"item_id_list": history, "user_id": torch.tensor([1, 2])}))
    for row, items in enumerate([[2, 3, 4], [5]]):
        code = [token for item in items for token in model.item_codes[item].tolist() if token]
        assert tokens[row][tokens[row] > 0].tolist() == [2, 3, *code]
        lengths = [int((model.item_codes[item] > 0).sum()) for item in items]
        expected = [len(items) - number for number, length in enumerate(lengths) for _ in range(length)]
        assert places[row][tokens[row] > 0].tolist() == [0, 0, *expected]
        assert tokens[row].tolist() == sorted(tokens[row].tolist(), key=lambda token: token == 0)


def test_the_place_in_the_history_matters_only_if_asked_for(ring):
    plain = Trained("P5", ring, None, p5_whole_word=False).model
    assert plain.whole_word is None and not any("whole_word" in name for name in plain.state_dict())
    with_places = Trained("P5", ring, None).model
    batch = Trained("P5", ring, None).batch(4)
    before = with_places.eval().full_sort_predict(batch)
    torch.nn.init.zeros_(with_places.whole_word.weight)
    assert not torch.allclose(before, with_places.full_sort_predict(batch))


def test_a_sample_of_rows_is_trained_on_and_known(ring):
    trained = Trained("P5", ring, None, p5_train_rows=50, epochs=1).fit()
    assert len(trained.trainer.loader._dataset) == 50
    flags = trained.model.trained_on(540)
    assert flags.sum() == 50
    saved = read_checkpoint(trained.trainer.saved_model_file)
    assert saved["other_parameter"]["tuned_on"] == [50, 2024]
    assert Trained("P5", ring, None).model.trained_on(540).all()


def test_weights_find_their_items_in_data_of_another_order(ring, tmp_path):
    here = Trained("P5", ring, None, epochs=1, p5_user_id=True).fit()
    there = Trained("P5", shuffled(ring, tmp_path / "other"), None, p5_user_id=True)
    there.model.load_state_dict(here.model.state_dict())
    there.model.eval()
    item = {run: torch.from_numpy(run.data[0]._dataset.token2id("item_id", list(TOKENS))) for run in (here, there)}
    row = {}
    for run in (here, there):
        test = run.data[2]._dataset
        user = test.token2id("user_id", "u07")
        row[run] = run.scores(test[(test.inter_feat["user_id"] == user).nonzero()[:, 0]])[0][item[run]]
    assert not torch.equal(item[here], item[there])
    assert torch.allclose(row[here], row[there], atol=1e-5)


def test_weights_of_other_items_are_refused(ring, tmp_path):
    model = Trained("P5", ring, None).model
    state = model.state_dict() | {"item_keys": model.item_keys + 1}
    with pytest.raises(ValueError, match="p5_index=collaborative: these weights were trained on other items"):
        model.load_state_dict(state)


@pytest.mark.parametrize("llm", [False, True])
def test_a_saved_p5_recommends_without_data(ring, tiny_t5, llm):
    more = {"llm": str(tiny_t5), "epochs": 1} if llm else LEARNS
    trained = Trained("P5", ring, None, **more).fit()
    trained.trainer.evaluate(trained.data[2], load_best_model=True)
    best = load_recommender(trained.trainer.saved_model_file).recommend(list(TOKENS[3:7]), k=3)
    assert len(best) == 3
    if not llm:
        assert best[0].token == following(TOKENS[6])


@pytest.mark.parametrize("index", ["random", "collaborative"])
def test_an_output_layer_of_its_own_stays_one(ring, untied_t5, index):
    """New words (collaborative), training, saving and loading without data leave it apart from the token table."""
    trained = Trained("P5", ring, None, llm=str(untied_t5), p5_index=index, p5_score="exact", epochs=1).fit()
    trained.trainer.evaluate(trained.data[2], load_best_model=True)
    saved = load_recommender(trained.trainer.saved_model_file).model
    own, theirs = ((model.network.lm_head.weight, model.network.shared.weight) for model in (trained.model, saved))
    assert not torch.equal(*own) and all(torch.equal(*pair) for pair in zip(own, theirs, strict=True))
    batch = trained.batch(20)
    assert torch.equal(trained.scores(batch), saved.full_sort_predict(batch))
    assert (len(own[0]) > 197) == (index == "collaborative")


def test_it_ranks_and_has_vectors_as_a_teacher(ring):
    trained = Trained("P5", ring, None, **LEARNS | {"epochs": 1, "eval_step": 1}).fit()
    batch = trained.batch(5)
    items, score, target = rank(trained.model, batch, 5)
    assert (items > 0).all() and (score.diff(dim=1) <= 0).all() and torch.isfinite(target).all()
    table = item_table(trained.model)
    assert table.shape == (25, 32) and not table[0].any() and table[1:].std() > 0
    assert trained.model.work(torch.tensor([[1, 2, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]])).tolist() == [2, 4]


@pytest.mark.parametrize("index", INDEXES)
def test_what_is_no_beam_is_no_candidate_and_the_target_has_its_own_score(ring, index):
    model = Trained("P5", ring, None, p5_index=index, p5_beams=10, epochs=1).fit().model
    batch = Trained("P5", ring, None).batch(30)
    best = model.full_sort_predict(batch).topk(10)
    items, score, target = rank(model, batch, 15)
    assert torch.equal(items[:, :10], best.indices) and torch.allclose(score[:, :10], best.values, atol=1e-5)
    assert not items[:, 10:].any() and torch.equal(score[:, 10:], score[:, 9:10].expand(-1, 5))
    fewer = rank(model, batch, 4)
    assert torch.equal(fewer[0], items[:, :4]) and torch.equal(fewer[2], target)
    model.exact = True
    own = batch["item_id"].unsqueeze(1)
    assert not (items == own).any(dim=1).all()
    assert torch.allclose(target, model.full_sort_predict(batch).gather(1, own).squeeze(1), atol=1e-4)
    assert (rank(model, batch, 15)[0] > 0).all()


@pytest.mark.parametrize("ranking", ["softmax", "kl"])
@pytest.mark.parametrize("confidence", ["truth", "candidate"])
def test_a_student_learns_from_rows_with_fewer_candidates(ring, ranking, confidence):
    settings = {"distill_ranking": ranking, "distill_confidence": confidence, "distill_topk": 20}
    parts = prepared(ring, **settings)
    known = ask(parts, "kn", Trained("P5", ring, None, p5_beams=10).model.eval(), rows=100, k=20)
    assert not known.items[:, 10:].any() and torch.isfinite(known.score).all()
    taught = distilled(ring, known, epochs=2, teacher_trained_rows="keep", **settings)
    assert taught.trainer.attached.items.shape[1] == 20 and taught.trainer.attached.labelled == 100
    assert all(np.isfinite(losses).all() for losses in taught.trainer.train_loss_dict.values())
    assert all(torch.isfinite(weight).all() for weight in taught.model.parameters())


def test_a_student_learns_from_it(ring):
    settings = ring_settings(ring, "DLLM2Rec", None, teacher="P5", epochs=2, teacher_rows=40, teacher_p5_width=16)
    settings |= {"teacher_p5_train_rows": 300, "teacher_epochs": 2, "teacher_p5_digits": 1, "teacher_history": 5}
    settings |= {"teacher_topk": [1, 10]}
    result = run_recbole_llm("DLLM2Rec", "ring", None, settings)
    assert [line.name for line in result["lines"]] == ["P5 (teacher)", "SASRec alone", "SASRec distilled"]
    knowledge = Knowledge.load(result["lines"][0].notes["knowledge"]["folder"])
    assert len(knowledge.row) == 40 and (knowledge.items > 0).all() and not knowledge.trained.any()
    assert knowledge.item_embedding.shape == (25, 16)


def test_the_plan_counts_what_its_encoder_reads(ring):
    config = Trained("P5", ring, None).config
    once = training(config, "P5", 1000, 25, 1e9).seconds
    config["p5_history"] *= 3
    assert training(config, "P5", 1000, 25, 1e9).seconds == pytest.approx(3 * once)
    config["p5_train_rows"] = 100
    assert training(config, "P5", 1000, 25, 1e9).seconds == pytest.approx(0.3 * once)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"p5_index": "semantic"}, r"p5_index=semantic: no such choice. There is random, sequential, collaborative"),
        ({"p5_score": "beams"}, r"p5_score=beams: no such choice; did you mean 'beam'\? There is beam, exact"),
        ({"p5_beams": 25}, r"p5_beams=25: the number of items allows 1 to 24"),
        ({"p5_beams": 5}, r"p5_beams=5: fewer than topk=\[1, 10\] ranks"),
        ({"p5_history": 11}, r"p5_history=11: MAX_ITEM_LIST_LENGTH allows 1 to 10"),
        ({"p5_heads": 3}, r"p5_heads=3: does not divide p5_width=32"),
        (
            {"llm_dtype": "float16"},
            r"llm_dtype=float16: no such choice; did you mean 'bfloat16'\? There is auto, float32, bfloat16",
        ),
        ({"p5_indx": "random"}, r"p5_indx=random \(did you mean 'p5_index'\?\)"),
    ],
)
def test_wrong_settings_say_what_there_is(ring, settings, message):
    with pytest.raises(ValueError, match=message):
        Trained("P5", ring, None, **settings)


@pytest.mark.parametrize("value", [-1, 1.5, "two", True])
@pytest.mark.parametrize("key, least", LEAST.items())
def test_sizes_are_whole_numbers_that_a_network_can_have(ring, key, least, value):
    for wrong in (value, least - 1):
        with pytest.raises(
            ValueError, match=f"{key}={wrong}: not possible; there is whole numbers from {least} upwards. Set {key}"
        ):
            Trained("P5", ring, None, **{key: wrong})


def test_defaults_shrink_to_a_small_catalogue(ring):
    settings = ring_settings(ring, "P5", None)
    settings = {key: value for key, value in settings.items() if key not in ("p5_beams", "topk", "valid_metric")}
    config = Config(model="P5", dataset="ring", config_dict=settings | {"MAX_ITEM_LIST_LENGTH": 6})
    model = get_model("P5")(config, data_preparation(config, create_dataset(config))[0]._dataset)
    assert model.beams == 20 and model.history_length == 6


def test_a_model_that_is_no_t5_is_refused(ring, tiny_lm):
    with pytest.raises(
        ValueError, match=r"llm=.*: is a model of type llama; P5 reads and writes with an encoder-decoder"
    ):
        Trained("P5", ring, None, llm=str(tiny_lm))


def test_half_precision_of_amp_never_reaches_the_network(ring):
    model = Trained("P5", ring, None).model
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(
            model.eval().full_sort_predict(Trained("P5", ring, None).batch(2)),
            model.full_sort_predict(Trained("P5", ring, None).batch(2)),
        )
    low = Trained("P5", ring, None, llm_dtype="bfloat16", epochs=1).fit()
    assert torch.isfinite(low.scores(low.batch())).all()
