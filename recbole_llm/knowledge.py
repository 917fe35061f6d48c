"""Knowledge: what a teacher said about training rows, as a file that a student learns from without ever seeing an LLM.

A row is (user token, target position, the last `teacher_history` item tokens, target token). Rows and items are stored by
the order of their tokens, so that neither the order of the files nor RecBole's internal ids matter, and `attach` refuses
data that are not the teacher's. The released DLLM2Rec pipeline joins teacher and student by bare row number.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from recbole_llm.artifacts import (
    DamagedArtifact,
    digest,
    file_digest,
    read_json,
    read_tensors,
    tensors_digest,
    write_json,
    write_tensors,
)
from recbole_llm.checkpoint import random_state, set_random_state
from recbole_llm.config import check_range, check_topk, choice, role_config, shared
from recbole_llm.folds import fault_of_folds, folds_of, others, refuse_user_tables, rows_of
from recbole_llm.identity import Names, data_digest, fingerprint, order_digest, titles_digest
from recbole_llm.labelling import Labeller, reads_windows, rows_of_a_shard, seal, whole_shard
from recbole_llm.processes import WHOLE, Part
from recbole_llm.rows import POLICIES, first
from recbole_llm.sequences import Log
from recbole_llm.teacher import (
    Teacher,
    folder_of,
    identity,
    is_ready,
    item_table,
    ready,
    scores_of,
    seconds_of,
    teacher_folder,
)

FORMAT = 3
"""Part of the key of a Knowledge; 1 had scores that the beams of P5 never gave, 2 target scores that an approximate index had not found."""


LEAST = {"teacher_rows": 0, "teacher_shard_rows": 1, "teacher_eval_rows": 0, "teacher_history": 1, "distill_topk": 1}
"""Least value of settings of labels."""


@dataclass
class Knowledge:
    """A teacher's candidates for some training rows, and its item vectors.

    Args:
        row: Row numbers, ascending int64 [M].
        items: Candidates by item number, best first, 0 for none; int32 [M, K].
        score: Their scores, higher = surer [M, K].
        target_score: Score of the true item [M].
        trained: Whether the teacher was tuned on the row; bool [M].
        item_embedding: Vectors by item number, row 0 zero [n_items, d].
        manifest: Fingerprint, history length, provenance, seconds (of the process that finished it).
        folder: Where it is kept.
    """

    row: Tensor
    items: Tensor
    score: Tensor
    target_score: Tensor
    trained: Tensor
    item_embedding: Tensor
    manifest: dict[str, Any]
    folder: Path

    @classmethod
    def load(cls, folder: str | Path) -> "Knowledge":
        """Read a finished Knowledge, checking every part's hash.

        Raises:
            FileNotFoundError: None is there, or it is not finished.
            DamagedArtifact: A part is missing or is not what the manifest says.
        """
        folder = Path(folder)
        manifest = read_json(folder / "manifest.json")
        parts = []
        for name, wanted in manifest["parts"].items():
            try:
                tensors = read_tensors(folder / name)
            except FileNotFoundError as error:
                raise DamagedArtifact(f"{folder / name}: missing, though the manifest names it.") from error
            if tensors_digest(tensors) != wanted:
                raise DamagedArtifact(f"{folder / name}: not the content that the manifest names.")
            parts.append(tensors)
        *shards, vectors = parts
        columns = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
        order = columns["row"].argsort()
        columns = {key: column[order] for key, column in columns.items()}
        return cls(**columns, item_embedding=vectors["item_embedding"], manifest=manifest, folder=folder)

    @classmethod
    def build(
        cls,
        teacher: Any,
        dataset: Any,
        rows: Tensor,
        k: int,
        folder: str | Path,
        options: dict[str, Any],
        folds: Sequence[tuple[Any, Tensor]] = (),
        part: Part = WHOLE,
    ) -> "Knowledge":
        """Let a teacher label training rows, shard by shard; shards that are whole already are kept.

        The plan of the shards is a function of rows and settings alone, so a run that was killed goes on at its first missing shard, and
        several processes that each label a part of the plan make the same files as one.

        Args:
            teacher: A trained sequential recommender.
            dataset: The training split.
            rows: Row numbers to label [M].
            k: Candidates per row.
            folder: Where it is kept.
            options: `history`, `shard_rows`, `overlap`, `provenance`, `progress`.
            folds: Teachers that label instead, each with its rows, none of which it was trained on; the item vectors stay `teacher`'s.
            part: The shards that this process labels.

        Raises:
            PartDone: Shards of other parts are missing, or another process writes the manifest.
        """
        folder, log = Path(folder), Log.from_dataset(dataset)
        names = Names.of(dataset, log)
        began = perf_counter()
        # files that somebody is writing, or was writing when he was killed: those are still there at the end
        left = list(folder.glob(".*.*.*"))
        k, rows = min(k, len(names.items)), rows.sort().values
        trained = torch.zeros(len(log.rows()), dtype=torch.bool)
        if not folds:
            trained = teacher.trained_on(len(trained)) if isinstance(teacher, Teacher) else ~trained
        plan, provenance = [], options["provenance"]
        made = [fold["checkpoint_digest"] for fold in provenance.get("folds", ())] or [
            provenance.get("checkpoint_digest")
        ]
        for (labels, own), by in zip(folds or [(teacher, rows)], made, strict=True):
            labeller = Labeller(labels, log, own, k, options["shard_rows"], options["overlap"], names.number)
            for shard in labeller.shards():
                plan.append((folder / f"shard-{len(plan):05d}.safetensors", by, labeller, *shard))
        parts: dict[str, str | None] = dict.fromkeys(file.name for file, *_ in plan)
        total = sum(len(of_shard) for *_, of_shard in part.shards(plan))
        bar = tqdm(total=total, desc="Label rows", ncols=100, unit="row", disable=not options["progress"])
        for file, by, labeller, chosen, of_shard in part.shards(plan):
            shard = whole_shard(file, of_shard, by)
            if shard is None:
                shard = labeller.label(chosen, of_shard) | {"trained": trained[of_shard]}
                shard["items"] = names.number[shard["items"]].int()
                write_tensors(file, shard, {"seal": seal(shard, by)})
            parts[file.name] = tensors_digest(shard)
            bar.update(len(of_shard))
        bar.close()
        part.wait()
        for file, by, _, _, of_shard in plan:  # what other processes have labelled
            if parts[file.name] is None and (shard := whole_shard(file, of_shard, by)):
                parts[file.name] = tensors_digest(shard)
        part.refuse_missing(folder, list(parts.values()))
        with part.ending(folder):
            vectors = {"item_embedding": item_table(teacher).float().cpu()[names.internal].contiguous()}
            vectors["item_embedding"][0] = 0
            write_tensors(folder / "item_embedding.safetensors", vectors)
            parts["item_embedding.safetensors"] = tensors_digest(vectors)
            manifest = {
                "format": FORMAT,
                "rows": len(rows),
                "candidates": k,
                "history": options["history"],
                "scores": scores_of(teacher),
                "fingerprint": fingerprint(log, names, rows, options["history"]),
                "titles": titles_digest(dataset, names),
                "provenance": provenance,
                "seconds": perf_counter() - began,
                "parts": parts,
            }
            write_json(folder / "manifest.json", manifest)
            for file in left:
                file.unlink(missing_ok=True)
        return cls.load(folder)


@dataclass
class Request:
    """What a student's settings ask of a teacher, before anything is loaded or trained."""

    config: Any
    data: str
    order: str
    folder: Path
    checkpoint: str | None
    part: Part

    @classmethod
    def of(cls, config: Any, dataset: Any) -> "Request":
        """Find the folder in which this Knowledge is, or will be; imports no LLM library."""
        teacher = role_config(config, "teacher")
        log = Log.from_dataset(dataset)
        if fault := fault_of_folds(config, teacher, len(log.users)):
            raise ValueError(fault)
        policy = choice(config, "teacher_rows_by", POLICIES)
        for key, least in LEAST.items():
            check_range(config, key, least)
        # as the teacher's constructor will, so that its key is the same before and after
        check_topk(teacher, dataset.item_num)
        data = data_digest(log, dataset, teacher)
        # the same rows in another data set of the same name are told apart by `data`
        keys = {
            "teacher": identity(teacher, labelling=True),
            "data": data,
            "checkpoint": _checkpoint_digest(config["teacher_checkpoint"]),
            "rows": config["teacher_rows"],
            "shard_rows": config["teacher_shard_rows"],
            "k": config["distill_topk"],
            "history": config["teacher_history"],
            "seed": config["teacher_seed"],
            "format": FORMAT,
        }
        if config["teacher_folds"]:
            keys["folds"] = config["teacher_folds"]
        if policy != "random" and config["teacher_rows"]:
            keys["rows by"] = policy
        if teacher["prompt_lead"]:  # bits of what an LLM writes depend on its batches
            keys["tokens per batch"] = teacher["generate_tokens_per_batch"]
        else:  # may be one that labels all rows unless fewer are asked for
            keys["rows asked for"] = "teacher_rows" in config.external_config_dict
        folder = (
            Path(config["checkpoint_dir"]) / "knowledge" / f"{config['teacher']}-{config['dataset']}-{digest(keys)}"
        )
        return cls(teacher, data, order_digest(dataset), folder, config["teacher_checkpoint"], Part.from_config(config))

    @property
    def teacher_folder(self) -> Path:
        """Where the teacher is, or will be."""
        return teacher_folder(self.config, self.data, self.order)

    @property
    def exists(self) -> bool:
        """Whether the Knowledge is finished and whole."""
        try:
            Knowledge.load(self.folder)
            return True
        except (FileNotFoundError, DamagedArtifact):
            return False


def _checkpoint_digest(file: str | Path | None) -> str | None:
    """Hash of a checkpoint's bytes: another teacher under the same file name is another teacher."""
    return file_digest(file) if file and Path(file).is_file() else file and str(file)


@contextmanager
def _own_randomness(train_data: Any) -> Iterator[None]:
    """While this lasts, draw from any generator; a student then trains the same whether its Knowledge was there or not."""
    tensors, values = random_state()
    generator = getattr(train_data, "generator", None)
    order = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        set_random_state(tensors, values)
        if order is not None:
            generator.set_state(order)


def ensure(config: Any, train_data: Any, valid_data: Any) -> Knowledge:
    """Find the Knowledge that the settings ask for, or build it, with the teacher loaded or trained.

    Args:
        config: Config of the distilling model.
        train_data: RecBole's training loader.
        valid_data: RecBole's validation loader, for the teacher's early stopping.

    Raises:
        ValueError: `teacher_knowledge` names a folder without a whole Knowledge, or `teacher_folds` cannot be done.
        PartDone: This process has labelled its part of the rows, and the Knowledge is not whole yet, or another process goes on.
    """
    logger = logging.getLogger()
    if config["teacher_knowledge"]:
        try:
            return Knowledge.load(config["teacher_knowledge"])
        except (FileNotFoundError, DamagedArtifact) as error:
            raise ValueError(
                f"teacher_knowledge={config['teacher_knowledge']}: no whole Knowledge there ({error}). Name another folder, or leave "
                "it empty to have it built."
            ) from error
    dataset = train_data._dataset
    request = Request.of(config, dataset)
    try:
        knowledge = Knowledge.load(request.folder)
        logger.info(f"Knowledge is taken from {request.folder}.")
        return knowledge
    except FileNotFoundError:
        pass
    except DamagedArtifact as error:
        logger.warning(f"Knowledge in {request.folder} is damaged and is built again where it is: {error}")
        (request.folder / "manifest.json").unlink(missing_ok=True)
    with _own_randomness(train_data), request.part.together():
        return _build(config, request, train_data, valid_data)


def _build(config: Any, request: Request, train_data: Any, valid_data: Any) -> Knowledge:
    dataset, part = train_data._dataset, request.part
    with part.in_turn(request.teacher_folder):
        if part.launched and part.number and not (request.checkpoint or is_ready(request.teacher_folder)):
            raise ValueError(
                f"checkpoint_dir={config['checkpoint_dir']}: the teacher that the first process has trained is not in it; all processes "
                "need one folder. Set checkpoint_dir to a folder on a disk that they share."
            )
        teacher = ready(request.config, dataset, valid_data, request.checkpoint)
        rows = asked_rows(config, teacher, dataset)
        folds, made = (), []
        if config["teacher_folds"]:
            refuse_user_tables(teacher, dataset.user_num, config["teacher_folds"])
            folds, made = _folds(config, request, dataset, valid_data, rows)
        item_table(teacher)  # a text teacher keeps what it embeds on disk, which one process does for all
    options = {
        "history": config["teacher_history"],
        "shard_rows": rows_of_a_shard(config["teacher_shard_rows"], len(rows)),
        "overlap": shared(request.config, "window_overlap"),
        "progress": config["show_progress"],
        "provenance": {
            "teacher": config["teacher"],
            "checkpoint": str(request.checkpoint or request.teacher_folder),
            "checkpoint_digest": _checkpoint_digest(request.checkpoint or request.teacher_folder / "model.safetensors"),
            "settings": identity(request.config, labelling=True),
            "rows_by": config["teacher_rows_by"],
            "folds": made,
            **(teacher.provenance() if hasattr(teacher, "provenance") else {}),
        },
    }
    return Knowledge.build(teacher, dataset, rows, config["distill_topk"], request.folder, options, folds, part)


def _folds(config: Any, request: Request, dataset: Any, valid_data: Any, rows: Tensor) -> tuple[list, list]:
    """For each fold of users a teacher that was trained on all others, with the fold's rows among those to label; and where they are."""
    log, count = Log.from_dataset(dataset), config["teacher_folds"]
    folds, made = [], []
    for number, (own, part) in enumerate(fold_parts(config, dataset), start=1):
        users = f"{len(own)} of {len(log.users)} users"
        logging.getLogger().info(f"Fold {number} of {count}: a teacher that does not see {users}.")
        folds.append((ready(request.config, part, valid_data), rows[torch.isin(rows, rows_of(log, own))]))
        folder = folder_of(request.config, part)
        digest_of = _checkpoint_digest(folder / "model.safetensors")
        made.append({"checkpoint": str(folder), "checkpoint_digest": digest_of, "seconds": seconds_of(folder)})
    return folds, made


def fold_parts(config: Any, dataset: Any) -> Iterator[tuple[Tensor, Any]]:
    """Of each fold its users, by their places in the log, and the training split of all others."""
    log, count = Log.from_dataset(dataset), config["teacher_folds"]
    fold = folds_of(Names.of(dataset, log).users, count, config["teacher_seed"])
    for number in range(count):
        own = (fold == number).nonzero()[:, 0]
        yield own, others(dataset, log.users[own])


def asked_rows(config: Any, teacher: Any, dataset: Any) -> Tensor:
    """Which rows of a training split the settings want this teacher to label, ascending [count].

    Args:
        config: Of the distilling model.
        teacher: Any sequential recommender.
        dataset: The training split.
    """
    log = Log.from_dataset(dataset)
    # a part is for teachers that are asked row by row; one pass over the log labels all rows
    spares = "teacher_rows" in config.external_config_dict or not reads_windows(teacher)
    names = Names.of(dataset, log)
    numbered = replace(log, items=names.number[log.items])  # internal ids follow the order of the file
    order = POLICIES[config["teacher_rows_by"]](numbered, names.users, config["teacher_seed"])
    return rows_to_label(teacher, order, config["teacher_rows"] if spares else 0)


def rows_to_label(teacher: Any, order: Tensor, count: int) -> Tensor:
    """The first rows of an order, those that a teacher was tuned on only where there are no others; ascending [count].

    Args:
        teacher: Any sequential recommender.
        order: All row numbers, the most wanted first [M].
        count: How many are wanted; 0 is all.
    """
    if not 0 < count < len(order):
        return order.sort().values
    late = torch.zeros(len(order), dtype=torch.bool)
    return first(order, count, teacher.trained_on(len(order)) if isinstance(teacher, Teacher) else late)
