"""RecBole 1.2.1 on today's numpy, pandas, scipy and torch, and without ray.

This file and `hooks.py` are the only ones that patch foreign code. Each cure is applied only where the fault is ("name
absent" or "pandas >= 3"), so on numpy 1.26 with pandas 2.3 nothing that works is touched. Stock models give the same
numbers with and without it.

Checkpoints: torch >= 2.6 refuses every RecBole checkpoint, because it holds a Config object. RecBole's own calls of
`torch.load` (and nobody else's) therefore get: our safetensors checkpoints; files that this process wrote, in full; all
other files by a reader that builds tensors, plain values, enums and a Config, and refuses any other object. Set the
environment variable RECBOLE_LLM_TRUST_CHECKPOINTS=1 to have those read in full, too: whoever wrote such a file can then
run any code in this process. What a loaded Config makes RecBole open next (saved datasets, loaders) stays the user's
choice.
"""

import collections
import enum
import functools
import importlib
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse
import torch
import yaml

from recbole_llm import hooks
from recbole_llm.hooks import wrap

TRUST = "RECBOLE_LLM_TRUST_CHECKPOINTS"
PANDAS_3 = int(pd.__version__.split(".")[0]) >= 3
_done: list[bool] = []


def install() -> None:
    """Apply every patch and hook once; a second call does nothing."""
    if _done:
        return
    _done.append(True)
    restore_numpy_names()
    restore_dok_update()
    read_checkpoints_safely()
    import_quick_start_without_ray()
    set_numpy_aliases()
    remember_written_checkpoints()
    search_exhaustively_with_a_generator()
    if PANDAS_3:
        load_datasets_as_under_pandas_2()
        fill_missing_values()
    hooks.install()


def restore_numpy_names() -> None:
    """Give back names that numpy 2.0 removed.

    `config/configurator.py:630-635` reads `float_`, `complex_`, `unicode_` in every Config; ray 2.6's `tune` reads
    `bool8`, which nothing here needs, but whoever imports ray after us does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy 1.24+ warns when `bool8` is looked up
        for gone, name in (("float_", "float64"), ("complex_", "complex128"), ("unicode_", "str_"), ("bool8", "bool_")):
            if not hasattr(np, gone):
                setattr(np, gone, getattr(np, name))


def set_numpy_aliases() -> None:
    """Have RecBole set the aliases it reads itself (`np.float`, absent since numpy 1.24).

    `evaluator/metrics.py` and `data/interaction.py` read `np.float`, which only `Config.__init__` sets; a Config that
    came out of a checkpoint never ran it, so evaluate after load_data_and_model failed in a fresh process on any numpy.
    """
    from recbole.config import Config

    Config.compatibility_settings(None)


def search_exhaustively_with_a_generator() -> None:
    """Give RecBole's exhaustive search the kind of random numbers that hyperopt >= 0.2.7 draws from.

    RecBole hands hyperopt a RandomState (`hyper_tuning.py:117`), which has no `integers`; the hyperopt 0.2.5 that RecBole
    names does not import on setuptools >= 81. Only the name `np` of that one module is another one.
    """
    import recbole.trainer.hyper_tuning as module

    random = SimpleNamespace(**{**vars(np.random), "RandomState": np.random.default_rng})
    module.np = SimpleNamespace(**{**vars(np), "random": random})


def restore_dok_update() -> None:
    """Give back `dok_matrix._update`, gone since scipy 1.13.

    LightGCN, NGCF, GCMC, NCL, SpectralCF, KGIN and MCCLK build their graph with it. The public `update` would do, but
    takes .65 s for 200,000 entries, where this takes next to none.
    """
    if not hasattr(scipy.sparse.dok_matrix, "_update"):
        scipy.sparse.dok_matrix._update = lambda self, entries: self._dict.update(entries)


def import_quick_start_without_ray() -> None:
    """Import `recbole.quick_start` with a stand-in for ray, and take the stand-in out again.

    ray 2.6 needs `pkg_resources` (setuptools < 81) and `np.bool8`, has no build for Python 3.12, and RecBole uses it
    for one call, `tune.report`. A real ray stays importable afterwards, and gets that call if its `tune` is in use.
    """
    if "recbole.quick_start.quick_start" in sys.modules or "ray.tune" in sys.modules:
        return
    ray, tune = ModuleType("ray"), ModuleType("ray.tune")
    ray.tune, tune.report = tune, _report_to_ray
    before = {name: sys.modules.get(name) for name in ("ray", "ray.tune")}
    sys.modules.update({"ray": ray, "ray.tune": tune})
    try:
        importlib.import_module("recbole.quick_start")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _report_to_ray(**result: Any) -> None:
    """Stand in for `tune.report`; objective_function calls it under hyperopt, too, where nobody listens."""
    tune = sys.modules.get("ray.tune")
    if tune is not None:
        tune.report(**result)


def load_datasets_as_under_pandas_2() -> None:
    """Read data sets under pandas >= 3 as RecBole was written for; other code never sees the changes.

    They hold while `Dataset._from_scratch` and `SequentialDataset._benchmark_presets` run, see `pandas_2`.
    """
    from recbole.data.dataset import Dataset, SequentialDataset

    def scoped(original):
        def load(self):
            with pandas_2():
                original(self)

        return load

    wrap(Dataset, "_from_scratch", scoped)
    wrap(SequentialDataset, "_benchmark_presets", scoped)


@contextmanager
def pandas_2() -> Iterator[None]:
    """Two things pandas 3 does differently, and RecBole's loading relies on.

    `Series.agg(len)` gave the length of every row and gives the Series' own length now (any `token_seq` column: "Length
    of values (1) does not match"). `df[field].fillna("", inplace=True)` fills a copy now, so an empty cell of a `*_seq`
    column reaches `split` as a float; `read_csv` fills it instead. pandas' warnings about these lines are kept from the
    user.
    """
    agg, read_csv = pd.Series.agg, pd.read_csv

    @functools.wraps(agg)
    def agg_rows(self, func=None, *args, **kwargs):
        return self.map(len) if func is len else agg(self, func, *args, **kwargs)

    @functools.wraps(read_csv)
    def read_csv_filled(*args, **kwargs):
        frame = read_csv(*args, **kwargs)
        for column in frame.columns:
            if str(column).endswith("_seq"):
                frame[column] = frame[column].fillna("")
        return frame

    pd.Series.agg, pd.read_csv = agg_rows, read_csv_filled
    try:
        with warnings.catch_warnings():
            for category in (pd.errors.ChainedAssignmentError, pd.errors.PandasChangeWarning):
                warnings.filterwarnings("ignore", category=category, module=r"recbole\.")
            yield
    finally:
        pd.Series.agg, pd.read_csv = agg, read_csv


@contextmanager
def parse_in_c() -> Iterator[None]:
    """While this lasts, RecBole's `read_csv(..., engine="python")` runs pandas' C parser where it gives the same frame.

    The Python parser is four times slower and holds 300 MB for the 21 MB of ml-1m. Only `FlatSequentialDataset` reads
    this way, on every pandas; stock data sets are read as RecBole says.
    """
    read_csv = pd.read_csv

    @functools.wraps(read_csv)
    def read_csv_in_c(path, *, engine=None, **kwargs):
        if engine == "python" and _parsers_agree(path, kwargs.get("delimiter"), kwargs.get("encoding")):
            with suppress(ValueError):  # pandas' ParserError is one: what C cannot read, or what is wrong, Python tells
                return read_csv(path, engine="c", **kwargs)
        return read_csv(path, engine=engine, **kwargs)

    with hooks.replaced(pd, "read_csv", read_csv_in_c):
        yield


def _parsers_agree(path: str, separator: str | None, encoding: str | None) -> bool:
    """Whether pandas' two parsers make the same frame of a file, if both read it.

    They differ on stray quotes, which Python's refuses and C's takes, on a first line longer than the header, and on
    separators that are patterns or spaces.
    """
    plain = separator is not None and len(separator) == 1 and separator.isascii() and separator not in ' \r\n"'
    if not plain or (encoding or "utf-8").lower().replace("_", "-") not in ("utf-8", "utf8", "ascii"):
        return False
    with open(path, "rb") as file:
        head, first = file.readline(), file.readline()
        blocks = iter(functools.partial(file.read, 1 << 20), b"")
        return (
            head.count(separator.encode()) == first.count(separator.encode())
            and b'"' not in head + first
            and not any(b'"' in block for block in blocks)
        )


def fill_missing_values() -> None:
    """Fill what is missing in features under pandas >= 3, where RecBole's `_fill_nan` silently fills a copy.

    Ours assigns the same values (0 for tokens, the column's mean for numbers) and calls RecBole's, which does the rest.
    """
    from recbole.data.dataset import Dataset
    from recbole.utils import FeatureType

    def filled(original):
        def _fill_nan(self):
            for feature in (getattr(self, name) for name in self.feat_name_list):
                for field in feature:
                    if self.field2type[field] == FeatureType.TOKEN:
                        feature[field] = feature[field].fillna(0)
                    elif self.field2type[field] == FeatureType.FLOAT:
                        feature[field] = feature[field].fillna(feature[field].mean())
            original(self)

        return _fill_nan

    wrap(Dataset, "_fill_nan", filled)


_written: set[tuple] = set()


def _identity(path: str, stat: os.stat_result) -> tuple:
    return os.path.realpath(path), stat.st_mtime_ns, stat.st_size, stat.st_ino


def remember_written_checkpoints() -> None:
    """Note the identity of every checkpoint that a trainer of this process saves; its reload needs no restriction."""
    from recbole.trainer import trainer as trainers

    def noted(original):
        def _save_checkpoint(self, *args, **kwargs):
            original(self, *args, **kwargs)
            path = kwargs.get("saved_model_file", self.saved_model_file)
            if os.path.isfile(path):  # only the first of several processes writes
                _written.add(_identity(path, os.stat(path)))

        return _save_checkpoint

    for kind in vars(trainers).values():
        if isinstance(kind, type) and "_save_checkpoint" in vars(kind):
            wrap(kind, "_save_checkpoint", noted)


def read_checkpoints_safely() -> None:
    """Make RecBole's calls of `torch.load` work on torch >= 2.6, whose default reads no RecBole checkpoint.

    RecBole saves with pickle protocol 4, which torch's weights-only reader does not know: no `add_safe_globals` helps.
    Only calls from RecBole's own modules that leave `weights_only` open are changed; the module docstring says how.
    """

    def careful(original):
        def load(f, map_location=None, pickle_module=None, *, weights_only=None, **others):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            theirs = caller.startswith("recbole.") and weights_only is None and pickle_module is None
            if not theirs or not isinstance(f, str | os.PathLike):
                return original(f, map_location, pickle_module, weights_only=weights_only, **others)
            return read_checkpoint(os.fspath(f), map_location, original)

        return load

    wrap(torch, "load", careful)


def read_checkpoint(path: str, map_location: Any, load: Callable) -> Any:
    """Read a file that RecBole asks for.

    Args:
        path: A checkpoint of ours (`.safetensors`) or of RecBole.
        map_location: As in torch.load.
        load: torch's own `torch.load`.

    Raises:
        pickle.UnpicklingError: The file comes from elsewhere and holds an object that could run code when loaded.
    """
    if path.endswith(".safetensors"):
        from recbole_llm import checkpoint

        return checkpoint.read_checkpoint(path, "cpu" if map_location is None else map_location)
    if any(os.environ.get(name) for name in ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD")):
        return load(path, map_location)  # torch's own switches are the user's word, too
    with open(path, "rb") as file:
        trusted = os.environ.get(TRUST, "").lower() in {"1", "true", "yes"}
        if trusted or _identity(path, os.fstat(file.fileno())) in _written:
            return load(file, map_location, weights_only=False)
        try:
            return load(file, map_location, pickle_module=RESTRICTED, weights_only=False)
        except Refused as refused:
            raise pickle.UnpicklingError(
                f"checkpoint={path}: not loaded, it holds {refused}, and loading that can run any code; of a file that "
                f"another process wrote, tensors, plain values and RecBole's settings are read. If you trust its "
                f"author, set the environment variable {TRUST}=1."
            ) from None


class Refused(Exception):
    """An object in a checkpoint that is not on the list; its text is the object's name."""


class Mention:
    """A class that a checkpoint may name, but neither call nor change; the Config gets the class itself."""

    def __init__(self, named: type):
        self.named = named

    def __call__(self, *args: Any) -> None:  # noqa: D102 - see the class
        raise Refused(f"a call of {self.named.__module__}.{self.named.__qualname__}")

    __setstate__ = __call__


def settings_class(config_class: type) -> type:
    """A stand-in for a Config class that takes a pickled state and turns into the real one, but cannot be called.

    `Config(config_dict={...})` evaluates strings as Python, so a checkpoint that could call it would run any code.
    """

    def refuse(self, *args):
        raise Refused(f"a call of {config_class.__module__}.{config_class.__qualname__}")

    def take(self, state):
        self.__dict__.update(_resolved(state))
        self.__class__ = config_class

    return type("Settings", (), {"__init__": refuse, "__setstate__": take})


def _resolved(value: Any) -> Any:
    """`value` with the real classes in place of mentions of them."""
    if isinstance(value, Mention):
        return value.named
    return {key: _resolved(item) for key, item in value.items()} if type(value) is dict else value


def _enum_member(kind: Any, name: Any) -> enum.Enum:
    """`getattr(SomeEnum, "MEMBER")`, as some Python versions pickle an enum, and no other `getattr`."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise Refused("a call of builtins.getattr")
    return kind.__members__[name]


# numpy moved its private modules in 2.0; what a value's own pickle names is the right function on every version
_SCALAR, _EMPTY_ARRAY = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]


def _array(kind: Any, shape: tuple, code: bytes) -> np.ndarray:
    """An array that its pickled state will fill; the class itself, which takes raw memory, is never called."""
    return _EMPTY_ARRAY(np.ndarray, shape, code)


_ADMITTED: dict[tuple[str, str], Any] = {
    ("builtins", "getattr"): _enum_member,
    ("builtins", "set"): set,
    ("_codecs", "encode"): importlib.import_module("_codecs").encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): Mention(np.ndarray),
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy.core.multiarray", "_reconstruct"): _array,
    ("numpy._core.multiarray", "_reconstruct"): _array,
    ("torch", "device"): torch.device,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("yaml.loader", "FullLoader"): Mention(yaml.FullLoader),
}


class RestrictedUnpickler(pickle.Unpickler):
    """Reads what RecBole's checkpoints consist of, and refuses every other name before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        """The object a pickle asks for by name.

        Raises:
            Refused: The name is not one that a checkpoint of tensors and settings needs.
        """
        module = "builtins" if module == "__builtin__" else module  # the name in pickle protocol 2
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if (module, name) in {("recbole.config.configurator", "Config"), ("recbole_llm.config", "Config")}:
            return settings_class(getattr(importlib.import_module(module), name))
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module.startswith(("recbole.model.", "recbole_llm.model.")):
            importlib.import_module(module)
        found = getattr(sys.modules.get(module), name, None)
        if isinstance(found, type):
            from recbole.model.abstract_recommender import AbstractRecommender

            if issubclass(found, enum.Enum) and module == "recbole.utils.enum_type":
                return found
            if issubclass(found, AbstractRecommender):
                return Mention(found)
        raise Refused(f"{module}.{name}")


RESTRICTED = SimpleNamespace(
    __name__="restricted_pickle",
    Unpickler=RestrictedUnpickler,
    load=lambda file, **options: RestrictedUnpickler(file, **options).load(),
)
