"""The command line: flags without a value, the two names that choose a run, and everything else as settings."""

import argparse
import sys
import traceback
from pathlib import Path

from recbole_llm.model import PROPERTIES, model_files

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
    parser.add_argument("--config_files", default="", help="yaml files, separated by blanks; later ones win")
    parser.add_argument(
        "--estimate", action="store_true", help="print the plan and its time, labelling by an LLM measured, and stop"
    )
    parser.add_argument(
        "--benchmark", help="yaml file of a benchmark: runs what is missing of it, and writes results/<name>"
    )
    parser.add_argument("--only", default="*", help="of a benchmark: pattern of <data set>/<row> that is to be run")
    parser.add_argument(
        "--seeds", default="", help="of a benchmark: seeds that are to be run, separated by commas; all"
    )
    parser.add_argument(
        "--verify", action="store_true", help="run a benchmark from scratch and compare it with its committed results"
    )
    parser.add_argument("-h", "--help", action="store_true", help="print this help and stop")
    names, settings = parser.parse_known_args(argv)
    if names.help:
        print(parser.format_help() + "\n" + known_models() + settings_text(names.model or "DLLM2Rec"))
        return 0
    stray = [word for word in settings if not (word.startswith("--") and "=" in word)]
    if stray:
        print(f"{' '.join(stray)}: not of the form --key=value. Write --key=value, or --help.", file=sys.stderr)
        return 2
    # RecBole's Config reads sys.argv: it must not see the flags that have no value
    sys.argv = [sys.argv[0], *settings]
    if names.benchmark or names.verify:
        return benchmark(names, settings)
    from recbole_llm.config import read_yaml  # --help needs neither torch nor RecBole
    from recbole_llm.quick_start import run_recbole_llm

    files, chosen = names.config_files.split(), {"model": "DLLM2Rec", "dataset": "ml-100k"}
    for file in files:
        chosen |= {key: value for key, value in read_yaml(Path(file)).items() if key in chosen}
    chosen |= {key: value for key, value in vars(names).items() if key in chosen and value}
    try:
        run_recbole_llm(**chosen, config_file_list=files or None, estimate=names.estimate, read_argv=True)
    except ValueError as error:
        if not said_by_us(error):
            raise
        print(f"\n{error}", file=sys.stderr)
        return 2
    return 0


def benchmark(names: argparse.Namespace, settings: list[str]) -> int:
    """Run, estimate or verify a benchmark; 1 where what comes out is not what is committed, 2 where a setting is wrong."""
    sys.argv = sys.argv[:1]  # settings go to every run of the benchmark, which reads no command line
    import yaml

    from recbole_llm.results import estimate_benchmark, run_benchmark, verify

    file = names.benchmark or "properties/benchmark/smoke.yaml"
    pairs = (word.removeprefix("--").split("=", 1) for word in settings)
    overrides = {key: yaml.safe_load(value) for key, value in pairs}
    if not all(seed.strip().isdigit() for seed in names.seeds.split(",") if names.seeds):
        print(f"seeds={names.seeds}: no list of whole numbers; there is 2020,2021, say. Set --seeds.", file=sys.stderr)
        return 2
    seeds = [int(seed) for seed in names.seeds.split(",") if seed]
    try:
        if names.estimate:
            print(estimate_benchmark(file, overrides, names.only, seeds))
        elif names.verify:
            if differ := verify(file, overrides):
                print(
                    f"{file}: {len(differ)} cells differ from what is committed:", *differ, sep="\n  ", file=sys.stderr
                )
                return 1
            print(f"{file}: every number is as committed.")
        else:
            print(run_benchmark(file, overrides, names.only, seeds))
    except ValueError as error:
        if not said_by_us(error):
            raise
        print(f"\n{error}", file=sys.stderr)
        return 2
    return 0


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
