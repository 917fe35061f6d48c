"""RecBole's Config with our yaml layers under the user's settings, and a refusal of settings that nothing reads.

Layers, weakest first: RecBole's own (with the student's yaml for a distilling model) < ours `overall` < `model/<model>` <
`dataset/<dataset>` < config files < config_dict < command line. RecBole answers None for any unknown key and takes
`--lerning_rate=1` in silence; here every fault of the settings is gathered and told at once, before any work starts.
"""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from recbole.config import Config as RecBoleConfig
from recbole.utils import ModelType
from recbole.utils.argument_list import (
    dataset_arguments,
    evaluation_arguments,
    general_arguments,
    training_arguments,
)

from recbole_llm import processes
from recbole_llm.item_text import fault_of_seed
from recbole_llm.model import PROPERTIES, model_files

# Read by RecBole 1.2.1 or its scripts, yet declared in none of its yaml files or argument lists.
UNDECLARED = {
    "model", "dataset", "config_files", "config_file_list", "nproc", "world_size", "ip", "port", "offset", "local_rank",
    "group_offset", "params_file", "tool", "output_file", "display_file", "max_evals", "early_stop", "encoding",
    "numerical_features", "accum", "xgb_early_stopping_rounds", "reg_weight", "loss_type", "MODEL_TYPE", "kg_reverse_r",
    "discretization", "token_num_threshold", "training_neg_sample_num", "neg_sampling",
}  # fmt: skip

# What a teacher shares with the student it teaches: the data, the protocol and the machine, never the training.
SHARED = {
    *general_arguments, *dataset_arguments, *(set(evaluation_arguments) - {"eval_batch_size"}),
    "title_field", "shuffle_text", "threads", "seen_items", "allow_keys", "numerical_features", "encoding", "resume", "worker",
}  # fmt: skip


class Config(RecBoleConfig):
    """RecBole's Config for every model under our runner, stock models included.

    Args:
        model: Name or class of the model.
        dataset: Name of the data set.
        config_file_list: Yaml files, later ones win.
        config_dict: Settings that win over the files.
        read_argv: Whether the command line is read, too; False for every second Config of a process, or a teacher would
            take the student's `--learning_rate`.

    Raises:
        ValueError: A setting is unknown or impossible; the message lists every fault.

    Relations:
        Like RecBole's Config, but with our layers, and it does not swallow unknown keys.
    """

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: list[str] | None = None,
        config_dict: dict | None = None,
        read_argv: bool = True,
    ):
        self.read_argv = read_argv
        super().__init__(model, dataset, config_file_list, dict(config_dict or {}))

    def _load_cmd_line(self):
        return super()._load_cmd_line() if self.read_argv else {}

    def _convert_config_dict(self, config_dict):
        # RecBole evaluates what it is given: 1/2 would become a number
        parts = {key: value for key, value in config_dict.items() if key == "teacher_shard" and "/" in str(value)}
        rest = {key: value for key, value in config_dict.items() if key not in parts}
        return super()._convert_config_dict(rest) | parts

    def _init_device(self):
        processes.settle(self.final_config_dict, self.external_config_dict)
        super()._init_device()

    def _load_config_files(self, file_list):
        for file in file_list or []:
            if not Path(file).is_file():
                raise ValueError(f"config_files={file}: no such file. Name existing yaml files, separated by blanks.")
        return super()._load_config_files(file_list)

    def _load_internal_config_dict(self, model, model_class, dataset):
        host = super()._load_internal_config_dict
        if is_ours(model_class):  # the hook in compat.py adds our layers for every Config
            host(model, model_class, dataset)
        else:
            load_layers(self, model, model_class, dataset, lambda _, *names: host(*names))


def is_ours(model_class: type) -> bool:
    """Whether a model class stands in this package."""
    return model_class.__module__.startswith("recbole_llm.model.")


def read_yaml(path: Path, loader=yaml.SafeLoader) -> dict[str, Any]:
    """Settings of one yaml file; {} if there is no such file."""
    if not path.is_file():
        return {}
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader) or {}


def load_layers(
    config: RecBoleConfig,
    model: str,
    model_class: type,
    dataset: str,
    host: Callable[[RecBoleConfig, str, type, str], None],
) -> None:
    """Fill `config.internal_config_dict` with RecBole's layers and then ours, and refuse what no layer knows.

    Args:
        config: A Config whose external settings are merged already.
        model: Name of the model.
        model_class: Its class.
        dataset: Name of the data set.
        host: RecBole's own `_load_internal_config_dict`.

    Raises:
        ValueError: Every fault of the settings in one message.
    """
    ours = read_yaml(PROPERTIES / "model" / f"{model}.yaml", config.yaml_loader) if is_ours(model_class) else {}
    faults, student = [], None
    if "student" in ours:
        student = config.external_config_dict.get("student", ours["student"])
        if student not in (known := sequential_models()):
            faults.append(
                f"student={student}: no such sequential model{guess(student, known)} Set student to one of RecBole's sequential "
                "models; --help lists them."
            )
            student = ours["student"]
        elif fault := unsuited(student):
            faults.append(fault)
            student = ours["student"]  # its own layers may need files that are not there
    if "distill_mode" in ours and config.external_config_dict.get("distill_mode") is False:
        config.external_config_dict["distill_mode"] = "off"  # YAML reads a bare `off` as False
    host(config, student or model, model_class, dataset)
    layers = config.internal_config_dict
    layers.update(read_yaml(PROPERTIES / "overall.yaml", config.yaml_loader))
    layers.update(ours)
    known = {*layers, *general_arguments, *training_arguments, *evaluation_arguments, *dataset_arguments, *UNDECLARED}
    of_dataset = read_yaml(PROPERTIES / "dataset" / f"{dataset}.yaml", config.yaml_loader)
    layers.update({key: value for key, value in of_dataset.items() if key in known})
    if (
        config.external_config_dict.get("loss_type", layers.get("loss_type")) == "CE"
        and "train_neg_sample_args" not in config.external_config_dict
    ):
        layers["train_neg_sample_args"] = None  # RecBole's sequential models with full softmax refuse negatives
    for key, allowed in CHOICES.items():
        if (value := config.external_config_dict.get(key, layers[key])) not in allowed:
            faults.append(no_such_choice(key, value, allowed))
    if fault := fault_of_seed(config.external_config_dict.get("shuffle_text", layers["shuffle_text"])):
        faults.append(fault)
    faults += unknown_settings(config, known | handed_on(config, ours), ours, dataset, model)
    faults += missing_files(config, dataset)
    for key in (f"{role}_config" for role, names in ROLES.items() if names in ours):
        if (file := config.external_config_dict.get(key)) and not Path(file).is_file():
            faults.append(f"{key}={file}: no such file. Set {key} to a yaml file, or leave it empty.")
    if faults:
        raise ValueError("\n".join(faults))


def unknown_settings(
    config: RecBoleConfig, known: set[str], ours: Mapping[str, Any], dataset: str, model: str
) -> list[str]:
    """Faults for keys that no layer declares, with a guess at what was meant.

    A key of the command line of somebody's own script is only a fault if it resembles a setting: the script may have flags
    of its own. `teacher_<key>` and the like belong to another model's Config, which checks them.
    """
    given = config.external_config_dict
    allowed = known | set(given.get("allow_keys") or [])
    prefixes = tuple(f"{role}_" for role, names in ROLES.items() if names in ours)
    own_argv = isinstance(config, Config)
    wrong = []
    for key in sorted(set(given) - allowed):
        if key.startswith(prefixes):
            continue
        close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.75)
        only_argv = key not in config.file_config_dict and key not in config.variable_config_dict
        if only_argv and not own_argv and not close:
            continue
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        wrong.append(f"  {key}={given[key]}{hint}")
    for role, names in ROLES.items():
        if names in ours:
            wrong += wrong_role_settings(config, role, given.get(names, ours[names]), dataset, known)
    if not wrong:
        return []
    count = f"{len(wrong)} setting{'s' if len(wrong) > 1 else ''}"
    return [f"{count} that {model} on {dataset} does not have:", *wrong]


ROLES = {"teacher": "teacher", "cloud": "cloud", "device": "device_model"}
"""Models that work for another one: the prefix of their settings, and the setting that names them."""
CHOICES = {
    "positions": ("auto", "all", "last"),
    "loss_over": ("all", "sampled", "gbce"),
    "loss_sampling": ("uniform", "popularity"),
    "seen_items": ("keep", "mask"),
}
"""What the settings that all models share may be."""


def handed_on(config: RecBoleConfig, ours: Mapping[str, Any]) -> set[str]:
    """Keys that belong to the data, not to a model, and are handed to whoever works for this one: the words of prompts."""
    keys: set[str] = set()
    for names in ROLES.values():
        if names in ours:
            name = config.external_config_dict.get(names, ours[names])
            keys |= {key for key in read_yaml(PROPERTIES / "model" / f"{name}.yaml") if key.startswith("prompt_")}
    return keys


def wrong_role_settings(config: RecBoleConfig, role: str, name: str, dataset: str, known: set[str]) -> list[str]:
    """Lines for `<role>_<key>` settings that the model in that role does not have; also for an unknown model."""
    choices = [*model_files(), *sequential_models()]
    if name not in choices:
        return [f"  {ROLES[role]}={name}: no such model{guess(name, choices)}"]
    declared = set(read_yaml(PROPERTIES / "model" / f"{name}.yaml")) | set(read_yaml(PROPERTIES / "overall.yaml"))
    declared |= set(read_yaml(recbole_yaml(name))) | {*training_arguments, *general_arguments, *dataset_arguments}
    declared |= {*evaluation_arguments, "loss_type"}
    declared.discard("shuffle_text")  # texts belong to the data, which all models of a run share
    names = {f"{role}_{inner}" for inner in declared} | {setting for setting in known if setting.startswith(f"{role}_")}
    wrong = []
    for key, value in config.external_config_dict.items():
        inner = key.removeprefix(f"{role}_")
        if key.startswith(f"{role}_") and key not in known and inner not in declared:
            close = difflib.get_close_matches(key, names, n=1, cutoff=0.8)
            wrong.append(f"  {key}={value}" + (f" (did you mean '{close[0]}'?)" if close else ""))
    return wrong


def unsuited(student: str) -> str | None:
    """Why one of RecBole's sequential models cannot be a student: it needs more than item sequences; None if it can."""
    if not (own := needs_more(student)):
        return None
    return (
        f"student={student}: it has {own} and takes more than item sequences, which cannot be distilled into. {SUITED}"
    )


def needs_more(model: str) -> str:
    """What one of RecBole's sequential models has, if it needs more than item sequences; empty if it does not."""
    import recbole.data.dataset
    import recbole.trainer

    homes = {"Dataset": recbole.data.dataset, "Trainer": recbole.trainer}
    own = [f"a {kind} of its own in RecBole" for kind, home in homes.items() if f"{model}{kind}" in vars(home)]
    if "selected_features" in read_yaml(recbole_yaml(model)):
        own.append("features of the items as input")
    return " and ".join(own)


SUITED = "Set student to SASRec, GRU4Rec, NARM, STAMP, Caser or LightSANs, say."


def missing_files(config: RecBoleConfig, dataset: str) -> list[str]:
    """A fault if the data set's files are not where RecBole will look; RecBole itself would try dead download links."""
    if dataset == "ml-100k":  # RecBole takes this one from inside its own package
        return []
    root = config.external_config_dict.get("data_path", config.internal_config_dict.get("data_path"))
    folder = Path(root) / dataset
    benchmark = config.external_config_dict.get("benchmark_filename")
    needed = [f"{dataset}.{part}.inter" for part in benchmark] if benchmark else [f"{dataset}.inter"]
    if all((folder / name).is_file() for name in needed):
        return []
    near = sorted(path.name for path in Path(root).glob("*") if path.is_dir()) if Path(root).is_dir() else []
    there = f"data sets there: {', '.join(near)}" if near else "there is no data set there"
    return [
        f"dataset={dataset}: no {' or '.join(needed)} in {folder}/; {there}. Put RecBole's atomic files {folder}/{dataset}.inter "
        f"(user_id:token, item_id:token, timestamp:float) and {folder}/{dataset}.item (item_id:token and a title column) there, "
        f"or set data_path to the folder that holds {dataset}/."
    ]


def role_config(
    config: RecBoleConfig, role: str, defaults: Mapping[str, Any] | None = None, fixed: Mapping[str, Any] | None = None
) -> Config:
    """The Config of a model that works for another one (`teacher`, `cloud`, `device`), from its own yaml and what is handed to it by
    prefix.

    `--teacher_learning_rate=1e-4` becomes its `learning_rate`; keys that the other model's yaml declares itself
    (`teacher_history`) keep their name. It shares data, protocol and machine, and inherits no training setting. Its seed is
    `<role>_seed`, where there is such a setting.

    Args:
        config: Of the model that it works for.
        role: One of `ROLES`.
        defaults: Settings that win over its yaml and lose to what is handed to it.
        fixed: Settings that win over all others.
    """
    name = config[ROLES[role]]
    declared = set(read_yaml(PROPERTIES / "model" / f"{name}.yaml")) | set(read_yaml(PROPERTIES / "overall.yaml"))
    own = set(read_yaml(PROPERTIES / "model" / f"{config['model']}.yaml"))
    settings = {key: value for key, value in config.final_config_dict.items() if key in SHARED}
    if config["dataset"] == "ml-100k":
        settings.pop("data_path", None)
    elif "data_path" in settings:  # RecBole has joined the data set's name to it
        settings["data_path"] = str(Path(settings["data_path"]).parent)
    file = config[f"{role}_config"]
    of_file = read_yaml(Path(file)) if file else {}
    settings |= {key: value for key, value in (defaults or {}).items() if key not in of_file}
    settings |= {key: config[key] for key in own & declared if key.startswith(f"{role}_") and config[key] is not None}
    for key, value in config.external_config_dict.items():
        if key.startswith(f"{role}_") and key not in own:
            settings[key.removeprefix(f"{role}_")] = value
    settings |= {
        key: value
        for key, value in config.external_config_dict.items()
        if key in declared and key.startswith("prompt_")
    }
    if f"{role}_seed" in own:
        settings["seed"] = config[f"{role}_seed"]
        if "teacher_seed" in declared:
            settings["teacher_seed"] = config[f"{role}_seed"]
    settings.setdefault("show_progress", config["show_progress"])
    return Config(name, config["dataset"], [file] if file else None, settings | dict(fixed or {}), read_argv=False)


def shared(config: Mapping[str, Any], key: str) -> Any:
    """A setting of `overall.yaml`; under RecBole's own Config, which knows no such layer, its default there.

    Raises:
        ValueError: The value is none of its choices, which RecBole's own Config does not check.
    """
    value = _overall()[key] if config[key] is None else config[key]
    return choice({key: value}, key, CHOICES[key]) if key in CHOICES else value


@functools.cache
def _overall() -> dict[str, Any]:
    return read_yaml(PROPERTIES / "overall.yaml")


def choice(config: RecBoleConfig, key: str, allowed: Iterable[str]) -> str:
    """The value of `key`, refused if it is none of `allowed`.

    Raises:
        ValueError: Names the key, its value and what there is instead.
    """
    value, allowed = config[key], list(allowed)
    if value not in allowed:
        raise ValueError(no_such_choice(key, value, allowed))
    return value


def check_range(config: Mapping[str, Any], key: str, least: float, most: float | None = None) -> None:
    """Refuse a number outside of what a setting may be; where `least` is whole, so must the number be.

    Raises:
        ValueError: Names the key, its value and what there is instead.
    """
    value = config[key]
    whole = isinstance(least, int)
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not fits or value < least or most is not None and value > most:
        kind = "whole numbers" if whole else "numbers"
        upwards = "upwards" if most is None else f"to {most}"
        raise ValueError(f"{key}={value}: not possible; there is {kind} from {least} {upwards}. Set {key}.")


def no_such_choice(key: str, value: Any, allowed: Iterable[str]) -> str:
    """What to tell whoever set `key` to something that is none of `allowed`."""
    return f"{key}={value}: no such choice{guess(value, allowed)} There is {', '.join(map(str, allowed))}. Set {key}."


def guess(name: Any, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` if something close is known, else a full stop."""
    by_lower = {str(item).lower(): item for item in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean '{by_lower[close[0]]}'?" if close else "."


def recbole_yaml(name: str) -> Path:
    """Where RecBole keeps the yaml of one of its models."""
    return Path(sys.modules["recbole"].__file__).parent / "properties" / "model" / f"{name}.yaml"


def sequential_models() -> list[str]:
    """Names of RecBole's sequential models, without importing them."""
    folder = Path(sys.modules["recbole"].__file__).parent / "model" / "sequential_recommender"
    files = {path.stem for path in folder.glob("*.py")}
    return sorted(path.stem for path in recbole_yaml("x").parent.glob("*.yaml") if path.stem.lower() in files)


def check_topk(config: RecBoleConfig, n_items: int) -> None:
    """Shrink our own default cut-offs to a small catalogue; refuse those that the user set.

    Args:
        config: Any Config.
        n_items: Number of items, RecBole's padding id included.

    Raises:
        ValueError: A `topk` or `distill_topk` that the user set is larger than the catalogue.
    """
    largest = n_items - 1
    given = config.external_config_dict
    for key in ("topk", "distill_topk"):
        value = config[key]
        if value is None or (most := max(value) if isinstance(value, list | tuple) else value) <= largest:
            continue
        if key in given:
            raise ValueError(
                f"{key}={value}: more than the catalogue holds; there are {largest} items. Set {key} to {largest} or less."
            )
        config[key] = (
            sorted({min(k, largest) for k in value}) if isinstance(value, list | tuple) else min(most, largest)
        )
    metric, _, cut = str(config["valid_metric"]).partition("@")
    if cut and int(cut) not in config["topk"] and config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        if "valid_metric" in given:
            raise ValueError(
                f"valid_metric={config['valid_metric']}: not among topk={config['topk']}. Set topk or valid_metric."
            )
        config["valid_metric"] = f"{metric}@{min(config['topk'], key=lambda k: abs(k - int(cut)))}"
