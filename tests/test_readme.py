"""README says what the committed results say."""

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
