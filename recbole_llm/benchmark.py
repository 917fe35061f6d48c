"""A benchmark as its yaml file says it: rows of models, each on every data set, and what each is compared with.

A row whose name holds `{student}` stands once for every value of the axis `student`, with the settings of that value. The settings
of a row, weakest first: those of the file < of its axes' values (their `config_files` first) < its own < of the data set, which
are the protocol < the command line. Nothing is run here; `runner.py` does that.
"""

import itertools
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_llm.config import guess, no_such_choice, read_yaml

ROLES = ("baseline", "control", "claim")
OF_THE_FILE = {
    "what": "", "minutes": None, "seeds": [2020], "settings": {}, "datasets": {}, "axes": {}, "rows": {}, "tolerance": 0.0,
    "prepare": None, "here": True, "published": {}, "source": "",
}  # fmt: skip
OF_A_ROW = {
    "role": "claim",
    "settings": {},
    "against": None,
    "where": None,
    "only": {},
    "seeds": None,
    "ensemble": (),
}


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
        here: Whether it can be run on a small machine; otherwise it is shipped for others, with what was published.
        published: Data set -> row -> metric -> value that a paper gives; another protocol's, never compared.
        source: Where the published values are from.
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
            ValueError: There is no such file, or it is not understood; the message lists every fault.
        """
        file = Path(file)
        if not file.is_file():
            there = ", ".join(sorted(path.stem for path in file.parent.glob("*.yaml"))) or "none"
            raise ValueError(f"benchmark={file}: no such file; in {file.parent}/ there is {there}. Set --benchmark.")
        given = read_yaml(file)
        faults = [f"  {key}: no such key{guess(key, OF_THE_FILE)}" for key in given if key not in OF_THE_FILE]
        said = OF_THE_FILE | given
        faults += (
            ["  seed: is varied by the benchmark; there is seeds, and --seeds"] if "seed" in (overrides or {}) else []
        )
        faults += [f"  {key}: is empty; a benchmark needs it" for key in ("rows", "datasets") if not said[key]]
        rows: list[Row] = []
        if not faults:
            for dataset in said["datasets"]:
                for template, spec in said["rows"].items():
                    rows += _expanded(file, said, dataset, template, spec or {}, dict(overrides or {}), faults)
            faults += _loose_ends(rows)
        faults = list(dict.fromkeys(faults))  # a row may be wrong on every data set
        if faults:
            raise ValueError(
                "\n".join([f"benchmark={file}: {len(faults)} of its keys are wrong. Correct them there:", *faults])
            )
        tolerance = said["tolerance"]
        if not isinstance(tolerance, Mapping):
            tolerance = dict.fromkeys(said["datasets"], tolerance)
        return cls(
            file.stem,
            said["what"],
            said["minutes"],
            tuple(rows),
            {dataset: float(tolerance.get(dataset, 0.0)) for dataset in said["datasets"]},
            said["prepare"],
            said["here"],
            said["published"],
            said["source"],
        )


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
    wrong = [f"  rows: {template}: {key}: no such key{guess(key, OF_A_ROW)}" for key in spec if key not in OF_A_ROW]
    spec = OF_A_ROW | dict(spec)
    axes = names_in(template)
    wrong += [
        f"  rows: {template}: {{{axis}}}{guess(axis, said['axes'])} is no axis"
        for axis in axes
        if axis not in said["axes"]
    ]
    if spec["role"] not in ROLES:
        wrong.append(f"  rows: {template}: {no_such_choice('role', spec['role'], ROLES)}")
    wrong += [
        f"  rows: {template}: where: {name} is no data set{guess(name, said['datasets'])}"
        for name in spec["where"] or []
        if name not in said["datasets"]
    ]
    if wrong:
        faults += wrong
        return
    if spec["where"] and dataset not in spec["where"]:
        return
    choices = [
        [value for value in said["axes"][axis] if value in spec["only"].get(axis, said["axes"][axis])] for axis in axes
    ]
    for values in itertools.product(*choices):
        names = dict(zip(axes, values, strict=True)) | {"dataset": dataset}
        settings: dict[str, Any] = {}
        layers = [
            said["settings"],
            *(said["axes"][axis][value] for axis, value in zip(axes, values, strict=True)),
            spec["settings"],
        ]
        for layer in [*layers, said["datasets"][dataset]]:
            layer = dict(layer or {})
            for named in layer.pop("config_files", []):
                path = file.parent / named.format(**names)
                if not path.is_file():
                    faults.append(f"  rows: {template}: config_files: {path}: no such file")
                settings |= read_yaml(path)
            settings |= layer
        yield Row(
            template.format(**names),
            dataset,
            spec["role"],
            settings | overrides,
            tuple(other.format(**names) for other in _listed(spec["against"])),
            tuple(spec["seeds"] or said["seeds"]),
            tuple(part.format(**names) for part in spec["ensemble"]),
            names,
        )


def _listed(value: str | list[str] | None) -> list[str]:
    """One name or several as a list."""
    return [value] if isinstance(value, str) else list(value or [])


def names_in(template: str) -> list[str]:
    """The axes that a row's name holds, each once."""
    return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name))


TEACHER_OF = "teacher of "


def _loose_ends(rows: list[Row]) -> list[str]:
    """Faults of rows that name others which are not there, have no model, or stand twice."""
    faults = []
    for row in rows:
        there = [other.name for other in rows if other.dataset == row.dataset]
        if there.count(row.name) > 1:
            faults.append(f"  rows: {row.name}: stands twice on {row.dataset}; give each an axis or a name of its own")
        for name in [*row.against, *(part.removeprefix(TEACHER_OF) for part in row.ensemble)]:
            if name not in there:
                faults.append(f"  rows: {row.name}: {name} is no row on {row.dataset}{guess(name, there)}")
        if not row.ensemble and "model" not in row.settings:
            faults.append(f"  rows: {row.name}: has no model; give it settings: {{model: SASRec}}")
        if row.ensemble and len(row.ensemble) != 2:
            faults.append(f"  rows: {row.name}: ensemble: names {len(row.ensemble)} rows; there have to be two")
    return faults
