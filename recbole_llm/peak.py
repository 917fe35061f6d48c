"""How much memory a stage of a run takes at most."""

import re
import sys
from contextlib import suppress
from pathlib import Path

RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class Peak:
    """While this lasts, the most memory that the process has in use (resident set size), in `megabytes`.

    Linux forgets an earlier peak on request. Elsewhere the peak is that of the process so far, which is an upper bound.
    """

    megabytes: float = float("nan")

    def __enter__(self) -> "Peak":
        with suppress(OSError):  # a container may forbid it, and then the peak is an upper bound as well
            RESET.write_text("5")
        return self

    def __exit__(self, *exception: object) -> None:
        self.megabytes = peak_so_far()


def peak_so_far() -> float:
    """The peak since it was last forgotten, or of the process, in MB (10^6 bytes)."""
    with suppress(OSError):
        if found := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text()):
            return int(found[1]) * 1024 / 1e6
    import resource  # not on Windows, where /proc is missing too

    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / 1e6 if sys.platform == "darwin" else kibibytes * 1024 / 1e6
