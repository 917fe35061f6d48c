"""The runner on the ring with a tiny LLM: order of events, cache, folder, estimate; and what it says to bad input."""

import json
import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from recbole.utils import get_model

from recbole_llm import Config, Recommender, load_recommender
from recbole_llm.attached import teacher_vectors
from recbole_llm.command import main
from recbole_llm.item_text import givers
from recbole_llm.knowledge import Knowledge
from recbole_llm.quick_start import load_data, run_identity, run_recbole_llm
from recbole_llm.report import compared
from recbole_llm.teacher import identity
from tests.pipelines import ring_settings
from tests.ring import TITLES, TOKENS, shuffled


def run(model, data_path, tiny_lm=None, **more):
    """Run a model on the ring under our runner."""
    return run_recbole_llm(model, "ring", config_dict=ring_settings(data_path, model, tiny_lm, **more))


def test_dllm2rec_has_three_lines_and_the_second_time_they_come_from_the_cache(ring, tiny_lm):
    first = run("DLLM2Rec", ring, tiny_lm, state="info")
    assert [line.name for line in first["lines"]] == ["BIGRec (teacher)", "SASRec alone", "SASRec distilled"]
    assert [len(line.ranks) for line in first["lines"]] == [8, 60, 60]
    assert not any(line.cached for line in first["lines"])
    folder = Path(first["folder"])
    assert {"config.json", "results.json", "table.txt", "run.log", "model.safetensors", "model.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert "This run is going to:" in (folder / "run.log").read_text(encoding="utf-8")
    again = run("DLLM2Rec", ring, tiny_lm, state="info")
    assert all(line.cached for line in again["lines"]) and again["test_result"] == first["test_result"]
    alone = next(folder for folder in Path("saved/runs").iterdir() if folder.name.startswith("SASRec-"))
    assert "SASRec distilled against SASRec alone, NDCG@10 on 60 test rows" in compared(
        [Path(first["folder"])], [alone]
    )
    other = run("DLLM2Rec", ring, tiny_lm, distill_weight=0.7)
    assert [line.cached for line in other["lines"]] == [True, True, False]
    assert "cache" in other["table"] and "this run" in other["table"]


def test_resume_false_trains_the_students_anew_and_gives_the_same(ring):
    first = run("DLLM2Rec", ring, distill_mode="off")
    anew = run("DLLM2Rec", ring, distill_mode="off", resume=False)
    assert not anew["lines"][0].cached and anew["test_result"] == first["test_result"]


def test_a_student_that_was_trained_alone_is_taken_as_the_one_to_compare_with(ring, tiny_lm):
    small = ring_settings(ring, "DLLM2Rec", tiny_lm)
    first = run_recbole_llm("DLLM2Rec", "ring", config_dict=small | {"distill_mode": "off"})
    lines = run_recbole_llm("DLLM2Rec", "ring", config_dict=small | {"teacher_embedding": str(tiny_lm)})["lines"]
    assert [line.cached for line in lines] == [True, False] and lines[0].ranks == first["lines"][0].ranks
    other = run_recbole_llm("DLLM2Rec", "ring", config_dict=small | {"distill_mode": "off", "distill_base": "bce"})
    assert other["folder"] != first["folder"] and not other["lines"][0].cached


def test_other_data_under_the_same_name_are_another_run(ring):
    run("SASRec", ring)
    rewrite(ring / "ring/ring.inter", lambda rows: [row for row in rows if not row.startswith("u5")])
    (line,) = run("SASRec", ring)["lines"]
    assert not line.cached and len(line.ranks) == 50


def test_a_killed_run_goes_on_where_it_was(ring, monkeypatch):
    from recbole_llm.trainer import SequenceTrainer

    whole = run("SASRec", ring, checkpoint_dir="whole")
    write, epochs = SequenceTrainer._write_resume, []

    def killed(self, epoch):
        write(self, epoch)
        raise KeyboardInterrupt

    monkeypatch.setattr(SequenceTrainer, "_write_resume", killed)
    with pytest.raises(KeyboardInterrupt):
        run("SASRec", ring, checkpoint_dir="parts")
    monkeypatch.setattr(
        SequenceTrainer, "_write_resume", lambda self, epoch: epochs.append(epoch) or write(self, epoch)
    )
    resumed = run("SASRec", ring, checkpoint_dir="parts")
    assert epochs == [1, 2] and resumed["test_result"] == whole["test_result"]


@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec", "STAMP"])
def test_stock_models_run_under_the_same_runner(model, ring):
    result = run(model, ring, epochs=25)
    assert result["lines"][0].name == model and set(result["test_result"]) >= {"recall@1", "ndcg@10", "mrr@10"}
    assert result["test_result"]["recall@1"] == 1.0


def test_bigrec_alone_reports_what_it_wrote(ring, tiny_lm):
    result = run("BIGRec", ring, tiny_lm)
    said = result["lines"][0].notes["legality"]
    assert said["rows"] == 8 and 0 <= said["catalogue_titles"] <= 1 and said["without_repeats"]["rows"] == 8
    assert "catalogue titles" in result["table"]


def test_estimate_says_what_and_stops(ring, tiny_lm):
    plan = run_recbole_llm("DLLM2Rec", "ring", config_dict=ring_settings(ring, "DLLM2Rec", tiny_lm), estimate=True)[
        "plan"
    ]
    said = " ".join(step.what for step in plan)
    assert "labels 24 of 540 training rows" in said and "SASRec alone" in said
    assert not list(Path("saved").rglob("*.safetensors"))


def test_a_text_encoder_alone_asks_no_teacher(ring, tiny_lm):
    result = run("DLLM2Rec", ring, tiny_lm, distill_ranking="none", teacher_embedding=str(tiny_lm))
    assert [line.name for line in result["lines"]] == ["SASRec alone", "SASRec distilled"]
    assert not Path("saved/knowledge").exists() and list(Path("saved/item_vectors").iterdir())


def test_a_saved_student_recommends(ring):
    folder = Path(run("DLLM2Rec", ring, distill_mode="off", epochs=25)["folder"])
    student = load_recommender(folder / "model.safetensors")
    assert isinstance(student, Recommender)
    assert student.recommend(["i03", "i04", "i05"], k=1)[0].token == "i06"


def test_shuffled_texts_are_another_teacher_and_knowledge_and_the_table_says_so(ring, tiny_lm):
    plain = run("DLLM2Rec", ring, tiny_lm)
    assert "shuffled" not in plain["table"]
    moved = run("DLLM2Rec", ring, tiny_lm, shuffle_text=3)
    assert "Item texts are shuffled (shuffle_text=3)" in moved["table"]
    # the student alone reads no text
    assert [line.cached for line in moved["lines"]] == [False, True, False] and moved["folder"] != plain["folder"]
    assert len(list(Path("saved/teachers").iterdir())) == 2
    ours, theirs = (Knowledge.load(result["lines"][0].notes["knowledge"]["folder"]) for result in (plain, moved))
    assert ours.manifest["titles"] != theirs.manifest["titles"]
    rows, others = (each.item_embedding[1:].sort(dim=0).values for each in (ours, theirs))
    assert torch.equal(rows, others), "the catalogue's texts are the same ones"
    assert not (ours.item_embedding[1:] == theirs.item_embedding[1:]).all(dim=1).any(), "but none stands where it did"
    with pytest.raises(ValueError, match="what differs: titles"):
        run("DLLM2Rec", ring, tiny_lm, shuffle_text=3, teacher_knowledge=str(ours.folder))
    said = compared([Path(moved["folder"])], [Path(plain["folder"])])
    assert said.count("Item texts are shuffled (shuffle_text=3)") == 1


def test_runs_from_before_there_was_shuffle_text_stay_found(ring):
    config = Config("SASRec", "ring", None, ring_settings(ring, "SASRec"), read_argv=False)
    assert "shuffle_text" in config.final_config_dict and "shuffle_text" not in run_identity(config)
    assert "shuffle_text" not in identity(config, labelling=True)
    moved = Config("SASRec", "ring", None, ring_settings(ring, "SASRec", shuffle_text=0), read_argv=False)
    assert run_identity(moved)["shuffle_text"] == 0 == identity(moved, labelling=True)["shuffle_text"]


def test_what_a_saved_student_recommends_has_its_own_title(ring):
    folder = Path(run("DLLM2Rec", ring, distill_mode="off", epochs=25, shuffle_text=3)["folder"])
    best = load_recommender(folder / "model.safetensors").recommend(["i03", "i04", "i05"], k=1)[0]
    assert (best.token, best.title) == ("i06", TITLES[6])


@pytest.mark.parametrize("moved", [False, True])
def test_vectors_of_shuffled_texts_move_whatever_the_order_of_the_file(ring, tmp_path, tiny_lm, moved):
    path = shuffled(ring, tmp_path / "other", seed=3) if moved else ring
    tables = {}
    for model in ("LiteLLM4Rec", "DLLM2Rec"):
        for seed in (None, 3):
            settings = ring_settings(path, model, tiny_lm, shuffle_text=seed)
            settings |= {"teacher_embedding": str(tiny_lm)} if model == "DLLM2Rec" else {}
            config = Config(model, "ring", None, settings, read_argv=False)
            data = load_data(config)
            if model == "LiteLLM4Rec":
                built = get_model(model)(config, data.train._dataset)
                built.read_items()
                table = built.item_embedding.vectors
            else:
                table = teacher_vectors(config, data.train, data.valid)
            ids = data.train._dataset.field2token_id["item_id"]
            tables[model, seed] = table[[ids[token] for token in TOKENS]]
        own, other = tables[model, None], tables[model, 3]
        giver = givers(["[PAD]", *TOKENS], 3)  # the ring's tokens are in order already
        assert torch.equal(other, own[[place - 1 for place in giver[1:]]]) and not torch.equal(other, own)


# Bad input ------------------------------------------------------------------------------------------------------------


def rewrite(file: Path, change) -> None:
    """Change the lines of a file."""
    file.write_text("\n".join(change(file.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")


def test_a_title_that_begins_with_a_quote_is_named_with_its_line(ring):
    rewrite(ring / "ring/ring.item", lambda rows: [*rows[:3], rows[3].replace("\t", '\t"'), *rows[4:]])
    with pytest.raises(ValueError, match="ring.item, line 4, title=.*begins with a double quote"):
        run("DLLM2Rec", ring, distill_mode="off")


def test_a_missing_title_column_is_named(ring, tiny_lm):
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}
    with pytest.raises(
        ValueError, match="title_field=name: no such column in the item file of 'ring'; columns there: item_id, title"
    ):
        run("BIGRec", ring, tiny_lm, title_field="name", load_col=load)


def test_items_without_a_title_are_counted(ring, tiny_lm, caplog):
    rewrite(ring / "ring/ring.item", lambda rows: [*rows[:-1], rows[-1].split("\t")[0] + "\t"])
    with caplog.at_level(logging.WARNING):
        result = run("BIGRec", ring, tiny_lm)
    assert "1 of 24 items of 'ring' have no text" in caplog.text and result["test_result"]


def test_users_with_one_interaction_are_counted(ring, caplog):
    rewrite(ring / "ring/ring.inter", lambda rows: [*rows, "lonely\ti03\t9999"])
    with caplog.at_level(logging.WARNING):
        run("DLLM2Rec", ring, distill_mode="off")
    assert "1 users have one interaction only" in caplog.text


def test_the_share_of_tied_times_is_counted_and_said(ring):
    """The first two of every user's twelve items and more get one time: two of each user's."""
    first_times = {}

    def tie(rows):
        for number, row in enumerate(rows):
            user, item, time = row.split("\t")
            if time.startswith("timestamp"):
                continue
            times = first_times.setdefault(user, [])
            times.append(time)
            rows[number] = "\t".join([user, item, times[0] if len(times) == 2 else time])
        return rows

    rewrite(ring / "ring/ring.inter", tie)
    share = sum(2 for times in first_times.values()) / sum(map(len, first_times.values()))
    table = run("SASRec", ring)["table"]
    assert f"{share:.1%} of the interactions share their time" in table and 0.05 < share < 0.5


def test_rows_from_files_without_times_run_and_say_that_ties_are_unknown(tmp_path):
    rows = ["user_id:token\titem_id_list:token_seq\titem_id:token"]
    rows += [
        f"{user}\t{' '.join(TOKENS[(user + step) % 24] for step in range(length))}\t{TOKENS[(user + length) % 24]}"
        for user in range(24)
        for length in (1, 2, 3)
    ]
    folder = tmp_path / "data" / "parts"
    folder.mkdir(parents=True)
    for part in ("train", "valid", "test"):
        (folder / f"parts.{part}.inter").write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = ring_settings(tmp_path / "data", "SASRec", title_field=None) | {
        "benchmark_filename": ["train", "valid", "test"],
        "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"]},
    }
    assert math.isnan(load_data(Config("SASRec", "parts", None, settings, read_argv=False)).ties)
    result = run_recbole_llm("SASRec", "parts", config_dict=settings)
    assert "The data have no times, so how many interactions share one is unknown" in result["table"]
    for file in Path(result["folder"]).glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert "nan" not in result["table"].lower()


def test_what_cannot_be_masked_is_refused_before_the_teacher_works(ring, tiny_lm):
    evaluation = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "uni20"}
    with pytest.raises(ValueError, match="seen_items=mask: only a full ranking"):
        run("DLLM2Rec", ring, tiny_lm, seen_items="mask", eval_args=evaluation)
    assert not list(Path("saved").rglob("*.safetensors"))


def test_seen_items_can_be_left_out_and_the_table_says_so(ring):
    kept, masked = run("SASRec", ring), run("SASRec", ring, seen_items="mask")
    assert "items of the history kept" in kept["table"] and "whole history left out" in masked["table"]
    assert kept["folder"] != masked["folder"]


def test_an_llm_that_is_nowhere_is_said_so(ring, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="llm=nobody/nothing"):
        run("BIGRec", ring, "nobody/nothing")


def test_knowledge_of_other_data_is_refused(ring, tiny_lm, tmp_path):
    run("DLLM2Rec", ring, tiny_lm)
    folder = next(Path("saved/knowledge").iterdir())
    rewrite(
        ring / "ring/ring.inter", lambda rows: [*rows, "extra\ti03\t9999", "extra\ti09\t10000", "extra\ti01\t10001"]
    )
    with pytest.raises(ValueError, match=r"teacher_knowledge=.*it is of other data.*users"):
        run("DLLM2Rec", ring, tiny_lm, teacher_knowledge=str(folder))


def test_damaged_knowledge_is_built_again(ring, tiny_lm):
    run("DLLM2Rec", ring, tiny_lm)
    folder = next(Path("saved/knowledge").iterdir())
    before = Knowledge.load(folder)
    shard = folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:50])
    run("DLLM2Rec", ring, tiny_lm, distill_weight=0.3)
    after = Knowledge.load(folder)
    assert torch.equal(before.items, after.items) and torch.equal(before.score, after.score)


@pytest.mark.parametrize("key", ["topk", "distill_topk"])
def test_a_cut_off_beyond_the_catalogue_is_refused_when_it_was_set(key, ring):
    with pytest.raises(ValueError, match=rf"{key}=.*: more than the catalogue holds; there are 24 items"):
        run("DLLM2Rec", ring, distill_mode="off", **{key: [1, 10, 30] if key == "topk" else 30})


def test_a_missing_file_of_the_teachers_settings_is_named_at_once(ring):
    with pytest.raises(ValueError, match=r"teacher_config=gone.yaml: no such file"):
        run("DLLM2Rec", ring, teacher_config="gone.yaml")


def test_the_command_tells_faults_without_a_traceback(ring, capsys):
    code = main(
        ["--model=DLLM2Rec", "--dataset=ring", f"--data_path={ring}", "--lerning_rate=1", "--distil_weight=0.5"]
    )
    said = capsys.readouterr().err
    assert code == 2 and "Traceback" not in said
    assert said.strip().splitlines() == [
        "2 settings that DLLM2Rec on ring does not have:",
        "  distil_weight=0.5 (did you mean 'distill_weight'?)",
        "  lerning_rate=1 (did you mean 'learning_rate'?)",
    ]


def test_the_command_explains_settings_and_refuses_stray_words(capsys):
    assert main(["--help", "--model=BIGRec"]) == 0
    assert "lora_rank: 8" in capsys.readouterr().out
    assert main(["--model=SASRec", "epochs", "3"]) == 2
    assert "not of the form --key=value" in capsys.readouterr().err


def test_a_setting_is_not_taken_for_the_beginning_of_a_flag(monkeypatch):
    """--seed is RecBole's; --seeds belongs to a benchmark."""
    seen = []
    monkeypatch.setattr("recbole_llm.quick_start.run_recbole_llm", lambda **_: seen.append(list(sys.argv)))
    assert main(["--model=SASRec", "--seed=2021", "--bench=1"]) == 0
    assert seen[0][1:] == ["--seed=2021", "--bench=1"]


def test_a_config_file_may_name_model_and_data_and_the_command_line_wins(ring, tmp_path):
    own = ("inner_size", "n_heads", "n_layers", "hidden_size")  # of SASRec; STAMP has none of them
    settings = ring_settings(ring, "SASRec", None, epochs=1, allow_keys=list(own))
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(settings | {"model": "SASRec", "dataset": "ring"}), encoding="utf-8")
    assert main([f"--config_files={file}", "--show_progress=False"]) == 0
    assert main([f"--config_files={file}", "--model=STAMP", "--show_progress=False"]) == 0
    assert sorted(folder.name.split("-")[0] for folder in Path("saved/runs").iterdir()) == ["SASRec", "STAMP"]


def test_the_results_are_written_as_json(ring):
    result = run("SASRec", ring)
    lines = json.loads((Path(result["folder"]) / "results.json").read_text())["lines"]
    assert lines[0]["metrics"] == result["test_result"] and len(lines[0]["ranks"]) == 60
