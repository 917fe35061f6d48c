"""What labelling costs, from a measured sample: the extrapolation by hand, the sample by a clock that tests wind, the printed lines."""

import json
import logging
from pathlib import Path

import pytest
import torch

from recbole_llm import plan, pretrained, rehearsal
from recbole_llm.command import main
from recbole_llm.knowledge import Knowledge
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.rehearsal import Cost, Rehearsal, bytes_of_knowledge, extrapolated, from_the_middle, measured
from tests.oracle import ask, prepared
from tests.pipelines import ring_settings


class Clock:
    """Time that passes only while titles are written: `start` seconds for every call and `each` for every row."""

    def __init__(self, start: float, each: float):
        self.now, self.start, self.each = 100.0, start, each
        self.written: list[list[int]] = []

    def __call__(self) -> float:
        return self.now

    def write(self, rows: torch.Tensor) -> list[str]:
        self.written.append(rows.tolist())
        self.now += self.start + self.each * len(rows)
        return ["two words"] * len(rows)


def sample_of(clock: Clock, shards: int, limit: float) -> Cost:
    """A sample of shards of ten rows; a prompt has as many tokens as its row's number says."""
    rows = list(torch.arange(10 * shards).split(10))
    return measured(
        rows, clock.write, lambda some, titles: (int(some.sum()), 2 * len(titles)), limit=limit, clock=clock
    )


def estimate(ring, tiny_lm, **more):
    """The plan of a run on the ring, measured."""
    settings = ring_settings(ring, "DLLM2Rec", tiny_lm, state="info", distill_ranking="softmax", **more)
    return run_recbole_llm("DLLM2Rec", "ring", config_dict=settings, estimate=True)["plan"]


def test_seconds_follow_the_tokens_and_new_tokens_the_rows():
    """(300 + 100) tokens in 8 s are 20 ms a token; (3000 + 400) of them are 68 s."""
    whole = extrapolated(Cost(10, 300, 100, 8.0), rows=40, prompt_tokens=3000)
    assert whole == Cost(40, 3000, 400, pytest.approx(68.0))
    assert extrapolated(Cost(10, 300, 100, 8.0), 10, 300) == Cost(10, 300, 100, pytest.approx(8.0))


def test_where_there_is_time_every_row_is_written_once_after_one_that_warms_up():
    clock = Clock(start=0.5, each=0.01)
    cost = sample_of(clock, shards=3, limit=30)
    assert clock.written[0] == [10] and sorted(sum(clock.written[1:], [])) == list(range(30))
    assert cost == Cost(30, sum(range(30)), 60, pytest.approx(1.8)), "the row that warmed up is not counted"


def test_the_sample_ends_before_the_time_does_and_is_spread_over_all_lengths():
    clock = Clock(start=0.0, each=1.0)
    cost = sample_of(clock, shards=7, limit=30)
    assert clock.written == [[30], list(range(30, 40)), list(range(10, 20))] and clock.now == 121
    assert cost.rows == 20 and cost.seconds == 20


def test_a_slow_machine_writes_a_part_of_a_shard_or_one_row_only():
    clock = Clock(start=0.0, each=4.0)
    assert sample_of(clock, shards=3, limit=30).rows == 6 and clock.now <= 130
    clock = Clock(start=5.0, each=0.5)
    assert sample_of(clock, shards=3, limit=30).rows == 14
    assert list(map(len, clock.written)) == [1, 4, 10], "the first row foretells too much, what it leaves is used"
    clock = Clock(start=0.0, each=40.0)
    assert sample_of(clock, shards=3, limit=30) == Cost(1, 10, 2, 40.0) and len(clock.written) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 7, 100])
def test_from_the_middle_names_each_once_and_spreads_the_first_few(count):
    order = from_the_middle(count)
    assert sorted(order) == list(range(count))
    if count == 100:
        assert order[:3] == [50, 25, 75]


def test_the_bytes_of_a_knowledge_are_those_of_its_tensors(ring):
    known = ask(prepared(ring), "kn", rows=100)
    names = ("row", "items", "score", "target_score", "trained", "item_embedding")
    held = sum(getattr(known, name).nbytes for name in names)
    assert bytes_of_knowledge(100, 5, 25, known.item_embedding.shape[1]) == held
    on_disk = sum(file.stat().st_size for file in Path("kn").glob("*.safetensors"))
    assert held < on_disk < held + 4096


def test_the_text_says_rows_tokens_seconds_memory_and_disk():
    found = Rehearsal(Cost(64, 9600, 640, 20.0), Cost(1200, 180000, 12000, 375.0), 1_340_000_000, 4_100_000, tuned=True)
    assert found.text() == (
        "Measured here: 64 titles in 20.0 s, 9600 prompt tokens and 640 new ones. So 1200 rows: 180000 prompt tokens and "
        "12000 new ones, 375.0 s, a peak of 1.34 GB of memory, 4.10 MB on disk."
    )
    assert found.seconds_of(120) == 37.5
    strange = Rehearsal(found.sample, found.whole, None, found.disk, tuned=False).text()
    assert "memory unknown" in strange and strange.endswith(
        "The LLM is not tuned yet; tuned, it may write longer or shorter titles."
    )


def test_estimate_measures_labelling_and_leaves_nothing_behind(ring, tiny_lm, caplog):
    with caplog.at_level(logging.INFO):
        steps = estimate(ring, tiny_lm)
    labelling = next(step for step in steps if "labels 24 of 540 training rows" in step.what)
    testing = next(step for step in steps if "is tested on 8 of 60 test rows" in step.what)
    found = labelling.measured
    assert found.sample.rows == found.whole.rows == 24 and not found.tuned
    assert found.whole.prompt_tokens == found.sample.prompt_tokens > 24 * 100
    assert 24 < found.sample.new_tokens <= 24 * (16 + 3)  # at most 16 are written; quotes and the end are counted in
    assert labelling.seconds == found.whole.seconds == pytest.approx(found.sample.seconds)
    assert testing.seconds == pytest.approx(labelling.seconds / 3)
    assert found.memory > 10e6 and found.disk == bytes_of_knowledge(24, 10, 25, 32)
    assert found.text() in caplog.text and plan.HOW in caplog.text
    assert not list(Path("saved").rglob("*.safetensors"))


def test_what_is_labelled_already_or_by_others_costs_nothing(ring, tiny_lm):
    def labelling(**more):
        return next(
            step for step in estimate(ring, tiny_lm, **more) if "labels 24 of 540 training rows" in step.what
        ).measured

    part = labelling(teacher_shard="2/3")
    assert (
        part.whole.rows == 8
        and part.rows == 24
        and "So 8 rows (of 24; the others are labelled already, or by other parts)" in part.text()
    )
    settings = ring_settings(ring, "DLLM2Rec", tiny_lm, distill_ranking="softmax", teacher_shard="1/3")
    run_recbole_llm("DLLM2Rec", "ring", config_dict=settings)
    assert labelling().whole.rows == 16
    done = labelling(teacher_shard="1/3")
    assert (done.whole.rows, done.whole.seconds) == (0, 0) and done.seconds_of(10) > 0


def test_the_command_takes_the_flag_and_its_log_has_the_measured_line(ring, tiny_lm, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(ring_settings(ring, "DLLM2Rec", tiny_lm, state="info", distill_ranking="softmax")))
    assert main(["--model=DLLM2Rec", "--dataset=ring", f"--config_files={file}", "--estimate"]) == 0
    (log,) = Path("saved/runs").rglob("run.log")
    assert "    Measured here: 24 titles in" in log.read_text(encoding="utf-8")


def test_an_llm_that_is_not_to_be_had_is_said_in_a_line_and_counted_instead(ring, monkeypatch, caplog):
    def nowhere(name, revision=None, key="llm"):
        raise pretrained.ModelNotFound(f"{key}={name}: neither here\n  nor there.")

    monkeypatch.setattr(pretrained, "find", nowhere)
    with caplog.at_level(logging.INFO):
        steps = estimate(ring, "some/Model-135M")
    labelling = next(step for step in steps if "labels 24 of 540" in step.what)
    assert labelling.seconds > 0 and labelling.measured is None
    (line,) = [record.getMessage() for record in caplog.records if "Nothing is measured" in record.getMessage()]
    assert line == "Nothing is measured, the times are counted: llm=some/Model-135M: neither here nor there."


def test_only_an_estimate_is_measured(ring, tiny_lm, monkeypatch):
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: pytest.fail("measured"))
    settings = {"teacher_llm": str(tiny_lm), "distill_ranking": "softmax", "teacher_rows": 24}
    parts = prepared(ring, **settings)
    assert any("labels 24 of 540" in step.what for step in plan.steps(parts.config, parts))
    whole = prepared(ring, teacher="SASRec", teacher_trained_rows="keep", distill_ranking="softmax")
    assert plan.steps(whole.config, whole, measure=True), "what labels by windows is counted"


def test_a_tuned_llm_is_measured_with_its_adapter_and_a_finished_knowledge_not_at_all(ring, tiny_lm):
    settings = ring_settings(ring, "DLLM2Rec", tiny_lm, distill_ranking="softmax")
    run_recbole_llm("DLLM2Rec", "ring", config_dict=settings)
    assert not any(step.measured for step in estimate(ring, tiny_lm))
    (folder,) = Path("saved/knowledge").iterdir()
    titles = len(Knowledge.load(folder).row)
    for file in [folder / "manifest.json", *folder.glob("shard-*")]:
        file.unlink()
    steps = estimate(ring, tiny_lm)
    assert steps[0].what.startswith("Take the tuned BIGRec")
    (found,) = [step.measured for step in steps if step.measured]
    assert found.tuned and found.whole.rows == titles == 24
