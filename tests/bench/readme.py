"""Puts the result tables into README from the committed files: `make readme`; a test fails where README and results differ.

A block stands between `<!-- table NAME -->` and `<!-- end -->`: `tuned` are the baselines of tests/bench/tuned, every other name a
benchmark, as its results/ are, or without any what its paper says.
"""

import re
from pathlib import Path

from recbole_llm.artifacts import read_json, write_text
from recbole_llm.benchmark import Benchmark
from recbole_llm.standings import gains, published, scores, table
from tests.bench.tune import PROTOCOLS, RESULTS, line

ROOT = Path(__file__).resolve().parent.parent.parent
BLOCK = re.compile(r"(<!-- table ([\w-]+) -->\n)(?:(?!<!--).)*(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Write README anew."""
    write_text(ROOT / "README.md", filled((ROOT / "README.md").read_text(encoding="utf-8")))


def filled(text: str) -> str:
    """A text with every block as the committed results have it."""

    def block(found: re.Match) -> str:
        made = tuned() if found[2] == "tuned" else benchmark(found[2])
        return f"{found[1]}\n{made}\n\n{found[3]}"

    return BLOCK.sub(block, text)


def tuned() -> str:
    """The tuned baselines: means over seeds on test rows."""
    rows = []
    for protocol in PROTOCOLS:
        for model in ("SASRec", "GRU4Rec"):
            file = RESULTS / f"{model}-{protocol}.json"
            if file.is_file() and (tested := read_json(file)["tested"]):
                cells = [cell.strip() for cell in line(model, protocol, tested).strip("| ").split("|")]
                rows.append([*cells[:6], cells[-1]])  # times and epochs are those of a process, which may have gone on
    head = ["model", "protocol", "Recall@10", "NDCG@10", "Recall@20", "NDCG@20", "seeds"]
    return table(head, rows)


def benchmark(name: str) -> str:
    """Scores and gains of a benchmark, data set by data set; of one that was not run here what is published."""
    file = ROOT / "results" / name / "results.json"
    if not file.is_file():
        asked = Benchmark.load(ROOT / "properties" / "benchmark" / f"{name}.yaml")
        said = [f"`{name}`, {dataset}:\n\n{published(rows, '')}" for dataset, rows in asked.published.items()]
        return "\n\n".join([*said, f"**Not run here.** As published: {asked.source}."])
    parts = []
    for dataset, standing in read_json(file)["data"].items():
        parts += [f"{dataset}, {standing['test_rows']:,} test rows. {standing['protocol']}", scores(standing)]
        if standing["comparisons"]:
            parts.append(gains(standing["comparisons"]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
