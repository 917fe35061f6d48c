"""Files are whole or not there, damage is named, and hashes do not depend on any order."""

import enum
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm import artifacts
from recbole_llm.artifacts import (
    DamagedArtifact,
    digest,
    file_digest,
    plain,
    read_json,
    read_metadata,
    read_tensors,
    tensors_digest,
    write_atomically,
    write_json,
    write_tensors,
    write_text,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def half(name):
        Path(name).write_text("ne")
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        write_atomically(tmp_path / "a.txt", half)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_process_killed_in_the_middle_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"version": 1})
    # the file alone: importing the package would load RecBole, too
    script = (
        "import importlib.util, os, sys; from pathlib import Path\n"
        f"spec = importlib.util.spec_from_file_location('artifacts', {artifacts.__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "def half(name):\n"
        "    Path(name).write_text('{\"versi')\n"
        f"    os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "module.write_atomically(sys.argv[1], half)\n"
    )
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "a.json")], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert read_json(tmp_path / "a.json") == {"version": 1}


def test_a_reader_never_sees_a_file_under_its_name_before_it_is_whole(tmp_path):
    seen = []

    def write(name):
        Path(name).write_text("half")
        seen.append((tmp_path / "new" / "a.txt").exists())
        assert Path(name).parent == tmp_path / "new", "a rename across file systems is not atomic"
        Path(name).write_text("whole")

    write_atomically(tmp_path / "new" / "a.txt", write)
    assert seen == [False] and (tmp_path / "new" / "a.txt").read_text() == "whole"
    assert os.stat(tmp_path / "new" / "a.txt").st_mode & 0o777 == 0o644


def test_whoever_reads_the_old_file_reads_it_to_its_end(tmp_path):
    """The new file takes the name; the old one is not written over."""
    with open(write_text(tmp_path / "a.txt", "old")) as reader:
        write_text(tmp_path / "a.txt", "new")
        assert reader.read() == "old"


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"not json"])
def test_damaged_json_is_named(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(DamagedArtifact, match="a.json: not readable as JSON"):
        read_json(file)


@pytest.mark.parametrize("cut", [0, 4, 20, -1])
def test_cut_safetensors_are_named(tmp_path, cut):
    file = write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(6.0)}, {"digest": "d"})
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DamagedArtifact, match="a.safetensors: not readable as safetensors"):
        read_tensors(file)
    with pytest.raises(DamagedArtifact, match="a.safetensors: not readable as safetensors"):
        read_metadata(file)


def test_a_missing_file_is_missing_and_not_damaged(tmp_path):
    for read in (read_json, read_tensors, read_metadata):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")


def test_tensors_come_back_also_views_of_one_memory(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"whole": whole, "same": whole, "turned": whole.T, "part": whole[1:, 1:], "flag": torch.tensor(True)}
    file = write_tensors(tmp_path / "a.safetensors", tensors, {"of": "test"})
    back = read_tensors(file)
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert read_metadata(file) == {"of": "test"}
    assert read_metadata(write_tensors(tmp_path / "b.safetensors", tensors)) == {}


@given(value=JSON, order=st.randoms(use_true_random=False))
def test_digest_is_independent_of_the_order_of_keys(value, order):
    def turned(item):
        if isinstance(item, dict):
            pairs = list(item.items())
            order.shuffle(pairs)
            return {key: turned(inner) for key, inner in pairs}
        return [turned(inner) for inner in item] if isinstance(item, list) else item

    assert digest(turned(value)) == digest(value)


def test_digest_depends_on_everything_else():
    values = [{"a": [1, 2]}, {"a": [2, 1]}, {"a": [1, "2"]}, {"a": [1, 2, None]}, {"b": [1, 2]}, {"a": (1.5, 2)}]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": [1, 2]}) == digest({"a": (1, 2)}) == digest({"a": np.array([1, 2])})


def test_tensors_digest_is_of_names_types_shapes_and_bytes_but_not_of_order():
    x, y = torch.arange(6.0), torch.arange(6)
    same = tensors_digest({"x": x, "y": y})
    assert tensors_digest({"y": y, "x": x}) == same
    others = [
        {"x": x, "z": y},
        {"x": x.double(), "y": y},
        {"x": x.view(2, 3), "y": y},
        {"x": x + 1e-6, "y": y},
        {"x": x},
        {"x": y, "y": x},
    ]
    assert len({same, *map(tensors_digest, others)}) == 1 + len(others)
    assert tensors_digest({"x": torch.tensor(1.0)}) and tensors_digest({"x": x.view(2, 3).T}) != tensors_digest(
        {"x": x.view(3, 2)}
    )


def test_file_digest_is_of_the_bytes(tmp_path):
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b") != file_digest(tmp_path / "c")


def test_plain_values_survive_json(tmp_path):
    class Kind(enum.Enum):
        ONE = 1

    value = {
        "float": np.float64(0.1),
        "int": np.int64(3),
        "flag": np.bool_(True),
        "list": np.arange(3),
        "tensor": torch.tensor([1.5]),
        "scalar": torch.tensor(2),
        "set": {"b", "a"},
        "path": Path("x") / "y",
        "enum": Kind.ONE,
        7: None,
    }
    back = read_json(write_json(tmp_path / "a.json", value))
    assert back == {
        "float": 0.1, "int": 3, "flag": True, "list": [0, 1, 2], "tensor": [1.5], "scalar": 2, "set": ["a", "b"],
        "path": "x/y", "enum": "Kind.ONE", "7": None,
    }  # fmt: skip
    assert json.loads(json.dumps(plain(np.float64(0.1)))) == 0.1
