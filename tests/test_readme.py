"""README says what the committed results say."""

import re

from recbole_llm.benchmark import Benchmark
from tests.bench.readme import BLOCK, ROOT, filled


def test_readme_has_the_committed_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BLOCK.search(text), "no block of results is left in README"
    assert filled(text) == text, "README and the committed results differ: run `make readme`"


def test_a_changed_number_is_put_right():
    text = "before\n<!-- table tuned -->\n| SASRec | .9999 |\n<!-- end -->\nafter"
    assert ".9999" not in filled(text) and filled(text).startswith("before\n<!-- table tuned -->\n\n| model |")
    assert filled(text).endswith("|\n\n<!-- end -->\nafter")
    two = text + text.replace("tuned", "smoke")
    assert filled(two).count("<!-- end -->") == 2 and "after" + "before" in filled(two)


def test_readme_has_the_minutes_of_every_benchmark():
    text, told = (ROOT / "README.md").read_text(encoding="utf-8"), {}
    for line in re.findall(r"^\| (?:`\w+`(?:, )?)+ \|.*\|.*\|.*\|$", text, re.MULTILINE):
        files, _, minutes, _ = (cell.strip() for cell in line.strip("|").split("|"))
        names = re.findall(r"\w+", files)
        each = [None] * len(names) if minutes == "-" else [float(one.replace(",", "")) for one in minutes.split(", ")]
        told |= dict(zip(names, each, strict=True))
    files = (ROOT / "properties" / "benchmark").glob("*.yaml")
    assert told == {file.stem: Benchmark.load(file).minutes for file in files}
