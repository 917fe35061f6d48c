"""The command line: flags without a value, the names that choose a run or a benchmark, and everything else as settings."""

import argparse
import sys
import traceback
from pathlib import Path
from typing import Any

from recbole_llm.model import PROPERTIES, model_files

OF_A_BENCHMARK = ("only", "seeds", "verify", "here")
APART = {
    ("verify", "only"): "all of a benchmark is compared with what is committed",
    ("verify", "seeds"): "all of a benchmark is compared with what is committed",
    ("verify", "estimate"): "one runs a benchmark, the other tells how long it would take",
}
"""Flags that exclude each other, and why."""
EPILOG = (
    "Every other --key=value is a setting of RecBole or of ours; --help --model=<model> lists ours with their meaning."
)


def main(argv: list[str] | None = None) -> int:
    """Run the command; faults of the settings are told in their own words, without a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    # no abbreviations: --seed is a setting of RecBole, not the beginning of --seeds
    parser = argparse.ArgumentParser(prog="run_recbole_llm.py", epilog=EPILOG, add_help=False, allow_abbrev=False)
    parser.add_argument("--model", help="model of this package, or any sequential model of RecBole; DLLM2Rec")
    parser.add_argument("--dataset", help="name of the data set; ml-100k")
    parser.add_argument("--config_files", help="yaml files, separated by blanks; later ones win")
    parser.add_argument(
        "--estimate", action="store_true", help="print the plan and its time, labelling by an LLM measured, and stop"
    )
    parser.add_argument(
        "--benchmark",
        help="yaml file of a benchmark, which names models and data sets: runs what is missing of it, and writes results/<name>; "
        "other settings, such as --data_path or --threads, hold for every run",
    )
    parser.add_argument("--only", help="of a benchmark: pattern of <data set>/<row> that is to be run; all")
    parser.add_argument("--seeds", help="of a benchmark: seeds that are to be run, separated by commas; all")
    parser.add_argument(
        "--verify", action="store_true", help="run a benchmark from scratch and compare it with its committed results"
    )
    parser.add_argument(
        "--here",
        action="store_true",
        help="run a benchmark also where its file says here: false, as those at the size of a paper do; they need a GPU",
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this help and stop")
    names, settings = parser.parse_known_args(argv)
    if names.help:
        print(parser.format_help() + "\n" + known_models() + settings_text(names.model or "DLLM2Rec"))
        return 0
    try:
        refuse_misuse(names, settings)
        return single(names, settings) if names.benchmark is None else benchmark(names, settings)
    except ValueError as error:
        if not said_by_us(error):
            raise
        print(f"\n{error}", file=sys.stderr)
        return 2


def refuse_misuse(names: argparse.Namespace, settings: list[str]) -> None:
    """Refuse words that are no settings, and flags that mean nothing beside each other. Raises: ValueError."""
    given = {flag for flag, value in vars(names).items() if value not in (None, False)}
    faults = [
        f"--{flag}: is for a benchmark, and none is named. Set --benchmark=properties/benchmark/smoke.yaml, say, or leave it out."
        for flag in OF_A_BENCHMARK
        if flag in given and "benchmark" not in given
    ]
    faults += [
        f"--{one} --{other}: do not go together; {why}. Leave one out."
        for (one, other), why in APART.items()
        if {one, other} <= given
    ]
    if stray := [word for word in settings if not (word.startswith("--") and "=" in word)]:
        faults.append(f"{' '.join(stray)}: not of the form --key=value. Write --key=value, or --help.")
    if faults:
        raise ValueError("\n".join(faults))


def single(names: argparse.Namespace, settings: list[str]) -> int:
    """Run or estimate one model on one data set."""
    # RecBole's Config reads sys.argv: it must not see the flags that have no value
    sys.argv = [sys.argv[0], *settings]
    from recbole_llm.config import read_yaml  # --help needs neither torch nor RecBole
    from recbole_llm.quick_start import run_recbole_llm

    files, chosen = (names.config_files or "").split(), {"model": "DLLM2Rec", "dataset": "ml-100k"}
    for file in files:
        chosen |= {key: value for key, value in read_yaml(Path(file)).items() if key in chosen}
    chosen |= {key: value for key, value in vars(names).items() if key in chosen and value}
    run_recbole_llm(**chosen, config_file_list=files or None, estimate=names.estimate, read_argv=True)
    return 0


def benchmark(names: argparse.Namespace, settings: list[str]) -> int:
    """Run, estimate or verify a benchmark; 1 where a run fails, or what comes out is not what is committed."""
    sys.argv = sys.argv[:1]  # settings go to every run of the benchmark, which reads no command line
    from recbole_llm.benchmark import Benchmark
    from recbole_llm.results import estimate_benchmark, run_benchmark, uncommitted, verify
    from recbole_llm.runner import RunsFailed

    file, only, seeds = names.benchmark, "*" if names.only is None else names.only, seeds_of(names.seeds)
    overrides = overrides_of(settings)
    # flags that choose an ordinary run are among what a benchmark does not let override
    chosen = {key: vars(names)[key] for key in ("model", "dataset", "config_files") if vars(names)[key] is not None}
    asked = Benchmark.load(file, overrides | chosen)
    if names.estimate:
        print(estimate_benchmark(file, overrides, only, seeds))
        return 0
    if not (asked.here or names.here):
        raise ValueError(
            f"benchmark={file}: is not meant for a small machine (its file says here: false). {asked.what} Add --estimate to see how "
            "long it takes, or --here to run it anyway."
        )
    try:
        if not names.verify:
            print(run_benchmark(file, overrides, only, seeds))
            return 0
        lacking, every = uncommitted(file)
        differ = verify(file, overrides)
    except RunsFailed as error:  # each has its traceback in the log
        print(f"\n{error}", file=sys.stderr)
        return 1
    if differ:
        print(f"{file}: {len(differ)} cells differ from what is committed:", *differ, sep="\n  ", file=sys.stderr)
        return 1
    apart = f" {lacking} of its {every} runs are not committed, and were not run." if lacking else ""
    print(f"{file}: every number is as committed.{apart}")
    return 0


def seeds_of(text: str | None) -> list[int]:
    """The numbers that --seeds names; none where all are meant. Raises: ValueError: They are none."""
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"seeds={text}: no list of whole numbers; there is 2020,2021, say. Set --seeds.")
    return [int(word) for word in words]


def overrides_of(settings: list[str]) -> dict[str, Any]:
    """Words of the form --key=value as settings. Raises: ValueError: A value cannot be read."""
    import yaml

    overrides = {}
    for word in settings:
        key, text = word.removeprefix("--").split("=", 1)
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"{key}={text}: cannot be read as YAML. Put the text of --{key} into further quotes."
            ) from error
    return overrides


def said_by_us(error: ValueError) -> bool:
    """Whether a fault was raised, and so worded, in this package; any other one keeps its traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return frames[-1][0].f_globals.get("__name__", "").startswith("recbole_llm.")


def known_models() -> str:
    """The models that --model takes."""
    from recbole_llm.config import sequential_models

    return f"Models of this package: {', '.join(model_files())}\nSequential models of RecBole: {', '.join(sequential_models())}\n"


def settings_text(model: str) -> str:
    """Our settings for a model, as its yaml files explain them."""
    files = [PROPERTIES / "overall.yaml", PROPERTIES / "model" / f"{model}.yaml"]
    return "".join(f"\n{file.name}:\n{file.read_text(encoding='utf-8')}" for file in files if file.is_file())
