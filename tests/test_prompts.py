"""Prompts and answers: what the language model reads, and what is read from it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.item_text import clean_title
from recbole_llm.prompts import Words, answer, prompt, read_answer

WORDS = Words(instruction="Name the next film.", lead="Seen so far:", preamble="A task.")
TITLES = st.text().map(clean_title).filter(bool)


def test_prompt_is_three_headed_blocks_with_the_history_in_order():
    assert prompt(WORDS, ["Alien", "Heat (1995)"]) == (
        "A task.\n\n"
        "### Instruction:\nName the next film.\n\n"
        '### Input:\nSeen so far: "Alien", "Heat (1995)"\n\n'
        "### Response:\n"
    )


def test_answer_is_the_quoted_title_on_a_line():
    assert answer("Heat (1995)") == '"Heat (1995)"\n'


@given(TITLES)
def test_read_answer_inverts_answer(title):
    assert read_answer(answer(title)) == title


@given(TITLES, st.text())
def test_what_the_model_writes_after_the_title_does_not_count(title, chatter):
    assert read_answer(answer(title) + chatter) == title


@given(st.lists(TITLES, min_size=1, max_size=4))
def test_every_title_of_the_history_can_be_read_from_the_prompt(titles):
    history = prompt(WORDS, titles).split("Seen so far: ")[1].split("\n\n### Response")[0]
    assert history[1:-1].split('", "') == titles


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ('"Toy Story"\nand more', "Toy Story"),
        ('"Toy Story" is a good film', "Toy Story"),
        ('\n  "Toy  Story', "Toy Story"),
        ("Toy Story\nHeat", "Toy Story"),
        ("", ""),
        ('""', ""),
    ],
)
def test_unfinished_and_unquoted_answers_are_read(text, title):
    assert read_answer(text) == title


def test_a_title_with_a_double_quote_is_refused():
    with pytest.raises(ValueError, match="double quote"):
        answer('12" vinyl')
    with pytest.raises(ValueError, match="double quote"):
        prompt(WORDS, ['12" vinyl'])


def test_an_empty_history_is_refused():
    with pytest.raises(ValueError, match="at least one item"):
        prompt(WORDS, [])
