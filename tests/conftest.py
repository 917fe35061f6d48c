"""What every test stands on: a folder of its own, a clean logger and environment, and data with known answers."""

import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import recbole_llm  # noqa: F401  patches RecBole before anything imports it
from tests.ring import write_ring

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "suite",
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("suite")


def pytest_addoption(parser):
    """Add --slow."""
    parser.addoption("--slow", action="store_true", help="also run the tests with a real language model")


def pytest_collection_modifyitems(config, items):
    """Skip slow tests unless --slow is given."""
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: give --slow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def clean_process(tmp_path, monkeypatch, request):
    """Run in an empty folder, and undo what RecBole does to the process: root logger, environment, command line."""
    monkeypatch.chdir(tmp_path)
    # RecBole's Config reads the command line, which here is pytest's
    monkeypatch.setattr(sys, "argv", ["pytest"])
    environment = dict(os.environ)
    logger = logging.getLogger()
    handlers, level = list(logger.handlers), logger.level
    # on tiny tensors a second thread only waits, and on a busy machine it waits long
    torch.set_num_threads(min(2, os.cpu_count() or 1) if request.node.get_closest_marker("slow") else 1)
    yield
    for handler in set(logger.handlers) - set(handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def ring_source(tmp_path_factory) -> Path:
    """The ring's files, written once."""
    return write_ring(tmp_path_factory.mktemp("data"))


@pytest.fixture
def ring(ring_source, tmp_path) -> Path:
    """A data_path with a copy of the ring of its own, which a test may change."""
    return Path(shutil.copytree(ring_source, tmp_path / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder.name} beside the repository ({folder.parent.name}/{folder.name})")
    return folder


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory) -> Path:
    """A folder with a two-layer Llama and its tokenizer, as save_pretrained writes them."""
    from tests.tiny_lm import make_tiny_lm

    folder = tmp_path_factory.mktemp("tiny_lm")
    make_tiny_lm(folder)
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """Folder of the log on which LSC4Rec is tested."""
    from tests.collaborations import sequences
    from tests.small_logs import write_log

    return write_log(tmp_path_factory.mktemp("data"), "log", sequences())
