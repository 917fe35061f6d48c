"""The titles of a data set by RecBole's internal item ids, cleaned in one place; and there shuffled, if `shuffle_text` says so."""

import hashlib
import html
import logging
import random
import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole.utils import FeatureType

# MovieLens sorts by the first word that matters ("Postino, Il"), and keeps a year or a second title behind that.
_TRAILING_ARTICLE = re.compile(
    r"^(?P<name>[^(]+?),\s*(?P<article>The|An?|La|Les?|L'|Il|El|Los|Las|Der|Das|Une?)(?=\s*(?:\(|$))"
)
_WELL_QUOTED = re.compile(r'"(?:[^"]|"")*"')


def clean_title(raw: str) -> str:
    """A title as prompts, vectors and comparisons use it; cleaning it again changes nothing.

    HTML entities become characters, blanks are folded, a pair of double quotes around the whole is taken off, double
    quotes inside become single ones (prompts use the double quote to end a title), and an article that MovieLens put
    behind the title returns to the front: `Postino, Il (1994)` -> `Il Postino (1994)`.

    Unlike in the authors' BIGRec data, where 747 of 17,408 game titles keep entities such as `&amp;`.
    """
    title, previous = raw, None
    while title != previous:
        previous = title
        title = " ".join(html.unescape(title).split())
        if len(title) >= 2 and title[0] == title[-1] == '"' and '"' not in title[1:-1]:
            title = title[1:-1].strip()
        title = _article_to_front(title.replace('"', "'"))
    return title


def _article_to_front(title: str) -> str:
    match = _TRAILING_ARTICLE.match(title)
    if not match:
        return title
    article = match["article"]
    blank = "" if article.endswith("'") else " "
    return f"{article}{blank}{match['name'].rstrip(', ')}{title[match.end() :]}"


@dataclass(frozen=True)
class ItemText:
    """One cleaned title for every internal item id of a data set.

    Args:
        titles: Title by internal id, all different from ""; only index 0, RecBole's padding, is "".
        tokens: The items' tokens (their names in the data files) by internal id; index 0 is RecBole's "[PAD]".
        untitled: Internal ids of items that have no title, whose entry in `titles` is a stand-in.
    """

    titles: tuple[str, ...]
    tokens: tuple[str, ...]
    untitled: tuple[int, ...] = ()

    @classmethod
    def from_raw(cls, raw: Sequence[str], tokens: Sequence[str]) -> "ItemText":
        """Clean raw titles (by internal id, index 0 = padding); an item whose title is empty gets a stand-in.

        A stand-in is `untitled ` and eight hexadecimal digits that follow from the token alone: neither RecBole's
        internal id nor the token itself, since both may tell an LLM the order of the file and with it the target.
        """
        cleaned = [clean_title(title) for title in raw]
        untitled = tuple(item for item, title in enumerate(cleaned) if item and not title)
        for item in untitled:
            cleaned[item] = f"untitled {hashlib.sha256(tokens[item].encode()).hexdigest()[:8]}"
        return cls(("", *cleaned[1:]), tuple(map(str, tokens)), untitled)

    @classmethod
    def from_dataset(cls, dataset, field: str | None, shuffled: bool = True) -> "ItemText":
        """Read the titles of a RecBole dataset, before or after its `build`; warns with the number of items without.

        Args:
            dataset: A RecBole dataset that has loaded its item file. Runs of blanks inside a title are not recovered.
            field: Name of the title column, of type `token_seq` or `token`.
            shuffled: Whether `shuffle_text` of the dataset's settings holds; False gives what people shall read.

        Raises:
            ValueError: The item file has no such column, or it is not loaded, or it holds numbers; or `shuffle_text` is no seed.
        """
        _check_column(dataset, field)
        tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
        raw = _cells(dataset, field, shuffled)
        text = cls.from_raw(raw, tokens)
        if text.missing and not getattr(dataset, "untitled_were_counted", False):
            dataset.untitled_were_counted = True  # the titles are read at several stages of a run, the warning once
            logging.getLogger(__name__).warning(
                f"{text.missing} of {len(text) - 1} items of '{dataset.dataset_name}' have no text in the column "
                f"'{field}'; each is called '{text.titles[text.untitled[0]]}' or the like."
            )
        return text

    def __len__(self) -> int:
        """Number of items, padding included."""
        return len(self.titles)

    def of(self, items: Iterable[int]) -> list[str]:
        """The titles of internal item ids, in their order; padding (0) is left out."""
        return [self.titles[item] for item in map(int, items) if item]

    @property
    def missing(self) -> int:
        """How many items have no title of their own."""
        return len(self.untitled)

    def duplicates(self) -> dict[str, list[int]]:
        """Titles that several items carry -> the internal ids of those items, ascending."""
        owners: dict[str, list[int]] = {}
        for item, title in enumerate(self.titles):
            if item:
                owners.setdefault(title, []).append(item)
        return {title: items for title, items in owners.items() if len(items) > 1}


def filled_in(template: str, dataset, title_field: str | None, key: str = "lite_item_template") -> list[str]:
    """A text for every internal item id, made of columns of the item file; index 0, the padding's, is "".

    Args:
        template: Text with names of columns in braces; `{title}` is the cleaned title, whatever its column is called. A part
            between semicolons whose columns are all empty for an item is left out for it.
        dataset: A RecBole dataset that has loaded its item file.
        title_field: Column of the title.
        key: The setting that holds the template, for messages.

    Raises:
        ValueError: It names no column, or one that is not loaded.
    """
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    if not names:
        raise ValueError(
            f"{key}={template!r}: names no column, so that all items would read alike; there is {{title}}, and any column of the item "
            f"file. Set {key} in a config file."
        )
    columns: dict[str, Sequence[str]] = {}
    for name in dict.fromkeys(names):
        if name == "title":
            columns[name] = ItemText.from_dataset(dataset, title_field).titles
        else:
            _check_column(dataset, name, key=key, numbers=True)
            columns[name] = [html.unescape(cell) for cell in _cells(dataset, name)]
    parts = [
        (part, [name for _, name, _, _ in string.Formatter().parse(part) if name]) for part in template.split("; ")
    ]
    texts = [""]
    for item in range(1, dataset.item_num):
        values = {name: column[item] for name, column in columns.items()}
        kept = [part.format(**values) for part, inside in parts if not inside or any(values[name] for name in inside)]
        texts.append("; ".join(kept))
    return texts


def fault_of_seed(value: Any) -> str | None:
    """What is wrong with a value of `shuffle_text`; None if it is a seed, or empty."""
    if value is None or isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return None
    return (
        f"shuffle_text={value}: is no seed; there are whole numbers from 0 upwards, and empty for texts where they belong. Set "
        "shuffle_text in a config file or on the command line."
    )


def givers(tokens: Sequence[str], seed: int) -> list[int]:
    """Whose text every item gets where texts are shuffled: one cycle through all items, so none of two or more keeps its own.

    Args:
        tokens: Item tokens by internal id, index 0 is padding [n_items]; by them and the seed alone the cycle is drawn.
        seed: The seed.

    Returns:
        The giver's internal id by internal id; 0, the padding, gives to itself [n_items].
    """
    cycle = sorted(range(1, len(tokens)), key=lambda item: str(tokens[item]))
    random.Random(seed).shuffle(cycle)
    giver = [0] * len(tokens)
    for item, other in zip(cycle, cycle[1:] + cycle[:1], strict=True):
        giver[item] = other
    return giver


def shuffled_sentence(seed: int) -> str:
    """What logs and tables say of a run whose texts are shuffled."""
    return f"Item texts are shuffled (shuffle_text={seed}): as a control, every item has the text of another one."


def _cells(dataset, field: str, shuffled: bool = True) -> list[str]:
    """What a column of the item file says of each internal item id, its words joined by blanks; "" where it says nothing.

    All text of items passes here, so here it is shuffled, all columns of an item together.
    """
    kind = dataset.field2type[field]
    words = dataset.field2id_token.get(field) if kind in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ) else None
    blank = dataset.config["seq_separator"] or " "
    raw = [""] * dataset.item_num
    items = dataset.item_feat[dataset.iid_field].tolist()
    for item, cell in zip(items, dataset.item_feat[field].tolist(), strict=True):
        # before `build` a cell is an array or a number, afterwards a list padded with 0 or a number
        ids = cell if hasattr(cell, "__len__") else [cell]
        if words is None:
            raw[int(item)] = blank.join(f"{number:g}" for number in ids)
        else:
            raw[int(item)] = blank.join(str(words[int(word)]) for word in ids if word)
    seed = dataset.config["shuffle_text"] if shuffled else None
    if fault := fault_of_seed(seed):
        raise ValueError(fault)
    if seed is None:
        return raw
    if not getattr(dataset, "shuffling_was_said", False):
        dataset.shuffling_was_said = True  # the columns are read at several stages of a run
        logging.getLogger(__name__).warning(shuffled_sentence(seed))
    return [raw[giver] for giver in givers(dataset.field2id_token[dataset.iid_field], seed)]


def check_quotes(path: str | Path, field_separator: str = "\t", encoding: str = "utf-8") -> None:
    """Refuse an atomic file in which a value opens a double quote that RecBole's reader would not see closed.

    RecBole reads atomic files with quoting on: a value that begins with a double quote is taken for a quoted one, and
    the load breaks, or swallows the following columns and lines. Values that are quoted as a whole load well.

    Args:
        path: An atomic file of RecBole, such as `ml-1m/ml-1m.item`. Any column may break the load, so all are read.
        field_separator: RecBole's setting of that name.
        encoding: RecBole's setting of that name.

    Raises:
        ValueError: There is such a value; the message names its line, its column and what to do.
    """
    faults: list[tuple[int, str, str]] = []
    with open(path, encoding=encoding, newline="\n") as lines:
        columns = next(lines, "").rstrip("\r\n").split(field_separator)
        for number, line in enumerate(lines, start=2):
            if '"' not in line:
                continue
            values = line.rstrip("\r\n").split(field_separator)
            faults += [
                (number, columns[place].split(":")[0] if place < len(columns) else f"number {place + 1}", value)
                for place, value in enumerate(values)
                if value.startswith('"') and not _WELL_QUOTED.fullmatch(value)
            ]
    if not faults:
        return
    number, column, value = faults[0]
    doubled = value.replace('"', '""')
    more = f" (and {len(faults) - 1} more such values)" if len(faults) > 1 else ""
    raise ValueError(
        f"{path}, line {number}, {column}={value}: begins with a double quote, which RecBole reads as the start of a "
        f"quoted value{more}; a value may hold double quotes anywhere but at its start. In the file, remove that "
        f'quote, or quote the whole value with the inner quotes doubled: "{doubled}".'
    )


def _check_column(dataset, field: str | None, key: str = "title_field", numbers: bool = False) -> None:
    """Refuse a column that is not there, not loaded, or holds numbers where words are wanted."""
    name = dataset.dataset_name
    where = f"Set {key} (properties/dataset/{name}.yaml or --{key}=…)."
    if dataset.item_feat is not None and field in dataset.item_feat:
        kind = dataset.field2type[field]
        if not numbers and kind not in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ):
            raise ValueError(
                f"{key}={field}: that column of the item file of '{name}' is of type {kind.value}; a title is "
                f"token_seq or token. {where}"
            )
        return
    file = Path(dataset.dataset_path) / f"{name}.item"
    if not file.is_file():
        raise ValueError(
            f"{key}={field}: the data set '{name}' has no item file, and so no titles. "
            f"Put them into {file} (columns item_id:token and title:token_seq)."
        )
    with open(file, encoding=dataset.config["encoding"] or "utf-8") as lines:
        heads = lines.readline().rstrip("\r\n").split(dataset.config["field_separator"] or "\t")
    there = [head.split(":")[0] for head in heads]
    if field in there:
        raise ValueError(
            f"{key}={field}: that column of the item file of '{name}' is not loaded. Add it to load_col: "
            f"item: [{dataset.iid_field}, {field}] (properties/dataset/{name}.yaml or your config file)."
        )
    raise ValueError(
        f"{key}={field}: no such column in the item file of '{name}'; columns there: {', '.join(there)}. {where}"
    )
