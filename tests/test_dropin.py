"""RecBole's own pipelines with one more line, `import recbole_llm`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recbole.quick_start import load_data_and_model, run_recbole
from recbole.utils.case_study import full_sort_topk

from tests.conftest import ROOT
from tests.pipelines import COUNTED, ring_settings, step_by_step


@pytest.mark.parametrize("model", ["DLLM2Rec", "BIGRec", "P5", "LiteLLM4Rec", *COUNTED])
def test_run_recbole_finds_and_runs_our_models(model, ring, tiny_lm):
    result = run_recbole(model=model, dataset="ring", config_dict=ring_settings(ring, model, tiny_lm))
    assert set(result["test_result"]) == {"recall@1", "recall@10", "ndcg@1", "ndcg@10", "mrr@1", "mrr@10"}
    assert list(Path("saved").glob(f"{model}-ring-*.safetensors"))


def test_the_fast_script_of_the_readme_runs_as_it_stands(caplog):
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (script,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "SequenceTrainer" in block]
    short = script.replace("None}", 'None, "epochs": 1, "MAX_ITEM_LIST_LENGTH": 10}')
    assert short != script
    space = {}
    caplog.set_level("INFO")
    exec(short, space)
    assert space["trainer"].all_positions and space["test"]._dataset.flat_log is not None
    assert "does not depend on later items" in caplog.text


def test_run_recbole_takes_config_files(ring, tiny_lm, tmp_path):
    settings = ring_settings(ring, "DLLM2Rec", tiny_lm, epochs=1)
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    result = run_recbole(model="DLLM2Rec", dataset="ring", config_file_list=[str(file)])
    assert result["best_valid_score"] >= 0


def test_a_checkpoint_is_read_by_load_data_and_model_and_case_study(ring, tiny_lm):
    _, trainer, test_data, _, result = step_by_step("DLLM2Rec", ring_settings(ring, "DLLM2Rec", tiny_lm))
    config, model, dataset, _, _, loaded_test = load_data_and_model(trainer.saved_model_file)
    assert type(model).__name__ == "DLLM2Rec" and config["student"] == "SASRec"
    users = dataset.token2id(dataset.uid_field, ["u03", "u04"])
    score, items = full_sort_topk(users, model, loaded_test, k=5)
    expected, expected_items = full_sort_topk(users, trainer.model, test_data, k=5)
    assert torch.equal(items, expected_items) and torch.allclose(score, expected)
    again = type(trainer)(config, model).evaluate(loaded_test, load_best_model=False)
    assert again == result


def test_bigrec_checkpoint_brings_its_adapters_back(ring, tiny_lm):
    _, trainer, test_data, _, _ = step_by_step(
        "BIGRec", ring_settings(ring, "BIGRec", tiny_lm, learning_rate=0.02, epochs=2)
    )
    _, model, _, _, _, loaded_test = load_data_and_model(trainer.saved_model_file)
    batch = next(iter(loaded_test))[0]
    tuned = trainer.model.lm.adapter_state()
    assert model.write_titles(batch[model.ITEM_SEQ]) == trainer.model.write_titles(batch[model.ITEM_SEQ])
    assert all(torch.equal(tensor, tuned[name]) for name, tensor in model.lm.adapter_state().items())
    assert any(tensor.abs().sum() > 0 for name, tensor in tuned.items() if "lora_B" in name)


def test_saved_false_writes_nothing_of_the_student(ring):
    settings = ring_settings(ring, "DLLM2Rec", distill_mode="off")
    step_by_step("DLLM2Rec", settings, saved=False)
    assert not list(Path("saved").rglob("*.safetensors")) and not list(Path("saved").rglob("*.pth"))


def test_tensorboard_has_the_curves_of_our_trainer(ring):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    step_by_step("DLLM2Rec", ring_settings(ring, "DLLM2Rec", distill_mode="off"))
    events = EventAccumulator(str(next(Path("log_tensorboard").glob("*")))).Reload()
    assert {"Loss/Train", "Vaild_score"} <= set(events.Tags()["scalars"])


def test_hyper_tuning_runs_our_objective(ring, tmp_path):
    pytest.importorskip("hyperopt")
    from recbole.quick_start import objective_function
    from recbole.trainer import HyperTuning

    fixed = tmp_path / "fixed.yaml"
    fixed.write_text(
        json.dumps(
            {"model": "DLLM2Rec", "dataset": "ring", **ring_settings(ring, "DLLM2Rec", distill_mode="off", epochs=1)}
        ),
        encoding="utf-8",
    )
    space = tmp_path / "space.hyper"
    space.write_text("learning_rate choice [0.01,0.001]\n", encoding="utf-8")
    tuning = HyperTuning(
        objective_function,
        algo="exhaustive",
        early_stop=10,
        max_evals=2,
        params_file=str(space),
        fixed_config_file_list=[str(fixed)],
    )
    tuning.run()
    assert tuning.best_params["learning_rate"] in (0.01, 0.001) and len(tuning.params2result) == 2


def test_stock_models_give_the_same_numbers_with_and_without_our_settings(ring):
    """Our layers never reach a stock model under stock RecBole: same keys, same result as with the hooks taken out."""
    from recbole.config import Config
    from recbole.trainer import Trainer

    settings = ring_settings(ring, "SASRec", train_neg_sample_args=None)
    settings.pop("title_field")
    config, trainer, _, best, result = step_by_step("SASRec", settings)
    assert (
        type(trainer) is Trainer
        and config["positions"] is None
        and config["metrics"] == ["Recall", "MRR", "NDCG", "Hit", "Precision"]
    )
    assert "positions" not in Config(model="SASRec", dataset="ring", config_dict=dict(settings)).final_config_dict


def test_importing_loads_no_llm_library():
    code = "import sys, recbole_llm; print([m for m in ('transformers', 'peft', 'faiss', 'ray') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_run_whose_parts_are_all_there_loads_no_llm_library(ring, tiny_lm):
    """The rule that a teacher is a file: with Knowledge and lines on disk, the command that made them touches no LLM."""
    settings = ring_settings(ring, "DLLM2Rec", tiny_lm, epochs=1)
    code = (
        "import json, sys; from recbole_llm import run_recbole_llm; "
        "run_recbole_llm('DLLM2Rec', 'ring', config_dict=json.loads(sys.argv[1])); "
        "print('loaded', [name for name in ('transformers', 'peft', 'faiss', 'tokenizers') if name in sys.modules])"
    )
    outs = []
    for _ in range(2):
        command = [sys.executable, "-c", code, json.dumps(settings)]
        outs.append(
            subprocess.run(
                command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
            )
        )
    assert "'transformers'" in outs[0].stdout and outs[1].stdout.strip().endswith("loaded []")
