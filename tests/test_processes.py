"""Labelling by several processes, and by processes that are killed: the files are those of one that was left in peace."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from recbole.utils import get_model

from recbole_llm import processes
from recbole_llm.artifacts import read_json, read_tensors
from recbole_llm.command import main
from recbole_llm.config import Config
from recbole_llm.knowledge import Knowledge, Request, ensure
from recbole_llm.labelling import rows_of_a_shard
from recbole_llm.lm import LanguageModel
from recbole_llm.processes import Part, PartDone, only_the_first, place, settle
from recbole_llm.quick_start import run_folder, run_recbole_llm
from recbole_llm.sequences import Log
from tests.conftest import ROOT
from tests.oracle import Oracle, ask, prepared, student
from tests.pipelines import ring_settings

# `ask` labels 540 rows in shards of 64: eight whole ones, and one of 28
SHARDS = 9
SPAWN = multiprocessing.get_context("spawn")


def content(folder) -> dict:
    """All files of a folder by name, hidden ones too; of the manifest everything but the seconds."""
    files = {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}
    if "manifest.json" in files:
        files["manifest.json"] = {**json.loads(files["manifest.json"]), "seconds": None}
    return files


def launched(monkeypatch, rank=1, size=2):
    """Make this process look like one of a launcher."""
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}.items():
        monkeypatch.setenv(name, str(value))


def begun(work, *args) -> multiprocessing.Process:
    """Another process that does `work`."""
    process = SPAWN.Process(target=work, args=args)
    process.start()
    return process


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_parts_by_hand_make_the_files_of_one_process_in_any_order(ring, order):
    parts = prepared(ring)
    whole = ask(parts, "whole")
    teachers = [Oracle(parts.config, parts.train._dataset) for _ in order]
    for number, teacher in list(zip(order, teachers, strict=True))[:-1]:
        with pytest.raises(PartDone, match=rf"^Part {number + 1}/3 of the labels is done, and no student is trained"):
            ask(parts, "parts", teacher, part=Part(number, 3))
        assert not Path("parts/manifest.json").exists()
    ask(parts, "parts", teachers[-1], part=Part(order[-1], 3))
    assert content("parts") == content(whole.folder)
    assert [sum(teacher.labelled) for teacher in teachers] == [
        sum(64 if shard < SHARDS - 1 else 28 for shard in range(number, SHARDS, 3)) for number in order
    ]


def writer(ring, tiny_lm):
    """An LLM that was never tuned, in a process of its own as far as it knows: it writes the same few texts again and again."""
    config = Config("BIGRec", "ring", config_dict=ring_settings(ring, "BIGRec", tiny_lm, generate_max_new_tokens=16))
    return get_model("BIGRec")(config, prepared(ring).train._dataset)


def test_parts_and_a_stopped_labelling_by_an_llm_make_the_files_of_one_process(ring, tiny_lm, monkeypatch):
    """The last bits of a vector depend on the texts it is embedded with, so those may not depend on what was labelled before."""
    embed = LanguageModel.embed
    monkeypatch.setattr(
        LanguageModel, "embed", lambda self, texts, **more: embed(self, texts, **more) + 1e-3 * len(texts)
    )
    parts = prepared(ring)
    ask(parts, "whole", writer(ring, tiny_lm), shard_rows=20)
    written = writer(ring, tiny_lm)
    log = Log.from_dataset(parts.train._dataset)
    titles = written.write_titles(log.history(log.rows(), 10)[0])
    assert 1 < len(set(titles)) < len(titles) / 2, "texts come again in other shards"
    for number in (2, 0, 1):
        with pytest.raises(PartDone) if number != 1 else nullcontext():
            ask(parts, "parts", writer(ring, tiny_lm), part=Part(number, 3), shard_rows=20)
    stopped = writer(ring, tiny_lm)
    label, left = stopped.candidates, iter(range(7))

    def candidates(batch, k):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return label(batch, k)

    stopped.candidates = candidates
    with pytest.raises(KeyboardInterrupt):
        ask(parts, "stopped", stopped, shard_rows=20)
    ask(parts, "stopped", writer(ring, tiny_lm), shard_rows=20)
    for folder in ("parts", "stopped"):
        assert {name: file for name, file in content(folder).items() if name.startswith("shard")} == {
            name: file for name, file in content("whole").items() if name.startswith("shard")
        }


def test_a_shard_of_another_teacher_is_labelled_again(ring):
    parts = prepared(ring)
    with pytest.raises(PartDone):
        ask(parts, "kn", part=Part(0, 2), provenance={"teacher": "Oracle", "checkpoint_digest": "one"})
    with pytest.raises(PartDone, match="of 9 shards in kn 5 are missing"):
        ask(parts, "kn", part=Part(1, 2), provenance={"teacher": "Oracle", "checkpoint_digest": "another"})
    last = Oracle(parts.config, parts.train._dataset)
    ask(parts, "kn", last, provenance={"teacher": "Oracle", "checkpoint_digest": "another"})
    assert sum(last.labelled) == 540 - 4 * 64


def test_who_ends_a_part_is_told_what_is_missing_and_what_to_run(ring):
    parts = prepared(ring)
    with pytest.raises(PartDone):
        ask(parts, "kn", part=Part(0, 4))
    with pytest.raises(PartDone) as told:
        ask(parts, "kn", part=Part(2, 4))
    assert str(told.value) == (
        "Part 3/4 of the labels is done, and no student is trained yet: of 9 shards in kn 4 are missing (2 of part 2/4, 2 of part 4/4). "
        "Run the same command with teacher_shard=2/4 and teacher_shard=4/4, or without teacher_shard, which labels all that is missing. "
        "Whoever then finds every shard in that folder goes on with the student."
    )
    last = Oracle(parts.config, parts.train._dataset)
    ask(parts, "kn", last)
    assert sum(last.labelled) == 4 * 64, "without a part, what is missing is labelled, and nothing else"


def test_a_part_with_a_damaged_shard_of_another_one_counts_it_as_missing(ring):
    parts = prepared(ring)
    with pytest.raises(PartDone):
        ask(parts, "kn", part=Part(0, 2))
    shard = Path("kn/shard-00002.safetensors")
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(PartDone, match=r"of 9 shards in kn 1 are missing \(1 of part 1/2\)"):
        ask(parts, "kn", part=Part(1, 2))


def test_a_part_names_neither_the_knowledge_nor_the_run(ring):
    folders = set()
    for part in (None, "1/2", "2/2", "3/7"):
        parts = prepared(ring, teacher_shard=part)
        assert parts.config["teacher_shard"] == part
        folders.add((Request.of(parts.config, parts.train._dataset).folder, run_folder(parts.config)))
    assert len(folders) == 1


@pytest.mark.parametrize("value", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2", "1/0", 2, 0.5], ids=str)
def test_what_is_no_part_is_refused(ring, value):
    parts = prepared(ring, teacher_shard=value)
    with pytest.raises(ValueError) as told:
        Request.of(parts.config, parts.train._dataset)
    assert str(told.value) == (
        f"teacher_shard={value}: no part of the shards; there is 1/n to n/n, n being the number of parts. Set teacher_shard in a config "
        "file or on the command line."
    )


def test_what_is_no_part_is_refused_where_nothing_is_labelled(ring):
    with pytest.raises(ValueError, match="^teacher_shard=9/2: no part of the shards"):
        student(prepared(ring, teacher_shard="9/2"))


def test_the_command_labels_a_part_and_trains_no_student_until_all_is_there(ring, tiny_lm, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(ring_settings(ring, "DLLM2Rec", tiny_lm, epochs=1)), encoding="utf-8")
    command = ["--model=DLLM2Rec", "--dataset=ring", f"--config_files={file}"]
    assert main([*command, "--teacher_shard=2/2"]) == 0
    (folder,) = Path("saved/knowledge").iterdir()
    shards = [f"shard-{number:05d}.safetensors" for number in range(1, 24, 2)]
    assert sorted(content(folder)) == shards, "24 rows: a shard holds one"
    assert not list(Path("saved/runs").glob("*/*.safetensors"))
    assert "Part 2/2 of the labels is done" in next(Path("saved/runs").glob("*/run.log")).read_text(encoding="utf-8")
    trained = content(next(Path("saved/teachers").iterdir()))
    assert main([*command, "--teacher_shard=1/2"]) == 0
    assert len(Knowledge.load(folder).row) == 24 and len(list(Path("saved/runs").glob("*/metrics.json"))) == 2
    assert trained and content(next(Path("saved/teachers").iterdir())) == trained, (
        "the second part takes the teacher of the first"
    )


def test_a_run_that_is_a_part_says_so_to_its_caller(ring, tiny_lm):
    result = run_recbole_llm(
        "DLLM2Rec", "ring", config_dict=ring_settings(ring, "DLLM2Rec", tiny_lm, teacher_shard="1/8")
    )
    assert set(result) == {"part", "folder"} and result["part"].startswith("Part 1/8 of the labels is done")


def takes_its_turn(folder, arrived):
    """What a second process does where the first one trains the teacher."""
    arrived.set()
    with Part(1, 2).in_turn(folder):
        (folder / "second").touch()


def test_a_part_waits_while_another_one_trains_the_teacher(tmp_path):
    arrived, folder = SPAWN.Event(), tmp_path / "teacher"
    with Part(0, 2).in_turn(folder):
        process = begun(takes_its_turn, folder, arrived)
        arrived.wait()
        process.join(timeout=1)
        assert process.is_alive() and not (folder / "second").exists()
    process.join()
    assert (folder / "second").exists()


def test_a_shard_is_one_percent_of_the_rows_at_most():
    assert [rows_of_a_shard(64, rows) for rows in (1, 24, 540, 4096, 6400, 10**6)] == [1, 1, 5, 40, 64, 64]
    assert rows_of_a_shard(0, 4096) == 1


DEATHS = {
    "with the 1st shard on disk": ("shard-00000", "after", 1),
    "with the 3rd shard on disk": ("shard-00002", "after", 3),
    "while the 4th shard is written": ("shard-00003", "before", 3),
    "while the item vectors are written": ("item_embedding", "before", SHARDS),
    "while the manifest is written": ("manifest", "before", SHARDS),
}


def dies(ring, at, when):
    """Label, and be killed when a file of that name gets, or has got, its place."""
    replace = os.replace

    def deadly(source, target):
        if when == "after":
            replace(source, target)
        if Path(target).name.startswith(at):
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "before":
            replace(source, target)

    os.replace = deadly
    ask(prepared(ring), "killed")


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_labelling_ends_the_same_and_labels_no_row_that_was_safe(ring, death):
    at, when, safe = DEATHS[death]
    parts = prepared(ring)
    ask(parts, "whole")
    process = begun(dies, ring, at, when)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = content("killed")
    assert sorted(name for name in left if name.startswith("shard")) == [
        f"shard-{number:05d}.safetensors" for number in range(safe)
    ]
    assert any(name.startswith(f".{at}") for name in left) == (when == "before"), "what was begun lies beside"
    with pytest.raises(FileNotFoundError):
        Knowledge.load("killed")
    second = Oracle(parts.config, parts.train._dataset)
    ask(parts, "killed", second)
    assert sum(second.labelled) == max(0, 540 - 64 * safe)
    assert content("killed") == content("whole")


def dies_again(ring, tiny_lm, at):
    """Let an LLM label in shards of 1 %, note every row it is asked about, and be killed while a shard is written."""
    llm = writer(ring, tiny_lm)
    label = llm.candidates

    def noted(batch, k):
        with open("asked", "a", encoding="utf-8") as file:
            file.write("row\n" * len(batch))
        return label(batch, k)

    llm.candidates = noted
    replace = os.replace

    def deadly(source, target):
        if Path(target).name == f"shard-{at:05d}.safetensors":
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = deadly
    ask(prepared(ring), "killed", llm, shard_rows=rows_of_a_shard(64, 540))


@pytest.mark.slow
def test_a_labelling_killed_five_times_repeats_five_percent_at_most(ring, tiny_lm):
    whole = ask(prepared(ring), "whole", writer(ring, tiny_lm), shard_rows=rows_of_a_shard(64, 540))
    for at in (7, 30, 31, 77, 107, None):
        process = begun(dies_again, ring, tiny_lm, -1 if at is None else at)
        process.join()
        assert process.exitcode == (0 if at is None else -signal.SIGKILL)
    asked = len(Path("asked").read_text(encoding="utf-8").splitlines())
    assert 540 < asked <= 1.05 * 540
    assert content("killed") == content(whole.folder)


# What a process of a launcher runs: the command, with a note of all rows that are labelled and of every training.
NOTED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from recbole_llm import teacher
from recbole_llm.command import main
from recbole_llm.labelling import Labeller
from recbole_llm.trainer import trainer_class

def note(what, words):
    with open(f"{{os.environ['NOTES']}}/{{what}}-{{os.environ.get('RANK', 0)}}", "a") as file:
        file.write("".join(f"{{word}}\\n" for word in words))

label, calls = Labeller.label, []

def noted(self, chosen, rows):
    calls.append(rows)
    if os.environ.get("DIES") and os.environ["RANK"] == "1" and len(calls) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    note("rows", rows.tolist())
    return label(self, chosen, rows)

def trained(config):
    class Noted(trainer_class(config)):
        def fit(self, *args, **kwargs):
            note("trained", [config["model"]])
            return super().fit(*args, **kwargs)
    return Noted

Labeller.label, teacher.trainer_class = noted, trained
sys.exit(main())
"""


def notes(folder, what) -> dict:
    """What each process has noted, by its rank."""
    return {file.name[-1]: file.read_text().split() for file in sorted(Path(folder).glob(f"{what}-*"))}


def test_two_processes_of_a_launcher_make_the_knowledge_of_one_even_if_one_was_killed(ring, tiny_lm, tmp_path):
    settings = ring_settings(ring, "DLLM2Rec", tiny_lm, epochs=1, state="info")
    whole = run_recbole_llm("DLLM2Rec", "ring", config_dict=settings | {"checkpoint_dir": "one", "state": "warning"})
    (tmp_path / "mine.yaml").write_text(json.dumps(settings), encoding="utf-8")
    (tmp_path / "noted.py").write_text(NOTED, encoding="utf-8")
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launcher += ["noted.py", "--model=DLLM2Rec", "--dataset=ring", "--config_files=mine.yaml", "--checkpoint_dir=two"]

    def run(name, **more):
        Path(name).mkdir()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "NOTES": name} | more
        return subprocess.run(launcher, env=environment, capture_output=True, text=True, check=False)

    killed = run("first", DIES="1")
    assert killed.returncode != 0 and "Results, also in" not in killed.stdout + killed.stderr
    (folder,) = Path("two/knowledge").iterdir()
    assert not (folder / "manifest.json").exists()
    safe = [row for file in folder.glob("shard-*") for row in read_tensors(file)["row"].tolist()]
    assert len(notes("first", "rows")["1"]) == 2 and 2 <= len(safe) <= 14
    assert notes("first", "trained") == {"0": ["BIGRec"]}, "the first process trains the teacher, the other takes it"

    again = run("second")
    assert again.returncode == 0, again.stderr
    assert (again.stdout + again.stderr).count("Results, also in") == 1, "one process trains the students and tells"
    assert notes("second", "trained") == {}
    rows = [int(row) for rows in notes("second", "rows").values() for row in rows]
    one = Knowledge.load(next(Path("one/knowledge").iterdir()))
    assert sorted(rows + safe) == one.row.tolist(), "no row that was safe is labelled again, and none twice"
    two = Knowledge.load(folder)
    assert one.folder.name == two.folder.name and one.manifest["parts"] == two.manifest["parts"]
    (results,) = Path("two/runs").glob("DLLM2Rec-*/metrics.json")
    (other,) = Path("one/runs").glob("DLLM2Rec-*/metrics.json")
    assert read_json(results)["metrics"] == read_json(other)["metrics"] == whole["lines"][-1].metrics


def test_only_processes_that_a_launcher_started_have_a_place(monkeypatch):
    assert place() == (0, 1)
    only_the_first()
    monkeypatch.setenv("RANK", "3")  # other programs set it, too
    assert place() == (0, 1)
    launched(monkeypatch, 1, 3)
    assert place() == (1, 3)
    with pytest.raises(PartDone, match="^Process 2 of 3 is done; the first one goes on alone.$"):
        only_the_first()


def test_a_launchers_process_takes_no_part_by_hand(ring, monkeypatch):
    parts = prepared(ring)
    launched(monkeypatch)
    assert Part.from_config(parts.config) == Part(1, 2, launched=True)
    with pytest.raises(ValueError, match="^teacher_shard=1/2: this is one of 2 processes of a launcher, which share"):
        Part.from_config({"teacher_shard": "1/2"})


def test_a_process_that_does_not_find_the_first_ones_teacher_says_so_and_trains_none(ring, monkeypatch):
    parts = prepared(ring)
    launched(monkeypatch)
    for name in ("init_process_group", "destroy_process_group", "barrier"):
        monkeypatch.setattr(processes.distributed, name, lambda *args, **settings: None)
    with pytest.raises(
        ValueError, match="^checkpoint_dir=saved: the teacher that the first process has trained is not"
    ):
        ensure(parts.config, parts.train, parts.valid)
    assert not Path("saved").exists()


def test_a_run_without_labels_is_the_first_processs_alone(ring, monkeypatch):
    launched(monkeypatch)
    for settings in ({"distill_mode": "off"}, {"distill_embedding": "none", "distill_ranking": "none"}):
        result = run_recbole_llm("DLLM2Rec", "ring", config_dict=ring_settings(ring, "DLLM2Rec", **settings))
        assert result["part"].startswith("Process 2 of 2 is done")
    assert not list(Path("saved").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("given", "seen", "mine"),
    [
        ({}, None, "1"),
        ({}, "4,5", "5"),
        ({}, "5", "5"),
        ({"gpu_id": (2, 3)}, "4,5", "3"),
        ({"gpu_id": "2,3"}, None, "3"),
        ({"gpu_id": 2}, None, "2"),
        ({"gpu_id": ""}, None, ""),
    ],
    ids=str,
)
def test_a_launchers_process_has_a_gpu_of_its_own_and_its_further_configs_the_same(monkeypatch, given, seen, mine):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    settings = {"gpu_id": "0", "state": "info", "show_progress": True}
    settle(settings, given)
    assert settings == {"gpu_id": "0", "state": "info", "show_progress": True}, "alone, nothing is changed"
    launched(monkeypatch)
    settle(settings, given)
    assert settings == {"gpu_id": mine, "state": "error", "show_progress": False}
    settle(settings, {"gpu_id": mine})
    assert settings["gpu_id"] == mine


def test_every_config_of_a_launchers_process_is_settled(ring, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # RecBole sets it in every process that has had a Config
    launched(monkeypatch)
    config = Config("DLLM2Rec", "ring", None, ring_settings(ring, "DLLM2Rec"), read_argv=False)
    assert config["gpu_id"] == os.environ["CUDA_VISIBLE_DEVICES"] == "1" and config["state"] == "error"
    assert config["single_spec"] and config["local_rank"] == 0, "for RecBole it is a process on its own"


def test_of_two_parts_that_find_everything_one_ends_the_labels(tmp_path):
    """Whoever comes second finds the manifest once it may look, and trains no student beside the first."""
    held_by_the_first = []
    with Part(0, 2).ending(tmp_path):
        other = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import fcntl; f = open({str(tmp_path.with_name(f'.{tmp_path.name}.lock'))!r}, 'w'); fcntl.flock(f, 6)",
            ],
            stderr=subprocess.PIPE,
        )
        held_by_the_first.append(b"BlockingIOError" in other.communicate()[1])
        (tmp_path / "manifest.json").write_text("{}")
    assert held_by_the_first == [True]
    with (
        pytest.raises(PartDone, match="Part 2/2 of the labels is done, and so are all others"),
        Part(1, 2).ending(tmp_path),
    ):
        raise AssertionError("the labels are ended already")
    with Part().ending(tmp_path):
        pass  # one process alone asks nobody
