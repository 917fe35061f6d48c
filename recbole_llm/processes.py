"""Several processes that label one plan of shards: each a part set by hand (`teacher_shard`), or all started by a launcher.

A launcher (`torchrun`, `accelerate launch`) tells every process its number by the environment. Such processes wait for each other at
a barrier, not by looking for files: it ends with an error as soon as one of them dies, and no disk has to show a file in time.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch import distributed

LONGEST_WAIT = timedelta(days=365)
"""A teacher may be trained and label for weeks; who waits for a process that died is told at once anyway."""


class PartDone(RuntimeError):
    """This process has done its part and has nothing more to do; the message says who goes on, or what is missing."""


@dataclass(frozen=True)
class Part:
    """Every `of`-th shard of a plan.

    Args:
        number: The first of them, from 0.
        of: How many parts there are.
        launched: Whether a launcher started the processes of all parts, so that they can wait for each other.
    """

    number: int = 0
    of: int = 1
    launched: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "Part":
        """The part of this process: that of `teacher_shard`, of a launcher's process, or all.

        Raises:
            ValueError: `teacher_shard` is no part, or this process has one already.
        """
        value, rank, size = config["teacher_shard"], *place()
        # under a process group that is there already (RecBole's own, say) every process trains, and needs a Knowledge for that
        launched = size > 1 and not distributed.is_initialized()
        if value in (None, ""):
            return cls(rank, size, True) if launched else cls()
        named = re.fullmatch(r"(\d+)/(\d+)", str(value))
        if not named or not 1 <= int(named[1]) <= int(named[2]):
            raise ValueError(
                f"teacher_shard={value}: no part of the shards; there is 1/n to n/n, n being the number of parts. Set teacher_shard in a "
                "config file or on the command line."
            )
        if launched:
            raise ValueError(
                f"teacher_shard={value}: this is one of {size} processes of a launcher, which share the shards by themselves; there is "
                "one or the other. Leave teacher_shard empty, or start a single process."
            )
        return cls(int(named[1]) - 1, int(named[2]))

    def __str__(self):
        return f"{self.number + 1}/{self.of}"

    def shards(self, plan: Sequence) -> Sequence:
        """The shards of this part, in the order of the plan."""
        return plan[self.number :: self.of]

    @contextmanager
    def together(self) -> Iterator[None]:
        """While this lasts, the processes of a launcher can wait for each other."""
        if not self.launched:
            yield
            return
        distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
        try:
            yield
        finally:
            distributed.destroy_process_group()

    def wait(self) -> None:
        """Wait until every process of the launcher has come here; then only the first goes on. A part set by hand waits for nobody.

        Raises:
            PartDone: This is another process of the launcher.
        """
        if self.launched:
            distributed.barrier()
            only_the_first()

    @contextmanager
    def in_turn(self, folder: Path) -> Iterator[None]:
        """Let one process at a time do what stands below, so that the others find it done.

        A launcher's first process is the one that does it. Of parts set by hand it is whoever comes first, and the lock in `folder`,
        where it is kept, is let go by a process that is killed, too.
        """
        if self.launched:
            if self.number:
                distributed.barrier()
            yield
            if not self.number:
                distributed.barrier()
        elif self.of > 1:
            with held(folder / ".lock"):
                yield
        else:
            yield

    @contextmanager
    def ending(self, folder: Path) -> Iterator[None]:
        """While this lasts, no other part set by hand ends the same labels.

        Raises:
            PartDone: Another one has ended them meanwhile, and goes on with the student.
        """
        if self.launched or self.of == 1:
            yield
            return
        with held(folder.with_name(f".{folder.name}.lock")):
            if (folder / "manifest.json").is_file():
                raise PartDone(
                    f"Part {self} of the labels is done, and so are all others: another process has ended the Knowledge in {folder} and "
                    "goes on with the student."
                )
            yield

    def refuse_missing(self, folder: Path, found: Sequence[str | None]) -> None:
        """End this process if shards are missing when its own part is done.

        Args:
            folder: Where they are kept.
            found: For every shard of the plan what its content is known by, None if it is missing.

        Raises:
            PartDone: Some are; the message says of which parts, and what to run.
        """
        missing = Counter(number % self.of for number, content in enumerate(found) if content is None)
        if not missing:
            return
        left = {str(Part(number, self.of)): count for number, count in sorted(missing.items())}
        raise PartDone(
            f"Part {self} of the labels is done, and no student is trained yet: of {len(found)} shards in {folder} "
            f"{missing.total()} are missing ({', '.join(f'{count} of part {part}' for part, count in left.items())}). Run the same command "
            f"with {' and '.join(f'teacher_shard={part}' for part in left)}, or without teacher_shard, which labels all that is missing. "
            "Whoever then finds every shard in that folder goes on with the student."
        )


WHOLE = Part()
"""All shards."""


@contextmanager
def held(file: Path) -> Iterator[None]:
    """While this lasts, no other process holds the same file; one that is killed lets go of it. Without effect on Windows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as lock:
        with suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logging.getLogger().info(f"Another process is at {file.parent}/; this one waits for it.")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def place() -> tuple[int, int]:
    """This process's number among those of a launcher, from 0, and how many there are; (0, 1) without a launcher."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def only_the_first() -> None:
    """End all processes of a launcher but the first: what follows is the work of one.

    Raises:
        PartDone: This is another one.
    """
    rank, size = place()
    if rank:
        raise PartDone(f"Process {rank + 1} of {size} is done; the first one goes on alone.")


def settle(settings: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Give a launcher's process a GPU of its own, and leave the talking to the first; RecBole does so for processes that it starts.

    Args:
        settings: All settings of a Config, which are changed.
        given: Those that the user set.
    """
    rank, size = place()
    if size == 1:
        return
    local = int(os.environ["LOCAL_RANK"])
    # RecBole makes gpu_id the GPUs that are seen, so a second Config of this process finds the one that it has
    named = given.get("gpu_id", os.environ.get("CUDA_VISIBLE_DEVICES", local))
    gpus = named if isinstance(named, list | tuple) else str(named).split(",")
    settings["gpu_id"] = str(gpus[local % len(gpus)])
    if rank:
        settings |= {"state": "error", "show_progress": False}
