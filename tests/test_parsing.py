"""Atomic files read by pandas' C parser give the frames that RecBole's way of reading gives."""

import random

import pandas as pd
import pytest
from recbole.config import Config
from recbole.data.dataset import SequentialDataset

from recbole_llm.dataset import FlatSequentialDataset
from tests.small_logs import PLAIN

PARSED_IN_C = {
    "plain": "u1\ti1\t1.5\ta b\t0.25 1e-3\nu2\ti2\t2\tc\t3\n",
    "no last line end": "u1\ti1\t1.5\ta b\t0.25",
    "empty cells": "u1\ti1\t\t\t\nu2\t\t3\tc\t\n\ti1\t2\t\t1\n",
    "missing cells": "u1\ti1\t1\ta\t1\nu2\ti2\nu3\n",
    "words for nothing": "NA\tnull\tnan\tNone\t\nn/a\tNaN\t1\t#N/A\t2\n",
    "apostrophes and signs": "u'1\ti,1\t-1e5\tl\u2019\u00e9t\u00e9 # 50%\t1\nu2\t i2 \t+2\tc\\d\t1\n",
    "blank lines": "u1\ti1\t1\ta\t1\n\n   \nu2\ti2\t2\tb\t2\n",
    "large numbers": "u1\ti1\t1234567890123456789\ta\t1\nu2\t007\t9007199254740993\tb\t1\n",
    "odd numbers": "".join(
        f"u1\ti1\t{random.Random(n).uniform(-9, 9) * 10 ** (n % 40 - 20)!r}\ta\t1\n" for n in range(500)
    ),
    "windows": "u1\ti1\t1\ta\t1\r\nu2\ti2\t2\tb\t2\r\n",
    "longer lines": "u1\ti1\t1\ta\t1\nu2\ti2\t2\tb\t2\tmore\n",
}
PARSED_IN_PYTHON = {
    "quotes": 'u1\ti1\t1\t"a b"\t1\nu2\ti2\t2\tab\t1\n',
    "quotes late": "u1\ti1\t1\ta\t1\n" * 3 + 'u2\ti2\t2\t"a ""b"""\t1\n',
    "broken quotes": 'u1\ti1\t1\ta\t1\nu2\ti2\t2\t"a"b\t1\n',
    "longer first line": "u1\ti1\t1\ta\t1\tmore\nu2\ti2\t2\tb\t2\n",
    "python's numbers": "u1\ti1\t1_000\ta\t1\n",
    "no numbers": "u1\ti1\tword\ta\t1\n",
}


@pytest.mark.parametrize("text", [*PARSED_IN_C, *PARSED_IN_PYTHON])
def test_the_faster_parser_gives_the_same_frame(tmp_path, monkeypatch, text):
    (tmp_path / "odd").mkdir()
    head = "user_id:token\titem_id:token\ttimestamp:float\ttitle:token_seq\tshape:float_seq\n"
    (tmp_path / "odd" / "odd.inter").write_text(
        head + (PARSED_IN_C | PARSED_IN_PYTHON)[text], encoding="utf-8", newline=""
    )
    settings = PLAIN | {"data_path": str(tmp_path), "train_neg_sample_args": None, "load_col": None}
    config = Config(model="SASRec", dataset="odd", config_dict=settings)
    read_csv, engines = pd.read_csv, []

    def spy(*args, **kwargs):
        frame = read_csv(*args, **kwargs)
        engines.append(kwargs["engine"])
        return frame

    monkeypatch.setattr(pd, "read_csv", spy)
    frames = []
    for kind in (SequentialDataset, FlatSequentialDataset):
        monkeypatch.setattr(kind, "_data_processing", lambda dataset: None)
        try:
            frames.append(kind(config).inter_feat)
        except ValueError as error:
            frames.append(str(error))
    if isinstance(frames[0], str):
        assert frames[0] == frames[1] and engines == []
    else:
        pd.testing.assert_frame_equal(*frames, check_exact=True)
        assert engines == ["python", "c" if text in PARSED_IN_C else "python"]
    assert pd.read_csv is spy
