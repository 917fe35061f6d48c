"""A benchmark as its yaml file says it: rows of models, each on every data set, and what each is compared with.

A row whose name holds `{student}` stands once for every value of the axis `student`, with the settings of that value. The settings
of a row, weakest first: those of the file < of its axes' values (their `config_files` first) < its own < of the data set, which
are the protocol < the command line. Nothing is run here; `runner.py` does that.
"""

import itertools
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recbole_llm.artifacts import digest, slug
from recbole_llm.config import guess, read_yaml
from recbole_llm.model import PROPERTIES
from recbole_llm.model.dllm2rec import Distillation
from recbole_llm.report import OF_A_MACHINE

ROLES = ("baseline", "control", "claim")
TEACHER_OF = "teacher of "
OWN = {
    "seed": "is varied by the benchmark; there is seeds, and --seeds",
    "keep_lists": "is the same in every benchmark, whose tables tell the overlap of lists; leave it out",
    "model": "every row has its own; --only=<data set>/<row> chooses among them",
    "dataset": "every data set of the file has its own; --only=<data set>/* chooses among them",
    "config_files": "rows name theirs in the benchmark's file; single settings may be given as --key=value",
}
"""Settings that a benchmark gives to its runs itself, and nobody may override."""


@dataclass(frozen=True)
class _Each:
    """A mapping whose values are all of one kind; its keys are texts, and may be numbers where they are values of an axis."""

    kind: Any
    numbers: bool = False


def _kind(fits: Callable[[Any], bool], otherwise: str) -> Callable[[Any], str | None]:
    """What a value may be: a function that tells what is wrong with one."""
    return lambda value: None if fits(value) else otherwise


def _is_number(value: Any, least: float = -math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= least


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Whether a value is a list of fitting values, each once, and not empty."""
    return isinstance(value, list) and all(map(fits, value)) and 0 < len(value) == len(set(value))


def _role(value: Any) -> str | None:
    return None if value in ROLES else f"no such choice{guess(value, ROLES)} There is {', '.join(ROLES)}"


TEXT = _kind(lambda value: isinstance(value, str), "is no text; put it into quotes")
FLAG = _kind(lambda value: isinstance(value, bool), "is neither true nor false; write one of them, without quotes")
NUMBER = _kind(_is_number, "is no number; YAML wants the dot of 1.0e-3")
AMOUNT = _kind(lambda value: _is_number(value, 0), "is no number from 0 upwards; YAML wants the dot of 1.0e-3")
SEEDS = _kind(
    lambda value: _is_list(value, lambda seed: type(seed) is int and 0 <= seed < 2**32),
    "is no list of whole numbers from 0 upwards, each once; write [2020, 2021], say",
)
NAMES = _kind(
    lambda value: _is_list(value, lambda name: isinstance(name, str) or _is_number(name)),
    "is no list of names, each once; write [name, other name]",
)
SETTINGS = _Each(lambda _: None)  # what they are set to is for RecBole's Config to check
OF_A_ROW = {
    "role": ("claim", _role), "settings": ({}, SETTINGS), "against": (None, lambda value: TEXT(value) and NAMES(value)),
    "where": (None, NAMES), "only": ({}, _Each(NAMES)), "seeds": (None, SEEDS), "ensemble": (None, NAMES),
}  # fmt: skip
OF_THE_FILE = {
    "what": ("", TEXT), "minutes": (None, AMOUNT), "seeds": ([2020], SEEDS), "settings": ({}, SETTINGS),
    "datasets": ({}, _Each(SETTINGS)), "axes": ({}, _Each(_Each(SETTINGS, numbers=True))), "rows": ({}, _Each(OF_A_ROW)),
    "tolerance": (0.0, (AMOUNT, _Each(AMOUNT))), "prepare": (None, TEXT), "here": (True, FLAG),
    "published": ({}, _Each(_Each(_Each(NUMBER)))), "source": ("", TEXT),
}  # fmt: skip
"""Key -> its default, which an empty value stands for, and what it may be: a kind, a mapping of such, or keys of their own."""


@dataclass(frozen=True)
class Row:
    """One model on one data set: a line of a table, trained once per seed.

    Args:
        name: The line's name.
        dataset: The data set's name in the file, under which stand its protocol and its table.
        role: `baseline`, `control` (shows where a gain is from) or `claim`.
        settings: All of its settings but the seed.
        against: The rows that it is compared with; the first is what it began as.
        seeds: One run each.
        ensemble: The two rows whose scores are added; `teacher of <row>` names the teacher of one.
        axes: The values that its name was filled in with.
    """

    name: str
    dataset: str
    role: str
    settings: dict[str, Any]
    against: tuple[str, ...]
    seeds: tuple[int, ...]
    ensemble: tuple[str, ...] = ()
    axes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """A file of a benchmark, its rows expanded.

    Args:
        name: The file's.
        what: What it shows, in a sentence.
        minutes: How long it takes on two CPU cores, Knowledge there already.
        rows: In the order of the file, data set by data set.
        tolerance: Data set -> how far a metric may be from the committed one and still be the same.
        prepare: Module whose `prepare()` makes what the runs need.
        here: Whether it can be run on a small machine; otherwise it is shipped for others, with what was published, and the
            command runs it with --here only.
        published: Data set -> row -> metric -> value that a paper gives; another protocol's, never compared.
        source: Where the published values are from.
        changed: Settings of the command line that make other runs of it than those of the file.
    """

    name: str
    what: str
    minutes: float | None
    rows: tuple[Row, ...]
    tolerance: dict[str, float]
    prepare: str | None = None
    here: bool = True
    published: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    changed: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the folder of its results; another one where settings were changed, whose numbers are not the file's."""
        return f"{self.name}-{digest(self.changed, 8)}" if self.changed else self.name

    @property
    def datasets(self) -> list[str]:
        """Names of its data sets, in the order of the file."""
        return list(dict.fromkeys(row.dataset for row in self.rows))

    def on(self, dataset: str) -> list[Row]:
        """Its rows on one data set."""
        return [row for row in self.rows if row.dataset == dataset]

    @classmethod
    def load(cls, file: str | Path, overrides: Mapping[str, Any] | None = None) -> "Benchmark":
        """Read a file.

        Args:
            file: Of a benchmark.
            overrides: Settings that win over all others, such as `data_path`.

        Raises:
            ValueError: There is no such file, it is not understood, or a setting is not to be overridden. The message lists the
                faults: first those of single keys, then of rows, then of what rows say of each other.
        """
        file = Path(file)
        if not file.is_file():
            there = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml"))) or "none"
            raise ValueError(f"benchmark={file}: no such file; in {file.parent}/ there is {there}. Set --benchmark.")
        if taken := [f"{key}={overrides[key]}: {why}." for key, why in OWN.items() if key in (overrides or {})]:
            raise ValueError("\n".join(taken))
        try:
            given = _read(file)
        except ValueError as error:
            raise ValueError(f"benchmark={error}") from error
        faults = list(_misfits("", given, OF_THE_FILE))
        said = _filled_up(given, OF_THE_FILE)
        faults = faults or _gaps(said)
        rows: list[Row] = []
        if not faults:
            for dataset in said["datasets"]:
                for template, spec in said["rows"].items():
                    rows += _expanded(file, said, dataset, template, spec or {}, dict(overrides or {}), faults)
        faults = list(dict.fromkeys(faults or _loose_ends(rows)))  # a row may be wrong on every data set
        if faults:
            raise ValueError(
                "\n".join([f"benchmark={file}: {len(faults)} of its keys are wrong. Correct them there:", *faults])
            )
        tolerance = said["tolerance"]
        if not isinstance(tolerance, Mapping):
            tolerance = dict.fromkeys(said["datasets"], tolerance)
        tolerance = {dataset: float(tolerance.get(dataset, 0.0)) for dataset in said["datasets"]}
        as_said = {key: said[key] for key in ("what", "minutes", "prepare", "here", "published", "source")}
        as_said["changed"] = changed(overrides, cls.load(file).rows) if overrides else {}
        return cls(file.stem, rows=tuple(rows), tolerance=tolerance, **as_said)


def changed(overrides: Mapping[str, Any], rows: Iterable[Row]) -> dict[str, Any]:
    """Those of some settings that make other runs of rows: not what the file says anyway, or what only tells where and how they run."""
    return {
        key: value
        for key, value in overrides.items()
        if key not in OF_A_MACHINE and any(key not in row.settings or row.settings[key] != value for row in rows)
    }


def _read(file: Path) -> dict[str, Any]:
    """What a yaml file holds. Raises: ValueError: It is no YAML, or holds no keys."""
    try:
        given = read_yaml(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file}: cannot be read as YAML: {' '.join(str(error).split())}. Correct it there."
        ) from error
    if not isinstance(given, dict):
        raise ValueError(f"{file}: holds no keys, but a {type(given).__name__}; write `key: value`, one a line.")
    return given


def _filled_up(given: Mapping[str, Any], form: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Values with the defaults of a form for those that are not there, or empty."""
    return {key: default if given.get(key) is None else given[key] for key, (default, _) in form.items()}


def _misfits(place: str, value: Any, kind: Any) -> Iterator[str]:
    """What is wrong with a value and all that is in it, by the kind that it has to be of."""
    if isinstance(kind, tuple):  # one value for all, or one for each
        kind = kind[isinstance(value, Mapping)]
    if value is None and (kind is SETTINGS or isinstance(kind, dict)):
        return
    if callable(kind):
        if fault := kind(value):
            yield f"  {place}={value}: {fault}"
    elif not isinstance(value, Mapping):
        yield f"  {place}={value}: holds no keys; write {{key: value}}"
    elif isinstance(kind, _Each):
        for key, inner in value.items():
            if isinstance(key, str) or kind.numbers and _is_number(key):
                yield from _misfits(f"{place}: {key}", inner, kind.kind)
            else:
                yield f"  {place}: {key}: is no text; put it into quotes"
    else:
        for key, inner in value.items():
            where = f"{place}: {key}" if place else key
            if key not in kind:
                yield f"  {where}: no such key{guess(key, kind)}"
            elif inner is not None:
                yield from _misfits(where, inner, kind[key][1])


def _unknown(place: str, names: Iterable[Any], what: str, known: Iterable[Any]) -> list[str]:
    """Faults for names that are none of those that are known."""
    return [f"  {place}: {name} is no {what}{guess(name, known)}" for name in names if name not in known]


def _gaps(said: Mapping[str, Any]) -> list[str]:
    """What is missing in a file whose every key is well-formed, and what is said of data sets that are missing."""
    datasets = said["datasets"]
    faults = [f"  {key}: is empty; a benchmark needs it" for key in ("rows", "datasets") if not said[key]]
    for name, settings in datasets.items():
        if not isinstance((settings or {}).get("dataset"), str):
            faults.append(f"  datasets: {name}: names no data set; give it dataset: ml-100k, say")
    faults += [f"  axes: {axis}: is empty; give it values" for axis, values in said["axes"].items() if not values]
    if "dataset" in said["axes"]:
        faults.append("  axes: dataset: stands for the data set everywhere; give the axis another name")
    for key in ("tolerance", "published"):
        faults += _unknown(key, said[key] if isinstance(said[key], Mapping) else (), "data set", datasets)
    return faults + _one_file_each("datasets", list(datasets))


def _one_file_each(place: str, names: list[str]) -> list[str]:
    """Faults for names whose results would overwrite each other."""
    first: dict[str, str] = {}
    return [
        f"  {place}: {name}: its results would have the name of those of {other}, {slug(name)}; rename one of them"
        for name in dict.fromkeys(names)
        if (other := first.setdefault(slug(name), name)) != name
    ]


def _expanded(
    file: Path,
    said: Mapping[str, Any],
    dataset: str,
    template: str,
    spec: Mapping[str, Any],
    overrides: dict,
    faults: list[str],
) -> Iterator[Row]:
    """The rows that one entry of the file stands for on one data set; what is wrong with it is added to `faults`."""
    place, spec = f"rows: {template}", _filled_up(spec, OF_A_ROW)
    try:
        axes = names_in(template)
    except ValueError as error:
        faults.append(f"  rows: {error}")
        return
    known, only = {axis: said["axes"].get(axis, {}) for axis in axes}, spec["only"]
    wrong = _unknown(place, axes, "axis", said["axes"])
    wrong += _unknown(f"{place}: only", only, "axis of its name", axes)
    wrong += _unknown(f"{place}: where", spec["where"] or [], "data set", said["datasets"])
    for axis in () if wrong else only:
        wrong += _unknown(f"{place}: only", only[axis], f"value of {axis}", known[axis])
    faults += wrong
    if wrong or spec["where"] and dataset not in spec["where"]:
        return
    choices = ([value for value in known[axis] if value in only.get(axis, known[axis])] for axis in axes)
    for values in itertools.product(*choices):
        chosen = dict(zip(axes, values, strict=True))
        names = {"dataset": dataset} | chosen
        of_axes = (known[axis][value] for axis, value in chosen.items())
        layers = [said["settings"], *of_axes, spec["settings"], said["datasets"][dataset]]
        try:
            row = Row(
                fill(template, names),
                dataset,
                spec["role"],
                _merged(layers, names, file.parent) | overrides,
                tuple(fill(other, names) for other in _listed(spec["against"])),
                tuple(spec["seeds"] or said["seeds"]),
                tuple(fill(part, names) for part in _listed(spec["ensemble"])),
                names,
            )
        except ValueError as error:
            faults.append(f"  {place}: {error}")
        else:
            yield row


def _merged(layers: Iterable[Mapping[str, Any] | None], names: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of several layers, later ones win; the `config_files` of a layer come before its own. Raises: ValueError."""
    settings: dict[str, Any] = {}
    for layer in layers:
        own = dict(layer or {})
        for named in _listed(own.pop("config_files", None)):
            path = folder / fill(named, names)
            if not path.is_file():
                raise ValueError(f"config_files: {path}: no such file")
            settings |= _read(path)
        settings |= own
    return settings


def _listed(value: Any) -> list[str]:
    """One name or several as a list."""
    return list(map(str, value if isinstance(value, list) else [] if value is None else [value]))


def _parsed(text: str) -> list[tuple[str, str | None]]:
    """A text as pairs of what stands there and the `{name}` that follows. Raises: ValueError: Its braces do not match."""
    try:
        found = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{text}: {error}; write {{axis}} where a value stands, and {{{{ for a brace") from error
    return [
        (before, name if name is None else name + (f"!{how}" if how else "") + (f":{form}" if form else ""))
        for before, name, form, how in found
    ]


def names_in(template: str) -> list[str]:
    """The axes that a row's name holds, each once. Raises: ValueError: Its braces do not match."""
    return list(dict.fromkeys(name for _, name in _parsed(template) if name is not None))


def fill(text: str, names: Mapping[str, Any]) -> str:
    """A text with the value of every `{axis}` in its place. Raises: ValueError: It names what the row has no value of."""
    if wrong := [name for name in names_in(text) if name not in names]:
        there = ", ".join(f"{{{name}}}" for name in names)
        raise ValueError(
            f"{text}: {{{wrong[0]}}} is none of what its name is filled in with{guess(wrong[0], names)} There is {there}"
        )
    return "".join(before + ("" if name is None else str(names[name])) for before, name in _parsed(text))


def teaches(settings: Mapping[str, Any]) -> bool:
    """Whether settings of a row ask for a teacher, as far as they can be understood before there is a Config."""
    if settings.get("model") != "DLLM2Rec":
        return False
    known = read_yaml(PROPERTIES / "model" / "DLLM2Rec.yaml") | dict(settings)
    if known["distill_mode"] is False:  # YAML reads a bare `off` so
        known["distill_mode"] = "off"
    try:
        return Distillation.from_config(known).asks_teacher(known)
    except (ValueError, TypeError):  # its Config will tell
        return True


def _loose_ends(rows: list[Row]) -> list[str]:
    """Faults of rows that are well-formed one by one, but not beside each other."""
    faults = []
    for dataset in dict.fromkeys(row.dataset for row in rows):
        there = {row.name: row for row in rows if row.dataset == dataset}
        count = Counter(row.name for row in rows if row.dataset == dataset)
        faults += _one_file_each("rows", list(there))
        for name, row in there.items():
            checks = _of_one(row, there) | {
                f"stands twice on {dataset}; give each an axis or a name of its own": count[name] > 1
            }
            faults += [f"  rows: {name}: {fault}" for fault, wrong in checks.items() if wrong]
            others = [*row.against, *(part.removeprefix(TEACHER_OF) for part in row.ensemble)]
            faults += _unknown(f"rows: {name}", others, f"row on {dataset}", there)
    return faults


def _of_one(row: Row, there: Mapping[str, Row]) -> dict[str, bool]:
    """What may be wrong with a row beside the others on its data set -> whether it is."""
    shuffled = row.settings.get("shuffle_text") is not None
    checks = {
        "has no model; give it settings: {model: SASRec}": not row.ensemble and "model" not in row.settings,
        "against: it is compared with itself; name another row": row.name in row.against,
        f"ensemble: names {len(set(row.ensemble))} rows; there have to be two": len(set(row.ensemble)) not in (0, 2),
        f"shuffle_text: only a control may have it, and this is a {row.role}; give it role: control, or take shuffle_text out, also "
        "of its axes and its data set": shuffled and row.role != "control",
    }
    checks |= {f"settings: {key}: {OWN[key]}": key in row.settings for key in ("seed", "keep_lists")}
    for part in row.ensemble:
        if other := there.get(part.removeprefix(TEACHER_OF)):
            taught = bool(other.ensemble) or not part.startswith(TEACHER_OF) or teaches(other.settings)
            checks |= {
                f"ensemble: {part}: is made of an ensemble; name two rows that are trained": bool(other.ensemble),
                f"ensemble: {part}: there is none; name a row that distils a teacher, with model: DLLM2Rec": not taught,
            }
    return checks
