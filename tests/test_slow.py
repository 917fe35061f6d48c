"""The commands of the README with a real pretrained LLM, and the wheel in a clean environment."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.pipelines import ring_settings

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--teacher_rows=32",
    "--teacher_train_rows=32",
    "--teacher_valid_rows=16",
    "--teacher_eval_rows=16",
    "--epochs=2",
]


def command(*settings: str) -> str:
    """Run the command as a user does, in the current folder; returns what it printed."""
    run = subprocess.run([sys.executable, str(ROOT / "run_recbole_llm.py"), *settings], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout + run.stderr


def results() -> list[dict]:
    """The lines of the only run whose table has the last command's model."""
    newest = max(Path("saved/runs").glob("*/results.json"), key=os.path.getmtime)
    return json.loads(newest.read_text(encoding="utf-8"))["lines"]


def test_dllm2rec_teaches_and_is_cached():
    said = command("--model=DLLM2Rec", "--dataset=ml-100k", "--teacher=BIGRec", *SMALL)
    assert "This run is going to:" in said and "SmolLM2-135M-Instruct with LoRA on 32 rows" in said
    lines = results()
    assert [line["name"] for line in lines] == ["BIGRec (teacher)", "SASRec alone", "SASRec distilled"]
    assert [len(line["ranks"]) for line in lines] == [16, 943, 943] and not any(line["cached"] for line in lines)
    again = command("--model=DLLM2Rec", "--dataset=ml-100k", "--teacher=BIGRec", *SMALL, "--distill_weight=0.2")
    assert "Take the Knowledge from" in again
    assert [line["cached"] for line in results()] == [True, True, False]


def test_bigrec_alone_learns_to_answer_with_titles():
    """A tuned model closes its titles and names real ones; the untuned one chats."""
    command("--model=BIGRec", "--dataset=ml-100k", "--train_rows=96", "--valid_rows=16", "--teacher_eval_rows=24")
    (line,) = results()
    assert line["notes"]["legality"]["catalogue_titles"] > 0.2
    assert set(line["metrics"]) == {f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr") for k in (10, 20)}


def test_a_cloud_llm_and_a_device_model_work_together():
    epochs = ["--cloud_epochs=2", "--lsc_independent_epochs=8", "--lsc_cooperative_epochs=2", "--lsc_retrain_epochs=2"]
    said = command("--model=LSC4Rec", "--dataset=ml-100k", "--lsc_users=300", *epochs)
    assert "all-MiniLM-L6-v2" in said and "Fusion: alpha=" in said and "| history-drift" in said
    lines = {line["name"]: line["metrics"]["recall@20"] for line in results()}
    # a list of 50 of 1,682 has the target among its first 20 for more than 20 / 1682 of the users
    assert all(recall > 0.03 for recall in lines.values()), lines
    assert len(list(Path("saved/runs").glob("LSC4Rec-*/rate.png"))) == 1


def test_stock_model_under_our_runner():
    said = command(
        "--model=SASRec", "--dataset=ml-100k", "--epochs=2", "--hidden_dropout_prob=0.2", "--attn_dropout_prob=0.2"
    )
    assert "all positions of" in said
    (line,) = results()
    assert len(line["ranks"]) == 943 and line["metrics"]["ndcg@10"] > 0.01


def test_ml_1m_with_a_data_path(shared_data):
    said = command("--model=DLLM2Rec", "--dataset=ml-1m", f"--data_path={shared_data}", "--estimate")
    assert "labels 2000 of" in said and "In all about" in said


def test_wheel_brings_its_yaml_files(tmp_path, ring, tiny_lm):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".venv*", ".git", "build", "dist", "saved", "*.egg-info")
    )
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", str(source), "--outdir", str(tmp_path / "dist")],
        check=True,
        capture_output=True,
    )
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    limits = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", "-q", *limits, "torch"], check=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", *limits, *map(str, (tmp_path / "dist").glob("*.whl"))], check=True
    )
    file = tmp_path / "ring.json"
    file.write_text(json.dumps(ring_settings(ring, "DLLM2Rec", tiny_lm, state="info")), encoding="utf-8")
    away = tmp_path / "away"
    away.mkdir()
    run = subprocess.run(
        [tmp_path / "env" / "bin" / "recbole_llm", "--model=DLLM2Rec", "--dataset=ring", f"--config_files={file}"],
        cwd=away, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "SASRec distilled" in run.stdout + run.stderr
