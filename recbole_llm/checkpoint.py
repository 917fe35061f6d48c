"""What a trained model, and a training under way, look like on disk: safetensors and JSON, whole or not at all.

A checkpoint is `<name>.safetensors` (the model's state) and `<name>.json` (settings as a plain dict, item tokens,
score). The header of the first repeats the second, so a pair of which only one file was written yet is never mixed. The
state of a training is one file beside it, `<name>.resume.safetensors`, with everything that is no tensor in its header.
"""

import copy
import json
import os
import random
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import recbole
import torch
from recbole.config import Config as RecBoleConfig
from recbole.utils import EvaluatorType, InputType, ModelType, get_model
from safetensors import safe_open
from torch import Tensor, nn

from recbole_llm.artifacts import (
    DamagedArtifact,
    plain,
    read_json,
    read_tensors,
    tensors_digest,
    write_json,
    write_tensors,
)
from recbole_llm.item_text import ItemText

SUFFIX = ".safetensors"
_OTHER = "other_parameter."
_ENUMS = {"MODEL_TYPE": ModelType, "MODEL_INPUT_TYPE": InputType, "eval_type": EvaluatorType}
# Found out anew on the machine that reads the settings.
_OF_THE_MACHINE = ("device", "single_spec", "local_rank")


def is_ours(path: str | Path) -> bool:
    """Whether a checkpoint's name says that this package wrote it; RecBole's end in `.pth`."""
    return str(path).endswith(SUFFIX)


def write_checkpoint(path: str | Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a model's state as `<name>.safetensors` and what belongs to it as `<name>.json`.

    Args:
        path: File name ending in `.safetensors`.
        state_dict: The model's state.
        meta: JSON-able; has at least `settings` (from `settings_of`) for `read_checkpoint`. `weights`, a digest of the
            state, is added.
    """
    meta = plain(meta) | {"weights": tensors_digest(state_dict)}
    write_tensors(path, state_dict, {"meta": json.dumps(meta, ensure_ascii=False)})
    write_json(_json_file(path), meta)


def read_weights(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint's state and what belongs to it.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        DamagedArtifact: It is not whole.
    """
    state, meta = read_tensors(path, device), _header(path, "meta")
    beside = _json_file(path)
    if beside.exists():
        written = read_json(beside)
        # the readable file may have been edited, such as for moved data; one of another save is left alone
        if written.get("weights") == meta["weights"]:
            meta = written
    return state, meta


def read_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint in the form that RecBole's own functions expect of a loaded file.

    Returns:
        `config` (a RecBole Config), `epoch`, `cur_step`, `best_valid_score`, `state_dict`, `other_parameter`; and
        `meta`, the whole JSON.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        DamagedArtifact: It is not whole.
    """
    state, meta = read_weights(path, device)
    state, other = split_other_parameter(state, meta)
    return {
        "config": config_from_settings(meta["settings"], meta.get("external")),
        "epoch": meta["epoch"],
        "cur_step": meta["cur_step"],
        "best_valid_score": meta["best_valid_score"],
        "state_dict": state,
        "other_parameter": other,
        "meta": meta,
    }


def other_parameter(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What RecBole models name to be saved beside their state: tensors under a prefix, and plain values.

    Modules among them are part of the state already.

    Raises:
        TypeError: The value is of a kind that only pickle could keep.
    """
    tensors, values = {}, {}
    for name, value in model.other_parameter().items():
        if isinstance(value, Tensor):
            tensors[_OTHER + name] = value
        elif value is None or isinstance(value, bool | int | float | str | list | dict):
            values[name] = value
        elif not isinstance(value, nn.Module):
            raise TypeError(
                f"model={type(model).__name__}: its '{name}' is a {type(value).__name__}, which is no tensor; "
                "this package keeps tensors and plain values. Train this model with RecBole's own Trainer."
            )
    return tensors, values


def split_other_parameter(state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> tuple[dict, dict]:
    """Undo `other_parameter`: the state alone, and the other parameters by name."""
    other = {name.removeprefix(_OTHER): value for name, value in state.items() if name.startswith(_OTHER)}
    alone = {name: value for name, value in state.items() if not name.startswith(_OTHER)}
    return alone, other | (meta.get("other_parameter") or {})


def settings_of(config: RecBoleConfig) -> dict[str, Any]:
    """A Config's final settings as plain values; enums by name, nothing that belongs to this machine alone."""
    settings = {}
    for key, value in config.final_config_dict.items():
        if key not in _OF_THE_MACHINE:
            settings[key] = value.name if isinstance(value, Enum) else plain(value)
    return settings


def config_from_settings(settings: Mapping[str, Any], external: Mapping[str, Any] | None = None) -> RecBoleConfig:
    """A RecBole Config of exactly these settings; neither the command line nor any yaml file is read.

    Args:
        settings: From `settings_of`, possibly by way of JSON.
        external: Those that the user had set, for code that asks what was set and what is a default.
    """
    config = RecBoleConfig.__new__(RecBoleConfig)
    config.compatibility_settings()
    config._init_parameters_category()
    config.yaml_loader = config._build_yaml_loader()
    config.file_config_dict, config.cmd_config_dict, config.internal_config_dict = {}, {}, {}
    config.variable_config_dict = copy.deepcopy(dict(external or {}))
    config.external_config_dict = dict(config.variable_config_dict)
    final = copy.deepcopy({key: value for key, value in settings.items() if key not in _OF_THE_MACHINE})
    for key, kind in _ENUMS.items():
        if isinstance(final.get(key), str):
            final[key] = kind[final[key]]
    if final["dataset"] == "ml-100k":  # inside the recbole package, wherever that is now
        final["data_path"] = os.path.join(os.path.dirname(recbole.__file__), "dataset_example", "ml-100k")
    config.final_config_dict = final
    config.model, config.dataset = final["model"], final["dataset"]
    try:
        config.model_class = get_model(config.model)
    except (ValueError, AttributeError, ImportError):
        config.model_class = None  # given as a class of the user's own; they build the model themselves
    config._init_device()
    return config


def catalogue(dataset: Any) -> dict[str, Any]:
    """What `recommend` needs to answer without data: item tokens and titles by internal id, number of users."""
    field = dataset.config["title_field"]
    loaded = field and dataset.item_feat is not None and field in dataset.item_feat
    return {
        "items": [str(token) for token in dataset.field2id_token[dataset.iid_field]],
        "titles": ItemText.from_dataset(dataset, field, shuffled=False).titles if loaded else [],
        "n_users": dataset.user_num,
    }


def free_name(folder: Path, name: str) -> str:
    """The name of a checkpoint that is not taken: RecBole's time stamp has seconds only."""
    path, number = folder / f"{name}{SUFFIX}", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}{SUFFIX}"
    return str(path)


def resume_file(path: str | Path) -> Path:
    """Where the state of the training that writes the checkpoint `path` is kept."""
    path = Path(path)
    return path.with_name(path.name.removesuffix(SUFFIX) + ".resume" + SUFFIX)


def write_resume(path: str | Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write the state of the training that writes the checkpoint `path`, as one file."""
    write_tensors(resume_file(path), tensors, {"values": json.dumps(plain(values))})


def read_resume(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_resume` wrote for the checkpoint `path`.

    Raises:
        FileNotFoundError: There is none; the message says where it was looked for.
        DamagedArtifact: It is not whole.
    """
    file = resume_file(path)
    if not file.exists():
        raise FileNotFoundError(
            f"resume_checkpoint({str(path)!r}): no {file.name} beside it, so the optimizer and the random numbers are "
            "unknown; it is written during fit(saved=True). Evaluate with model_file=..., or train anew."
        )
    return read_tensors(file), _header(file, "values")


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as named tensors, and all that is no tensor."""
    state, tensors, scalars = optimizer.state_dict(), {}, {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                scalars[f"{index}.{name}"] = value
    return tensors, {"groups": state["param_groups"], "scalars": scalars}


def unpack_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Undo `pack_optimizer` into an optimizer of the same kind over the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *values["scalars"].items()]:
        index, slot = name.split(".", 1)
        state.setdefault(int(index), {})[slot] = value
    groups = [
        # what an older state does not know stays as it is now
        {key: value for key, value in now.items() if key != "params"}
        | {key: tuple(value) if isinstance(now.get(key), tuple) else value for key, value in group.items()}
        for group, now in zip(values["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of the global generators of Python, numpy, torch and (where there is one) every GPU."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{device}": state for device, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, keys.tolist(), position, has_gauss, cached]}


def set_random_state(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Undo `random_state`; GPUs that this machine does not have are left out."""
    torch.set_rng_state(tensors["torch"])
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{device}" in tensors:
            torch.cuda.set_rng_state(tensors[f"cuda.{device}"], device)
    version, numbers, gauss = values["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def under(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """Entries with a prefix and a dot before their names."""
    return {f"{prefix}.{name}": value for name, value in named.items()}


def within(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that `under(prefix, ...)` made, under their own names again."""
    return {name[len(prefix) + 1 :]: value for name, value in named.items() if name.startswith(f"{prefix}.")}


def _json_file(path: str | Path) -> Path:
    return Path(str(path).removesuffix(SUFFIX) + ".json")


def _header(path: str | Path, key: str) -> dict[str, Any]:
    """A JSON value in the header of a safetensors file."""
    with safe_open(str(path), framework="pt") as file:
        text = (file.metadata() or {}).get(key)
    if text is None:
        raise DamagedArtifact(
            f"{path}: no '{key}' in its header, so it is no file of this package's trainer; delete it."
        )
    return json.loads(text)
