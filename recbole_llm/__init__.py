"""LLM recommenders for RecBole, and what they know carried into small, fast models.

Importing this package is enough for RecBole's own functions to find our models; no LLM library is loaded by it.
"""

from recbole_llm import compat

__version__ = "0.1.0"
__all__ = [
    "Config",
    "FlatSequentialDataset",
    "Knowledge",
    "Recommender",
    "SequenceTrainer",
    "__version__",
    "create_dataset",
    "load_recommender",
    "run_recbole_llm",
]

compat.install()

_HOMES = {
    "Config": "recbole_llm.config",
    "FlatSequentialDataset": "recbole_llm.dataset",
    "Knowledge": "recbole_llm.knowledge",
    "Recommender": "recbole_llm.recommend",
    "SequenceTrainer": "recbole_llm.trainer",
    "create_dataset": "recbole_llm.dataset",
    "load_recommender": "recbole_llm.recommend",
    "run_recbole_llm": "recbole_llm.quick_start",
}


def __getattr__(name: str):
    """Load a public name at its first use, so that importing the package stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
