"""What a run of LSC4Rec says of itself: account, pictures, seeds, costs."""

import json
import pathlib

import numpy as np
import pytest

from recbole_llm.account import Account, area_over, share_kept
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.seeds import together
from tests.collaborations import SMALL, fitted


def test_a_run_writes_its_account_and_pictures_and_is_taken_from_its_folder(source):
    settings = SMALL | {"data_path": str(source), "lsc_evaluation": "stream", "lsc_steps": 3, "lsc_rates": [0.2, 0.5]}
    first = run_recbole_llm("LSC4Rec", "log", config_dict=settings)
    folder = first["folder"]
    names = {path.name for path in pathlib.Path(folder).iterdir()}
    for picture in ("rate", "alpha", "scale", "latency", "bytes_up", "bytes_down"):
        assert {f"{picture}.png", f"{picture}.html"} <= names
    for words in (
        "in the cloud, up to date",
        "on the device, re-ranking",
        "never asked",
        "always asked",
        "after phase retrain",
    ):
        assert words in first["table"]
    for policy in ("random", "periodic", "consistency", "confidence", "history-drift", "learned", "oracle"):
        assert f"| {policy}" in first["table"]
    account = Account.load(pathlib.Path(folder))
    assert json.loads((pathlib.Path(folder) / "account.json").read_text())["chosen"]["steps"] == 3
    again = run_recbole_llm("LSC4Rec", "log", config_dict=settings)
    assert again["test_result"] == first["test_result"] and len(account.rows) == 14
    assert (
        "invalid-count: n/a, no list lacks a candidate" in first["table"]
        and "The target is among the 12 candidates" in first["table"]
    )
    assert all(line.cached for line in again["lines"])
    # over the best of cloud and device alone, from the same numbers
    alone = max(
        (line for line in account.lines if not line.name.startswith("both") and "up to date" not in line.name),
        key=lambda line: f"the strongest on validation is {line.name} (" in first["table"],
    )
    for row in account.rows:
        assert (
            row.over[0] == pytest.approx(row.score / alone.metrics["ndcg@5"] - 1)
            and row.over[1] <= row.over[0] <= row.over[2]
        )
    assert "over the strongest alone: " in first["table"] and "over the best alone" in first["table"]


def test_runs_of_several_seeds_are_one_table(source):
    settings = SMALL | {"data_path": str(source), "lsc_rates": [0.5]}
    folders = [
        pathlib.Path(run_recbole_llm("LSC4Rec", "log", config_dict=settings | {"seed": seed})["folder"])
        for seed in (1, 2)
    ]
    text = together(folders)
    assert "2 seeds, 38 users" in text and "| random" in text and " ±" in text
    assert "both (LSC4Rec), never asked against SASRec alone, whole catalogue, after phase retrain, ndcg@5: " in text
    scores = [Account.load(folder).lines[0].metrics["ndcg@5"] for folder in folders]
    assert f"{np.mean(scores):.4f} ±{np.std(scores, ddof=1):.4f}" in text
    with pytest.raises(ValueError, match="a seed stands twice"):
        together([folders[0], folders[0]])
    with pytest.raises(ValueError, match="nowhere: no finished run of LSC4Rec there"):
        together([pathlib.Path("nowhere")])


def test_the_share_of_the_gain_and_its_interval():
    base, most = np.zeros(200), np.full(200, 0.5) + np.arange(200) % 2 * 0.1
    share, low, high = share_kept(most * 0.6, base, most)
    assert share == pytest.approx(0.6) and low == pytest.approx(0.6) and high == pytest.approx(0.6)
    assert np.isnan(share_kept(most, most, most)[0])


def test_the_area_between_two_curves():
    """A policy with all of the gain at half of the requests: 3/4 against the 1/2 of a straight line."""
    none, half, full = np.zeros(50), np.full(50, 0.5), np.ones(50)
    area, low, high = area_over([(none, none), (half, full), (full, full)], [(none, none), (half, half), (full, full)])
    assert area == pytest.approx(0.25) and low == pytest.approx(0.25) and high == pytest.approx(0.25)


def test_requests_and_costs_stand_in_recboles_results(source):
    run = fitted(source, lsc_policy="random", lsc_rate=0.5)
    result = run.trainer.evaluate(run.data[2])
    wanted = {
        "request_rate",
        "candidate_recall",
        "staleness",
        "up_bytes",
        "down_bytes",
        "latency_ms",
        "latency_p95_ms",
        "short_lists",
    }
    assert wanted < set(result) and 0.2 < result["request_rate"] < 0.8
    assert result["up_bytes"] == pytest.approx(result["request_rate"] * (200 + 2 * 4), rel=1e-6)
    assert result["down_bytes"] == pytest.approx(result["request_rate"] * (200 + 12 * 6), rel=1e-6)
