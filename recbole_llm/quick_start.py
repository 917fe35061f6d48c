"""The order of events of a run: settings, data, plan, teacher, Knowledge, student alone, distilled student, table."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from recbole.data import data_preparation
from recbole.utils import get_model, init_logger, init_seed
from recbole.utils.logger import RemoveColorFilter

from recbole_llm import folds, knowledge, plan, report, teacher
from recbole_llm.artifacts import DamagedArtifact, digest, file_digest, read_metadata, write_json, write_tensors
from recbole_llm.checkpoint import settings_of
from recbole_llm.config import Config, check_topk, role_config
from recbole_llm.dataset import create_dataset, share_of_ties
from recbole_llm.evaluation import TopLists
from recbole_llm.identity import model_folders
from recbole_llm.item_text import check_quotes
from recbole_llm.loaders import eval_loader
from recbole_llm.model.dllm2rec import Distillation
from recbole_llm.peak import Peak
from recbole_llm.processes import PartDone, held, only_the_first, place
from recbole_llm.terms import AFTER_TRAINING
from recbole_llm.trainer import SequenceTrainer, trainer_class

LISTS = "lists.safetensors"
"""A model's best items of every test row, beside its metrics."""
# Settings that change what is printed or where it runs, but not what comes out.
NOT_IDENTITY = {
    "show_progress", "resume", "checkpoint_dir", "state", "gpu_id", "use_gpu", "config_files", "config_file_list", "data_path",
    "log_wandb", "wandb_project", "allow_keys", "device", "distill_modes", "save_dataset", "save_dataloaders", "device_settings",
    "teacher_shard", "keep_lists",
    "MASK_INDEX", "MASK_ITEM_SEQ", "POS_ITEMS", "NEG_ITEMS",  # RecBole's loader for BERT4Rec writes them into the Config
}  # fmt: skip


def run_recbole_llm(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: list[str] | None = None,
    config_dict: dict[str, Any] | None = None,
    estimate: bool = False,
    read_argv: bool = False,
    alone: bool = True,
) -> dict[str, Any]:
    """Train and evaluate a model, with everything that it needs before; like RecBole's `run_recbole`, but resumable.

    Args:
        model: Any model of this package or any sequential model of RecBole.
        dataset: Name of the data set.
        config_file_list: Yaml files, later ones win.
        config_dict: Settings that win over the files.
        estimate: Whether to stop after the plan and its estimated time, of which labelling by a prompted LLM is measured.
        read_argv: Whether the command line is read, too (the command does).
        alone: Whether a distilled student is shown beside the same student alone; a benchmark has that as a row of its own.

    Returns:
        RecBole's `best_valid_score`, `valid_score_bigger`, `best_valid_result` and `test_result` of the model, and `table` (text),
        `lines` (of the table), `folder` (of the run). A process that labels a part of the rows only (`teacher_shard`, or any but the
        first of a launcher) returns `folder` and `part`, which says what it did and what is left.

    Raises:
        ValueError: The settings are wrong; the message lists every fault.
    """
    config = Config(model, dataset, config_file_list, config_dict, read_argv)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    # RecBole's own code warns of what the libraries below it will drop; nothing that a user could act on
    warnings.filterwarnings("ignore", module=r"recbole\.")
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    logger = logging.getLogger()
    folder = run_folder(config)
    with log_into(folder, config["state"]):
        logger.info(f"{config['model']} on {config['dataset']}; everything about this run is in {folder}/")
        data = load_data(config)
        steps = plan.steps(config, data, measure=estimate and place()[0] == 0, alone=alone)
        logger.info(plan.text(steps))
        if estimate:
            return {"plan": steps, "folder": str(folder)}
        refuse_early(config, data)
        try:
            lines, more = worked(config, data, alone)
        except PartDone as done:
            logger.warning(done)
            return {"part": str(done), "folder": str(folder)}
        return conclude(config, folder, lines, data.ties, more)


class Data(NamedTuple):
    """RecBole's three loaders, and the share of interactions whose time another one of the same user has, too; nan without times."""

    train: Any
    valid: Any
    test: Any
    ties: float


def load_data(config: Config) -> Data:
    """Read and split the data as RecBole does, and count what a reader of the results has to know."""
    if config["dataset"] != "ml-100k":
        for file in Path(config["data_path"]).glob(f"{config['dataset']}.i*"):
            check_quotes(file, config["field_separator"], config["encoding"] or "utf-8")
    dataset = create_dataset(config)
    check_topk(config, dataset.item_num)
    logging.getLogger().info(dataset)
    single = int((dataset.inter_feat[dataset.uid_field].value_counts() == 1).sum())
    if single:
        logging.getLogger().warning(f"{single} users have one interaction only: there is nothing to predict for them.")
    ties = share_of_ties(dataset.inter_feat, dataset.uid_field, dataset.time_field)
    return Data(*data_preparation(config, dataset), ties)


def refuse_early(config: Config, data: Data) -> None:
    """Build every model and trainer of the run once, so that what they refuse is said before any work, not after the teacher's.

    Raises:
        ValueError: A setting, a student or a teacher cannot work.
    """
    models = [config]
    if has_teacher(config):
        request = knowledge.Request.of(config, data.train._dataset)
        # what the teacher said and how it ranks may be there already; then it is not built, and no LLM library is imported
        if not (config["resume"] and request.exists and finished(teacher_line_folder(config, request))):
            models.append(request.config)
    for each in models:
        model = get_model(each["model"])(each, data.train._dataset).to(each["device"])
        if not issubclass(trainer_class(each), SequenceTrainer):
            raise ValueError(
                f"model={each['model']}: it has a trainer of its own, or is no sequential model; this runner trains RecBole's sequential "
                "models and ours. Run it with RecBole's run_recbole, which `import recbole_llm` leaves as it is."
            )
        if each is not config and config["student"]:
            refuse_teacher(config, model, data)
        trainer = trainer_class(each)(each, model)
        for part in (data.valid, data.test):
            trainer.refuse_early(part)
        # a cloud that is there already is not built, and no LLM library is imported
        if each["cloud"] and not trainer.cloud.file.is_file():
            models.append(trainer.cloud.config)


def refuse_teacher(config: Config, model: Any, data: Data) -> None:
    """Refuse a teacher that cannot give what the student's settings want of it. Raises: ValueError."""
    wanted = Distillation.from_config(config)
    if wanted.wants_vectors_of_teacher(config):
        teacher.refuse_without_vectors(model)
    if config["teacher_folds"]:
        folds.refuse_user_tables(model, data.train._dataset.user_num, config["teacher_folds"])
    elif wanted.uses_rows and config["teacher_trained_rows"] == "drop":
        teacher.refuse_memorised(model, len(data.train._dataset))


def worked(config: Config, data: Data, beside: bool = True) -> tuple[list[report.Line], str]:
    """Do all that a run is for: the lines of its table, and further tables as text.

    Args:
        config: The run's.
        data: Its loaders.
        beside: Whether the student alone stands beside a distilled one.

    Raises:
        PartDone: This process has labelled its part of the rows, and another one goes on.
    """
    if config["student"] and config["distill_mode"] != "off":
        return distillation(config, data, beside), ""
    only_the_first()
    if config["cloud"]:
        return collaboration(config, data)
    return [single(config, data, f"{config['student']} alone" if config["student"] else label(config["model"]))], ""


def distillation(config: Config, data: Data, beside: bool = True) -> list[report.Line]:
    """Teacher, Knowledge, the student alone (if it shall stand beside), the distilled student: the lines of DLLM2Rec's table."""
    known = knowledge.ensure(config, data.train, data.valid) if has_teacher(config) else None
    only_the_first()
    lines = [teacher_line(config, data, known)] if known else []
    if beside:
        lines.append(single(alone(config), data, f"{config['student']} alone"))
    lines.append(single(config, data, f"{config['student']} distilled"))
    return lines


def has_teacher(config: Config) -> bool:
    """Whether a run asks a teacher of its own, and has a line for it: not where a Knowledge is given, or text vectors are enough."""
    asks = config["student"] and Distillation.from_config(config).asks_teacher(config)
    return bool(asks and not config["teacher_knowledge"])


def teacher_line_folder(config: Config, request: knowledge.Request) -> Path:
    """Where the teacher's own test metrics are, or will be, under the run's protocol."""
    protocol = {key: config[key] for key in ("teacher_eval_rows", "topk", "metrics", "eval_args", "seen_items")}
    return request.folder / f"test-{digest(protocol)}"


def teacher_line(config: Config, data: Data, known: knowledge.Knowledge) -> report.Line:
    """The teacher's own test metrics, on its sample of test rows; from its folder if they are there."""
    train_data, valid_data, test_data = data.train, data.valid, data.test
    request = knowledge.Request.of(config, train_data._dataset)
    folder = teacher_line_folder(config, request)
    if config["resume"] and (line := finished(folder, config["keep_lists"])):
        return line
    trained = teacher.ready(request.config, train_data._dataset, valid_data, request.checkpoint)
    trainer = trainer_class(request.config)(request.config, trained)
    line, lists = evaluated(
        trainer,
        eval_loader(request.config, test_data),
        f"{label(config['teacher'])} (teacher)",
        False,
        config["keep_lists"],
    )
    made = known.manifest["provenance"].get("folds", [])
    seconds = [teacher.seconds_of(request.teacher_folder), *(fold["seconds"] for fold in made)]
    train = None if None in seconds else sum(seconds)
    line.seconds |= {"train": train, "label": known.manifest["seconds"]}
    line.notes["knowledge"] = {
        "tuned": request.config["train_rows"] or request.config["p5_train_rows"] or "all",
        "folds": len(made),
        "labelled": known.manifest["rows"],
        "training_rows": len(train_data._dataset),
        "folder": str(request.folder),
        "provenance": known.manifest["provenance"],
    }
    keep(line, lists, folder)
    return line


def alone(config: Config) -> Config:
    """The Config of the same student without a teacher, with the same base loss, windows and epochs."""
    chosen = Distillation.from_config(config)
    own = ("teacher", "distill_", "model", "dataset", "shuffle_text")  # it reads no texts
    settings = {key: value for key, value in config.external_config_dict.items() if not key.startswith(own)}
    settings |= {"distill_mode": "off", "distill_base": chosen.base, "distill_robust": chosen.robust}
    settings |= {"distill_robust_beta": chosen.robust_beta}
    return Config(config["model"], config["dataset"], None, settings, read_argv=False)


def single(config: Config, data: Data, name: str) -> report.Line:
    """Train and test one model; a finished run of the same settings is taken from its folder, a stopped one goes on.

    Where another process is at the same run, this one waits for it, and takes what it has made.
    """
    folder = run_folder(config)
    with held(folder / ".lock"):
        if config["resume"] and (line := finished(folder, config["keep_lists"])):
            return line
        known = finished(folder) if config["resume"] else None  # whose lists are not there, or too short
        with Peak() as peak:
            trainer, seconds = trained(config, data, name, folder)
            line, lists = evaluated(trainer, data.test, name, True, config["keep_lists"])
        line.seconds["train"] = known.seconds.get("train") if known else seconds
        line.notes["peak_mb"] = known.notes.get("peak_mb") if known else peak.megabytes
        line.valid = {key: float(value) for key, value in (trainer.best_valid_result or {}).items()}
        write_json(folder / "config.json", settings_of(config))
        keep(line, lists, folder)
        return line


def keep(line: report.Line, lists: TopLists | None, folder: Path) -> None:
    """Write a model's best items of every test row, if they were asked for, and then its line, which says that it is finished."""
    if lists is not None:
        write_tensors(folder / LISTS, lists.tensors(), {"k": str(lists.k)})
    line.save(folder)


def trained(config: Config, data: Data, name: str, folder: Path, stages: Path | None = None) -> tuple[Any, float]:
    """A trainer whose model is trained now, or from where it was stopped; and how many seconds that took in all processes.

    Args:
        config: The model's.
        data: What it is trained on.
        name: Of the model, in the log.
        folder: The run's.
        stages: Where stages of the training are kept, if not in the run's folder.
    """
    (folder / "metrics.json").unlink(missing_ok=True)  # until this training has ended, there is no result
    init_seed(config["seed"], config["reproducibility"])
    data.train.generator.manual_seed(config["seed"])  # a stage before may have drawn from it
    model = get_model(config["model"])(config, data.train._dataset).to(config["device"])
    trainer = trainer_class(config)(config, model)
    trainer.keep_in(folder, config["resume"], stages)
    logging.getLogger().info(f"{name}: training begins, {sum(p.numel() for p in model.parameters()):,} parameters.")
    trainer.fit(data.train, data.valid, show_progress=config["show_progress"])
    return trainer, trainer.seconds


def collaboration(config: Config, data: Data) -> tuple[list[report.Line], str]:
    """Cloud, device and both together: the lines of LSC4Rec's table, its own test under `lsc_policy` last; and the text of its account.

    A finished run is taken from its folder.
    """
    with held(run_folder(config) / ".lock"):
        return drawn_up(config, data, run_folder(config))


def drawn_up(config: Config, data: Data, folder: Path) -> tuple[list[report.Line], str]:
    """See `collaboration`; the folder is the run's, which no other process holds."""
    from recbole_llm.account import Account, Accountant
    from recbole_llm.pictures import draw_all

    line = finished(folder) if config["resume"] else None
    if line is not None and (folder / "account.json").is_file():
        account = Account.load(folder)
        return [*account.lines, line], account.text()
    trainer, seconds = trained(config, data, "LSC4Rec", folder, devices_folder(config))
    name = f"both (LSC4Rec), {config['lsc_policy']} at {config['lsc_rate']:.0%}"
    if config["lsc_evaluation"] == "stream":
        name += ", last step"
    line, _ = evaluated(trainer, data.test, name, load_best_model=True)
    line.seconds["train"] = seconds
    line.valid = {key: float(value) for key, value in trainer.best_valid_result.items()}
    began = perf_counter()
    account = Accountant(trainer).draw_up()
    logging.getLogger().info(f"The account took {perf_counter() - began:.0f} s.")
    account.save(folder)
    files = draw_all(account, folder)
    logging.getLogger().info(
        f"Pictures: {', '.join(str(file) for file in files if file.suffix == '.png')}, and as .html."
    )
    write_json(folder / "config.json", settings_of(config))
    line.save(folder)
    return [*account.lines, line], account.text()


def evaluated(
    trainer: Any, test_data: Any, name: str, load_best_model: bool, lists: int = 0
) -> tuple[report.Line, TopLists | None]:
    """Test metrics of a trainer's model as a line, and its best items of every row, if `lists` says how many."""
    began = perf_counter()
    with trainer.keeping_lists(lists) if lists else nullcontext() as kept:
        metrics = trainer.evaluate(
            test_data, load_best_model=load_best_model, show_progress=trainer.config["show_progress"]
        )
    line = report.Line(
        name, {key: float(value) for key, value in metrics.items()}, trainer.ranks, trainer.evaluated_rows
    )
    line.seconds["test"] = perf_counter() - began
    line.notes |= {"legality": trainer.legality} if hasattr(trainer, "legality") else {}
    line.notes |= {"weights": trainer.model.provenance()} if hasattr(trainer.model, "provenance") else {}
    line.notes |= {"choices": trainer.model.choices()} if hasattr(trainer.model, "choices") else {}
    return line, kept


def label(model: str) -> str:
    """What tables call a model."""
    return getattr(get_model(model), "label", None) or model


def finished(folder: Path, lists: int = 0) -> report.Line | None:
    """The line of a finished run, if its folder has one, and as long lists beside it as are asked for."""
    try:
        line = report.Line.load(folder)
        if lists and int(read_metadata(folder / LISTS).get("k", 0)) < lists:
            return None
    except (FileNotFoundError, DamagedArtifact):
        return None
    return line


def run_folder(config: Config) -> Path:
    """The folder of a run: named by all that shapes its outcome, so the same command finds it again."""
    name = config["student"] if config["distill_mode"] == "off" else config["model"]
    return Path(config["checkpoint_dir"]) / "runs" / f"{name}-{config['dataset']}-{digest(run_identity(config), 10)}"


def devices_folder(config: Config) -> Path:
    """The folder of LSC4Rec's device model: named by all that shapes its training, so runs that differ in what follows share it."""
    named = {key: value for key, value in run_identity(config).items() if key not in AFTER_TRAINING}
    return (
        Path(config["checkpoint_dir"]) / "devices" / f"{config['device_model']}-{config['dataset']}-{digest(named, 10)}"
    )


def run_identity(config: Config) -> dict[str, Any]:
    """All that shapes the outcome of a run.

    That is the settings, and the content of the data files, of language models that are folders, of a given Knowledge and teacher.
    """
    named = {key: value for key, value in settings_of(config).items() if key not in NOT_IDENTITY}
    if named.get("shuffle_text") is None:  # runs from before there was such a setting stay found
        named.pop("shuffle_text", None)
    files = sorted(Path(config["data_path"]).glob(f"{config['dataset']}.*"))
    if config["distill_mode"] == "off":
        chosen = Distillation.from_config(config)
        named = {key: value for key, value in named.items() if not key.startswith(("teacher", "distill_"))}
        named |= {"base": chosen.base, "robust": chosen.robust, "robust_beta": chosen.robust_beta}
    else:
        given = [Path(config["teacher_knowledge"] or "") / "manifest.json", Path(config["teacher_checkpoint"] or "")]
        files += [file for file in given if file.is_file()]
        if config["student"]:
            chosen = Distillation.from_config(config)
            named["distillation"] = vars(chosen)
            if has_teacher(config):
                named["taught by"] = teacher.identity(role_config(config, "teacher"), labelling=True)
    named["folders"] = model_folders(named)
    named["files"] = {file.name: file_digest(file) for file in files if file.is_file()}
    return named


@contextmanager
def log_into(folder: Path, level: str) -> Iterator[None]:
    """While this lasts, RecBole's log is also written into the run's folder.

    RecBole's `init_logger` sets no level where logging was set up before (a notebook, a test runner), so it is set here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = logging.getLogger().level
    logging.getLogger().setLevel((level or "info").upper())
    handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(RemoveColorFilter())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(before)
        handler.close()


def conclude(config: Config, folder: Path, lines: list[report.Line], ties: float, more: str = "") -> dict[str, Any]:
    """Print the table, write the run's folder, and return what RecBole's `run_recbole` returns, and more."""
    known = config["data_note"], config["shuffle_text"], [config["MAX_ITEM_LIST_LENGTH"]]
    protocol = report.protocol_sentence(config["eval_args"], config["seen_items"], ties, *known)
    if more:
        text = "\n".join([report.main_table(lines, config["metrics"], config["topk"]), more, protocol])
    else:
        text = report.summary(lines, config["metrics"], config["topk"], config["valid_metric"], protocol)
    report.write_run(folder, settings_of(config), text, lines)
    logging.getLogger().info(f"Results, also in {folder}/table.txt:\n{text}")
    last = lines[-1]
    return {
        "best_valid_score": last.valid.get(str(config["valid_metric"]).lower(), float("nan")),
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": last.valid,
        "test_result": last.metrics,
        "table": text,
        "lines": lines,
        "folder": str(folder),
    }
