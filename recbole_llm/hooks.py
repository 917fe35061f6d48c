"""How RecBole's own functions find our models: `import recbole_llm`, and `run_recbole(model="BIGRec")` works.

get_model, get_trainer, create_dataset and Config each look in a fixed place; each place gets a small hook. A stock
model sees none of them. A class of ours stays one class in one module (`recbole_llm.model.<file>`), whatever name it is
asked by.
"""

import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_llm.model import model_files

SEQUENTIAL = "recbole.model.sequential_recommender."
OURS = "recbole_llm.model."


def install() -> None:
    """Put every hook in its place; works before and after `recbole.quick_start` is imported. To be called once."""
    import recbole.data.dataset
    import recbole.trainer
    from recbole.config import Config

    sys.meta_path.append(ModelFinder())  # last: a name that RecBole has itself is RecBole's
    look_up(recbole.trainer, "Trainer")
    look_up(recbole.data.dataset, "Dataset", default="recbole_llm.dataset:FlatSequentialDataset")
    add_our_settings(Config)
    explain_unknown_models(Config)


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace the function `owner.name` by `make(original)`, which keeps the original's name and docstring."""
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While this lasts, `owner.name` is another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def sequential_dataset(kind: type) -> Any:
    """While this context lasts, RecBole's `create_dataset` takes `kind` where it would take its SequentialDataset."""
    import recbole.data.dataset

    return replaced(recbole.data.dataset, "SequentialDataset", kind)


class ModelFinder(MetaPathFinder, Loader):
    """Answers `import recbole.model.sequential_recommender.<file of ours>` with the module `recbole_llm.model.<file>`.

    `get_model` looks for its modules under that name. Our folder in its `__path__` would run the file twice and make
    two classes.
    """

    def __init__(self):
        self.own_specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        """A spec for our files under RecBole's name, None for all else."""
        return ModuleSpec(fullname, self, origin="recbole_llm") if _module(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The real module, imported under its own name."""
        module = importlib.import_module(_module(spec.name))
        self.own_specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Undo what the import system just did to the module: it wrote the alias's spec over its own."""
        module.__spec__ = self.own_specs.pop(module.__spec__.name)


def _module(alias: str) -> str | None:
    """The module of ours that RecBole calls `alias`."""
    if not alias.startswith(SEQUENTIAL):
        return None
    by_file = {module.rpartition(".")[2]: module for module in model_files().values()}
    return by_file.get(alias.removeprefix(SEQUENTIAL))


def look_up(module: ModuleType, suffix: str, default: str | None = None) -> None:
    """Let `module.<Name><suffix>` give the class of that name that stands beside our model `<Name>`, if there is one.

    `get_trainer` asks `recbole.trainer` for `<Name>Trainer`, `create_dataset` asks `recbole.data.dataset` for
    `<Name>Dataset`; for the AttributeError both take their default class.

    Args:
        module: RecBole's module.
        suffix: End of the class's name.
        default: "module:class" that models of ours get which have no such class; without it, RecBole's default.
    """
    previous = getattr(module, "__getattr__", None)

    def find(name: str) -> Any:
        home = model_files().get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        if home and hasattr(found := importlib.import_module(home), name):
            return getattr(found, name)
        if home and default:
            return getattr(importlib.import_module(default.partition(":")[0]), default.partition(":")[2])
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    module.__getattr__ = find


def add_our_settings(config_class: type) -> None:
    """Give a Config for a model of ours our yaml layers; RecBole looks for yaml files beside its own code only."""

    def layered(original):
        def _load_internal_config_dict(self, model, model_class, dataset):
            if not model_class.__module__.startswith(OURS):
                return original(self, model, model_class, dataset)
            from recbole_llm.config import load_layers

            return load_layers(self, model, model_class, dataset, original)

        return _load_internal_config_dict

    wrap(config_class, "_load_internal_config_dict", layered)


def explain_unknown_models(config_class: type) -> None:
    """Answer an unknown model name with the names there are; RecBole says "No module named 'lightgbm'"."""

    def explained(original):
        def _get_model_and_dataset(self, model, dataset):
            try:
                return original(self, model, dataset)
            except (ImportError, AttributeError, ValueError) as error:
                name = self.external_config_dict.get("model") if model is None else model
                if not isinstance(name, str) or name in recbole_models() or name in model_files():
                    raise  # the model exists: something it needs is missing
                raise ValueError(unknown_model(name)) from error

        return _get_model_and_dataset

    wrap(config_class, "_get_model_and_dataset", explained)


def recbole_models() -> list[str]:
    """Names of RecBole's own models, which are the names of its yaml files; none is imported."""
    import recbole

    return sorted(path.stem for path in (Path(recbole.__file__).parent / "properties" / "model").glob("*.yaml"))


def unknown_model(name: str) -> str:
    """What to tell whoever asked for the model `name`, which is neither RecBole's nor ours."""
    ours, theirs = sorted(model_files()), recbole_models()
    by_lower = {known.lower(): known for known in (*theirs, *ours)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    guess = f" did you mean '{by_lower[close[0]]}'?" if close else ""
    return (
        f"model={name}: no such model;{guess} There are recbole_llm's {', '.join(ours) or '(none)'} and RecBole's "
        f"{', '.join(theirs)}. Set model, in this spelling, on the command line (--model=...), in the call or in a "
        f"config file."
    )
