"""What a run is going to do, and about how long that takes on this machine, said before the long part begins.

Estimates rest on counted multiplications and a quick measurement of how many this machine does in a second; they are meant
to tell minutes from hours. Where they alone are asked for, labelling by a prompted LLM is rehearsed instead of counted.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from recbole.utils import get_model

from recbole_llm import knowledge, rehearsal, teacher
from recbole_llm.counting import Counting, combinations
from recbole_llm.model.dllm2rec import Distillation
from recbole_llm.model.lsc4rec import cloud_config, device_config
from recbole_llm.terms import Collaboration
from recbole_llm.timeline import Timeline

# Speed of each kind of work, as a share of a plain matrix product's, measured on two CPU cores with SmolLM2-135M and SASRec; over
# 1 where counted work is left out (gradients of frozen weights, the output layer at the prompt's positions).
TRAIN_LLM, WRITE_LLM, READ_LLM, TRAIN_STUDENT = 1.3, 0.7, 1.6, 0.3
PROMPT_TOKENS, TITLE_TOKENS = 150, 12
HOW = "  Times that are not said to be measured are counted multiplications over the speed of a matrix product here, just measured."
RANKED = 4e7  # scores of a counting model that are made, ranked and evaluated in a second
USUAL_EPOCHS = 25  # where early stopping usually ends a student
T5_SIZES = {"t5-small": 6e7, "t5-base": 2.2e8, "t5-large": 7.7e8}


@dataclass
class Step:
    """One stage of a run.

    Args:
        what: What is done.
        seconds: About how long it takes; None where it is taken from a file.
        measured: What was measured for it.
        kept: Folder of what it makes, where other runs find it, too; None for what is this run's alone.
    """

    what: str
    seconds: float | None
    measured: rehearsal.Rehearsal | None = None
    kept: Path | None = None


def keeping(folder: Path, stages: list[Step]) -> list[Step]:
    """Stages whose work is kept in a folder for other runs."""
    return [replace(stage, kept=folder) for stage in stages]


def steps(config: Any, data: Any, measure: bool = False, alone: bool = True) -> list[Step]:
    """The stages of a run.

    Args:
        config: Our Config.
        data: RecBole's training, validation and test loaders.
        measure: Whether labelling by a prompted LLM is tried out for half a minute, not counted.
        alone: Whether the student alone is trained beside the distilled one.
    """
    train_data, test_data = data.train, data.test
    rate = multiplications_per_second()
    targets = len(train_data._dataset)
    if config["cloud"]:
        return collaborating(config, train_data, rate)
    if config["llm"] and config["prompt_lead"]:  # an LLM that is prompted; other models are trained whole
        count = _some(config["teacher_eval_rows"], len(test_data._dataset))
        return [*tuning(config, targets, rate), writing("Test the LLM", config["llm"], count, rate)]
    if not config["student"] or config["distill_mode"] == "off":
        items = train_data._dataset.item_num
        name = config["student"] or config["model"]
        return [training(config, name, targets, items, rate), *refining(config, targets, items, rate)]
    plan = []
    if config["teacher_knowledge"]:
        plan.append(Step(f"Take the Knowledge from {config['teacher_knowledge']}", None))
    elif Distillation.from_config(config).asks_teacher(config):
        plan += teaching(config, data, rate, measure)
    for how in ("alone", "distilled") if alone else ("distilled",):
        plan.append(training(config, f"{config['student']} {how}", targets, train_data._dataset.item_num, rate))
    return plan


def teaching(config: Any, data: Any, rate: float, measure: bool) -> list[Step]:
    """Stages of the teacher: tuning, labelling, testing; those that are on disk take no time."""
    train_data, test_rows = data.train, len(data.test._dataset)
    request = knowledge.Request.of(config, train_data._dataset)
    if request.exists:
        return [Step(f"Take the Knowledge from {request.folder}", None)]
    name, targets = config["teacher"], len(train_data._dataset)
    rows = _some(config["teacher_rows"], targets)
    if not request.config["prompt_lead"]:
        return teaching_by_model(config, request, train_data._dataset, rate)
    tuned = request.checkpoint or teacher.is_ready(request.teacher_folder)
    first = [Step(f"Take the tuned {name} from {request.checkpoint or request.teacher_folder}", None)]
    llm, tested = request.config["llm"], _some(config["teacher_eval_rows"], test_rows)
    titles = train_data._dataset.item_num
    labelling = writing(f"{name} labels {rows} of {targets} training rows", llm, rows, rate)
    testing = writing(f"{name} is tested on {tested} of {test_rows} test rows", llm, tested, rate)
    if measure and (found := rehearsal.rehearse(config, request, data)):
        labelling = Step(labelling.what, found.whole.seconds, found)
        testing = Step(testing.what, found.seconds_of(tested))
    return [
        *(first if tuned else keeping(request.teacher_folder, tuning(request.config, targets, rate))),
        *keeping(
            request.folder,
            [
                Step(
                    f"Embed {titles} titles with {llm}", titles * TITLE_TOKENS * 2 * parameters(llm) / (rate * READ_LLM)
                ),
                labelling,
                testing,
            ],
        ),
    ]


def teaching_by_model(config: Any, request: knowledge.Request, dataset: Any, rate: float) -> list[Step]:
    """Stages of a teacher that is trained on the log: training, again for every fold, labelling."""
    own, name, targets, items = request.config, config["teacher"], len(dataset), dataset.item_num
    plan = []
    if request.checkpoint or teacher.is_ready(request.teacher_folder):
        plan.append(Step(f"Take the trained {name} from {request.checkpoint or request.teacher_folder}", None))
    else:
        made = [training(own, f"{name} (teacher)", targets, items, rate), *refining(own, targets, items, rate)]
        plan += keeping(request.teacher_folder, made)
    if folds := config["teacher_folds"]:
        parts = [part for _, part in knowledge.fold_parts(config, dataset)]
        folders = {teacher.folder_of(own, part): len(part) for part in parts}
        missing = {folder: rows for folder, rows in folders.items() if not teacher.is_ready(folder)}
        for folder, part in missing.items():
            made = training(own, f"{name} (teacher of one of {folds} folds)", part, items, rate)
            plan += keeping(folder, [made, *refining(own, part, items, rate)])
        if not missing:
            plan.append(Step(f"Take the trained teachers of {folds} folds", None))
    whole = not own["p5_history"] and own["lite_rec_mask"] != "bidirectional"  # whether one pass may label all rows
    asked = 0 if whole and "teacher_rows" not in config.external_config_dict else config["teacher_rows"]
    rows = _some(asked, targets)
    # one look forward costs a third of a step of training, and a search is many looks
    looks = own["p5_beams"] if own["p5_history"] else 1
    upto = "" if own["lite_head"] or own["p5_history"] else "up to "  # of RecBole's models a check decides
    seconds = looks * epoch_seconds(own, rows, items, rate) / 3
    labelling = Step(f"{name} labels {upto}{rows} of {targets} training rows", seconds)
    return [*plan, *keeping(request.folder, [labelling])]


def collaborating(config: Any, train_data: Any, rate: float) -> list[Step]:
    """Stages of LSC4Rec: the cloud, its lists, the phases of the device; the cloud takes no time if it is on disk."""
    settings = Collaboration.from_config(config)
    timeline = Timeline.of(train_data._dataset, settings.steps)
    own, targets, items = cloud_config(config), len(timeline.train), timeline.log.n_items
    users = min(settings.users or len(timeline.users), len(timeline.users))
    views = users * (settings.steps + settings.lag + 4)
    trains_on_lists = "cooperative" in settings.phases and settings.list_cloud > 0
    rows = min(targets, settings.list_rows or targets) * trains_on_lists
    history = timeline.split(timeline.train)
    plan = []
    folder = teacher.folder_of(own, history)
    if config["cloud_checkpoint"] or teacher.is_ready(folder):
        plan.append(Step(f"Take the trained {config['cloud']} from its folder", None))
    elif own["prompt_lead"]:
        plan += tuning(own, targets, rate)
    else:
        plan += [
            training(own, f"{config['cloud']} (cloud)", targets, items, rate),
            *refining(own, targets, items, rate),
        ]
    if own["prompt_lead"]:
        plan.append(writing(f"{config['cloud']} gives {rows + views} lists", own["llm"], rows + views, rate))
    else:
        # a view is read on its own: as much work as a window of targets, a third of it without a gradient
        seconds = epoch_seconds(own, rows, items, rate) / 3
        seconds += epoch_seconds(own, views * own["MAX_ITEM_LIST_LENGTH"], 0, rate) / 3
        plan.append(
            Step(
                f"{config['cloud']} gives lists for {rows} historical rows and {views} views of {users} users",
                seconds,
            )
        )
    plan = keeping(folder, plan)
    device = device_config(config)
    for phase in settings.phases:
        many = len(timeline.real_time.flatten()) if phase == "retrain" else targets
        epochs = min(getattr(settings, f"{phase}_epochs"), USUAL_EPOCHS)
        what = f"Train {config['device_model']} on the device, phase {phase}, on {many} targets, about {epochs} epochs"
        plan.append(Step(what, epochs * epoch_seconds(device, many, items, rate)))
    return plan


def refining(config: Any, targets: int, items: int, rate: float) -> list[Step]:
    """Phase B of Lite-LLM4Rec, if it has one: every item of a batch is read anew, forwards, backwards and forwards again."""
    if config["lite_item_train"] in (None, "frozen") or config["lite_share_backbones"]:
        return []
    width, layers = size_of_llm(config, "llm")
    epochs = config["lite_unfreeze_epochs"]
    read = min(items, config["train_batch_size"]) * targets / config["train_batch_size"] * TITLE_TOKENS
    work = read * 8 * 12 * layers * width**2 / (rate * TRAIN_LLM)
    what = f"Train its Item LLM, too ({config['lite_item_train']}), at most {epochs} epochs"
    return [Step(what, epochs * (epoch_seconds(config, targets, items, rate) + work))]


def mixing(choices: int, valid_rows: int, test_rows: int, items: int) -> Step:
    """The stage of adding up two models' scores: every choice on all validation rows, the best one on the test rows."""
    return Step("Add up the scores of two models", (choices * valid_rows + test_rows) * items / RANKED)


def epochs_of(config: Any) -> int:
    """As many epochs as are usual."""
    return min(config["epochs"], USUAL_EPOCHS)


def tuning(config: Any, targets: int, rate: float) -> list[Step]:
    """The stage of LoRA-tuning an LLM, at most all epochs."""
    rows = _some(config["train_rows"], targets)
    work = rows * config["epochs"] * (PROMPT_TOKENS + TITLE_TOKENS) * 4 * parameters(config["llm"])
    what = f"Tune {config['llm']} with LoRA on {rows} rows, at most {config['epochs']} epochs"
    return [Step(what, work / (rate * TRAIN_LLM))]


def writing(what: str, llm: str, rows: int, rate: float) -> Step:
    """A stage in which an LLM writes a title for each of some rows."""
    # reading a prompt is one large product, writing a token moves all weights for a few rows
    # and the beginning that all prompts share, about a third, is read once
    work = rows * 2 * parameters(llm) * (PROMPT_TOKENS * 2 / 3 / READ_LLM + TITLE_TOKENS / WRITE_LLM)
    return Step(what, work / rate)


def training(config: Any, name: str, targets: int, n_items: int, rate: float) -> Step:
    """The stage of training a small sequential model, with as many epochs as are usual; or of counting one, combination by combination."""
    if issubclass(get_model(config["model"]), Counting):
        tried, rows = combinations(config), min(targets, config["counting_valid_rows"] or targets)
        what = f"Count {name} on {targets} targets, {tried} combinations of settings, each on validation rows"
        return Step(what, tried * rows * n_items / RANKED)
    epochs = epochs_of(config)
    rows = min(targets, config["p5_train_rows"] or targets)
    what = f"Train {name} on {targets} targets, about {epochs} epochs until early stopping"
    return Step(what, epochs * epoch_seconds(config, rows, n_items, rate))


def epoch_seconds(config: Any, targets: int, n_items: int, rate: float) -> float:
    """How long such a model is trained on some targets, each once."""
    width, layers = size(config)
    work = targets * 6 * ((config["lite_head_width"] or width) * n_items + layers * 12 * width * width)
    if config["p5_history"]:  # its encoder reads a whole history, in about two pieces per item, for every target
        weights = parameters(config["llm"]) if config["llm"] else 12 * config["p5_layers"] * config["p5_width"] ** 2
        work = targets * 6 * 2 * config["p5_history"] * weights
    return work / (rate * TRAIN_STUDENT)


def size(config: Any) -> tuple[int, int]:
    """Width and layers of what reads the histories."""
    if not config["lite_head"]:
        width = config["hidden_size"] or config["embedding_size"] or 64
        return width, config["n_layers"] or config["num_layers"] or 1
    width, layers = size_of_llm(config, "lite_rec_llm" if config["lite_rec_llm"] else "llm")
    return width, config["lite_rec_layers"] or layers


def size_of_llm(config: Any, key: str) -> tuple[int, int]:
    """Width and layers of the language model that a setting names; those of a small encoder if it is not on this machine yet."""
    from recbole_llm.backbone import configuration, text_config  # rule: only runs that train an LLM import its library
    from recbole_llm.pretrained import find_local

    folder = find_local(config[key], config["llm_revision"] if key == "llm" else None, key)
    if folder is None:
        return 384, 6
    network = text_config(configuration(folder))
    return network.hidden_size, network.num_hidden_layers


def parameters(llm: str) -> float:
    """Size of a language model as its name says it (`...-135M-...`, `t5-small`); a billion if it does not."""
    found = re.search(r"(\d+(?:\.\d+)?)\s*([mMbB])(?![a-zA-Z])", llm)
    if not found:
        return next((size for name, size in T5_SIZES.items() if name in llm.lower()), 1e9)
    return float(found[1]) * (1e6 if found[2] in "mM" else 1e9)


def multiplications_per_second(width: int = 1024, repeats: int = 8) -> float:
    """How many operations (multiplications and additions) a matrix product does here in a second, at best."""
    a, b = torch.rand(width, width), torch.rand(width, width)
    shortest = float("inf")
    for _ in range(repeats):
        began = perf_counter()
        torch.mm(a, b)
        shortest = min(shortest, perf_counter() - began)
    return 2 * width**3 / shortest


def text(plan: list[Step]) -> str:
    """The plan as it is printed."""
    total, lines = sum(step.seconds or 0 for step in plan), []
    for step in plan:
        lines.append(f"  {step.what}: {'already there' if step.seconds is None else 'about ' + spoken(step.seconds)}")
        if step.measured:
            lines.append(f"    {step.measured.text()}")
    lines.append(f"  In all about {spoken(total)}.")
    return "\n".join(["This run is going to:", *lines, HOW])


def spoken(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _some(count: int, there: int) -> int:
    return min(count, there) if count else there
