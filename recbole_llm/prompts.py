"""From a history of titles to the prompt of an instruction-tuned language model, and from its answer back to a title.

Paper: BIGRec (arXiv 2308.08434), section 3: the next item is asked for as free text, in the three headed blocks of the
Alpaca template. Unlike the authors' code, where the two templates differ by one blank, training and inference share
one function.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PREAMBLE = "Here is a task, together with the facts that it rests on. Write the answer that solves it."


@dataclass(frozen=True)
class Words:
    """The words of a domain that stand around the titles of a prompt.

    Args:
        instruction: What the model shall do, as one or more sentences; the same for every history of a data set.
        lead: What stands before the history, such as `The user has watched these movies, oldest first:`.
        preamble: The sentence that opens every prompt.
    """

    instruction: str
    lead: str
    preamble: str = PREAMBLE


def beginning(words: Words) -> str:
    """What all prompts of a domain begin with, up to the first title; without the space before it, which is one token with the quote."""
    return f"{words.preamble}\n\n### Instruction:\n{words.instruction}\n\n### Input:\n{words.lead}"


def prompt(words: Words, titles: Sequence[str]) -> str:
    """Everything that the model reads before its answer.

    Args:
        words: The words of the domain.
        titles: Cleaned titles of the history, oldest first, without double quotes.

    Returns:
        The prompt; it ends with the line break that `answer` continues.

    Raises:
        ValueError: There is no title, or one holds a double quote, which would end it too early.
    """
    if not titles:
        raise ValueError("titles=[]: a prompt needs at least one item of history; skip users who have none.")
    for title in titles:
        _refuse_quote(title)
    history = ", ".join(f'"{title}"' for title in titles)
    return f"{beginning(words)} {history}\n\n### Response:\n"


def answer(title: str) -> str:
    """What the model shall write after the prompt: the title in double quotes and a line break.

    Raises:
        ValueError: The title holds a double quote.
    """
    _refuse_quote(title)
    return f'"{title}"\n'


def read_answer(text: str) -> str:
    """The title that a model wrote; `read_answer(answer(title)) == title` for every cleaned title.

    Args:
        text: What was generated after the prompt. A missing opening quote, or an end before the closing one, is
            forgiven; what follows the closing quote or the first line is left out.
    """
    text = text.lstrip().removeprefix('"')
    title = text.split('"', 1)[0]
    return " ".join(next(iter(title.splitlines()), "").split())


def _refuse_quote(title: str) -> None:
    if '"' in title:
        raise ValueError(f"title={title}: a title in a prompt cannot hold a double quote; pass it through clean_title.")
