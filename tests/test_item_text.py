"""Titles: cleaning, and their way from the item file to the internal ids."""

import logging
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.config import Config
from recbole.data import create_dataset

from recbole_llm.item_text import ItemText, check_quotes, clean_title, filled_in, givers
from recbole_llm.model import PROPERTIES
from tests.ring import RING, TITLES, TOKENS, shuffled

PIECES = st.lists(
    st.sampled_from(['"', "&quot;", "&amp;", "amp;", ", The", ", A", ", L'", " (", ")", "x", "\t", "1995", " ", ","]),
    max_size=8,
)


def load(data_path, **settings):
    settings = RING | {"data_path": str(data_path)} | settings
    return create_dataset(Config(model="Pop", dataset=settings["dataset"], config_dict=settings))


@pytest.mark.parametrize(
    ("raw", "title"),
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Usual Suspects, The (1995)", "The Usual Suspects (1995)"),
        ("Bug's Life, A", "A Bug's Life"),
        ("American in Paris, An (1951)", "An American in Paris (1951)"),
        ("Postino, Il (The Postman) (1994)", "Il Postino (The Postman) (1994)"),
        ("Enfer, L' (1994)", "L'Enfer (1994)"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Hate (Haine, La)", "Hate (Haine, La)"),
        ("Rhapsody, A Musical Adventure", "Rhapsody, A Musical Adventure"),
        ("Phantasy Star &amp; II", "Phantasy Star & II"),
        ("Rock &amp;amp; Roll", "Rock & Roll"),
        ("  Two\t blanks \n", "Two blanks"),
        ('"Heroes"', "Heroes"),
        ('"Weird Al" in 3-D', "'Weird Al' in 3-D"),
        ("12&quot; vinyl", "12' vinyl"),
        ("", ""),
    ],
)
def test_clean_title(raw, title):
    assert clean_title(raw) == title


@given(st.text() | PIECES.map("".join))
def test_cleaning_twice_is_cleaning_once_and_leaves_no_double_quote(raw):
    title = clean_title(raw)
    assert clean_title(title) == title
    assert '"' not in title
    assert title == " ".join(title.split())


def test_untitled_items_get_stand_ins_that_follow_from_the_token_alone():
    text = ItemText.from_raw(["", "Alien", " ", "", "Alien"], ["[PAD]", "a", "b", "c", "d"])
    again = ItemText.from_raw(["", "", "x"], ["[PAD]", "b", "a"])
    assert text.titles[:2] == ("", "Alien")
    assert text.untitled == (2, 3)
    assert text.missing == 2
    assert text.titles[2] != text.titles[3]
    assert again.titles[1] == text.titles[2]
    # an LLM must not see ids
    assert text.titles[2].split()[1] != "b"


def test_duplicates_name_all_their_items_and_never_untitled_ones():
    text = ItemText.from_raw(["", "Alien", "", "", "alien", "Alien"], ["[PAD]", "a", "b", "c", "d", "e"])
    assert text.duplicates() == {"Alien": [1, 5]}


def test_of_leaves_out_padding():
    text = ItemText.from_raw(["", "Alien", "Heat"], ["[PAD]", "a", "b"])
    assert text.of([2, 1, 0, 0]) == ["Heat", "Alien"]


@pytest.mark.parametrize("built", [False, True])
def test_titles_belong_to_their_tokens_whatever_the_order_of_the_file(ring, tmp_path, built):
    for path in (ring, shuffled(ring, tmp_path / "other", seed=3)):
        dataset = load(path)
        if built:
            dataset.build()
        text = ItemText.from_dataset(dataset, "title")
        assert text.titles[0] == ""
        assert dict(zip(text.tokens[1:], text.titles[1:], strict=True)) == dict(zip(TOKENS, TITLES, strict=True))
        assert text.missing == 0
        assert [dataset.token2id("item_id", token) for token in text.tokens] == list(range(len(text)))


def test_a_title_of_type_token_is_read_whole(ring):
    file = ring / "ring" / "ring.item"
    file.write_text(file.read_text().replace("title:token_seq", "title:token"))
    dataset = load(ring)
    dataset.build()
    text = ItemText.from_dataset(dataset, "title")
    assert sorted(text.titles[1:]) == sorted(TITLES)


def test_items_without_title_or_row_are_counted_in_one_warning(ring, caplog):
    file = ring / "ring" / "ring.item"
    lines = file.read_text().splitlines()
    lines[1] = f"{TOKENS[0]}\t"
    file.write_text("\n".join(lines[:-1]) + "\n")
    dataset = load(ring, filter_inter_by_user_or_item=False)
    dataset.build()
    with caplog.at_level(logging.WARNING):
        text = ItemText.from_dataset(dataset, "title")
    assert {text.tokens[item] for item in text.untitled} == {TOKENS[0], TOKENS[-1]}
    warned = [record.getMessage() for record in caplog.records if "no text" in record.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith("2 of 24 items of 'ring'")


def test_a_missing_title_column_names_the_columns_there(ring):
    with pytest.raises(ValueError, match="no such column") as error:
        ItemText.from_dataset(load(ring), "movie_title")
    assert str(error.value) == (
        "title_field=movie_title: no such column in the item file of 'ring'; columns there: item_id, title. "
        "Set title_field (properties/dataset/ring.yaml or --title_field=…)."
    )


def test_a_title_column_that_is_not_loaded_says_so(ring):
    for columns in ({"inter": ["user_id", "item_id", "timestamp"]}, RING["load_col"] | {"item": ["item_id"]}):
        with pytest.raises(ValueError, match="not loaded. Add it to load_col: item: .item_id, title"):
            ItemText.from_dataset(load(ring, load_col=columns), "title")


def test_no_item_file_and_numeric_titles_are_refused(ring):
    file = ring / "ring" / "ring.item"
    rows = "".join(f"{token}\t{number}\n" for number, token in enumerate(TOKENS))
    file.write_text("item_id:token\ttitle:float\n" + rows)
    with pytest.raises(ValueError, match="of type float; a title is token_seq or token"):
        ItemText.from_dataset(load(ring), "title")
    file.unlink()
    with pytest.raises(ValueError, match="has no item file"):
        ItemText.from_dataset(load(ring), "title")


@pytest.mark.parametrize("value", ['"Weird Al" in 3-D', '"Great', '"a" "b"'])
def test_a_title_that_opens_a_quote_is_refused_with_its_line(ring, value):
    file = ring / "ring" / "ring.item"
    check_quotes(file)
    file.write_text(file.read_text().replace(TITLES[4], value))
    with pytest.raises(ValueError, match="begins with a double quote") as error:
        check_quotes(file)
    assert f"line 6, title={value}:" in str(error.value)
    # what the message advises must load
    advice = str(error.value).rsplit("doubled: ", 1)[1].removesuffix(".")
    file.write_text(file.read_text().replace(value, advice))
    check_quotes(file)
    assert clean_title(value) in ItemText.from_dataset(load(ring), "title").titles


@pytest.mark.parametrize("value", ['5" vinyl', '"Heroes"', '"""Weird Al"" in 3-D"', 'the "Great"'])
def test_quotes_that_recbole_reads_well_pass(ring, value):
    file = ring / "ring" / "ring.item"
    file.write_text(file.read_text().replace(TITLES[4], value))
    check_quotes(file)
    assert len(ItemText.from_dataset(load(ring), "title")) == 25


@pytest.mark.parametrize("name", sorted(path.stem for path in (PROPERTIES / "dataset").glob("*.yaml")))
def test_every_dataset_yaml_loads_titles(name, request):
    yaml = PROPERTIES / "dataset" / f"{name}.yaml"
    own = {} if name == "ml-100k" else {"data_path": str(request.getfixturevalue("shared_data"))}
    config = Config(model="Pop", dataset=name, config_file_list=[str(yaml)], config_dict=own)
    # a few lines of the large files suffice to prove the columns
    dataset = create_dataset(_cut(config, name))
    text = ItemText.from_dataset(dataset, config["title_field"])
    assert config["prompt_instruction"].endswith(".")
    assert config["prompt_lead"].endswith(":")
    known = {
        "ml-100k": ("12", "The Usual Suspects"),
        "ml-1m": ("50", "The Usual Suspects"),
        "amazon-games": ("0", "Fire Emblem: The Sacred Stones"),
        "amazon-beauty": ("7806397051", "wawo 15 color professionl makeup eyeshadow"),
    }
    token, title = known[name]
    assert text.titles[text.tokens.index(token)] == title


def _cut(config, name):
    source, target = Path(config["data_path"]), Path("cut") / name
    target.mkdir(parents=True)
    for suffix in ("inter", "item"):
        with open(source / f"{name}.{suffix}", encoding="utf-8") as lines:
            (target / f"{name}.{suffix}").write_text("".join(lines.readline() for _ in range(2000)), encoding="utf-8")
    config["data_path"] = str(target)
    # the interactions kept may know few of the items kept
    config["item_inter_num_interval"] = "[0,inf)"
    return config


def with_columns(ring, rows, head="item_id:token\ttitle:token_seq\tkind:token\tprice:float"):
    """The ring with an item file of its own, and all of its columns loaded."""
    (ring / "ring" / "ring.item").write_text("\n".join([head, *map("\t".join, rows)]) + "\n", encoding="utf-8")
    names = [column.split(":")[0] for column in head.split("\t")]
    return load(ring, load_col={"inter": RING["load_col"]["inter"], "item": names})


def test_a_template_is_filled_in_by_column_and_leaves_out_what_is_empty(ring):
    rows = [[token, title, "", "2.5"] for token, title in zip(TOKENS, TITLES, strict=True)]
    rows[1][2:] = ["pets &amp; toys", "10"]
    dataset = with_columns(ring, rows)
    texts = filled_in("title: {title}; kind: {kind}; costs {price}", dataset, "title")
    by_token = dict(zip(dataset.field2id_token["item_id"], texts, strict=True))
    assert by_token["[PAD]"] == "" and by_token["i00"] == f"title: {TITLES[0]}; costs 2.5"
    assert by_token["i01"] == f"title: {TITLES[1]}; kind: pets & toys; costs 10"
    assert filled_in("{title}", dataset, "title") == list(ItemText.from_dataset(dataset, "title").titles)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("an item", "lite_item_template='an item': names no column, so that all items would read alike; there is {title}"),
        ("{brand}", "lite_item_template=brand: no such column in the item file of 'ring'; columns there: item_id, title, kind"),
        ("{kind}", "lite_item_template=kind: that column of the item file of 'ring' is not loaded. Add it to load_col"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_filled_in_is_refused(ring, template, message):
    file = ring / "ring" / "ring.item"
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join([f"{head}\tkind:token", *(f"{line}\tpet" for line in lines)]) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)):
        filled_in(template, load(ring), "title")


@given(st.lists(st.text(max_size=4), min_size=2, max_size=40, unique=True), st.integers(0, 5), st.randoms())
def test_every_item_gets_the_text_of_another_one_by_tokens_and_seed_alone(tokens, seed, order):
    giver = givers(["[PAD]", *tokens], seed)
    assert giver[0] == 0 and sorted(giver) == list(range(len(tokens) + 1))
    assert all(item != other for item, other in enumerate(giver) if item)
    moved = order.sample(tokens, len(tokens))
    again = givers(["[PAD]", *moved], seed)
    by_token = {token: tokens[other - 1] for token, other in zip(tokens, giver[1:], strict=True)}
    assert by_token == {token: moved[other - 1] for token, other in zip(moved, again[1:], strict=True)}


def test_another_seed_is_another_permutation_and_one_item_keeps_its_text():
    assert givers(["[PAD]", *TOKENS], 1) != givers(["[PAD]", *TOKENS], 2)
    assert givers(["[PAD]", "alone"], 1) == [0, 1]


def test_shuffled_titles_do_not_follow_the_order_of_the_file_and_are_said_once(ring, tmp_path, caplog):
    own = dict(zip(TOKENS, TITLES, strict=True))
    found = []
    for path in (ring, shuffled(ring, tmp_path / "other", seed=3)):
        dataset = load(path, shuffle_text=7)
        with caplog.at_level(logging.WARNING):
            text = ItemText.from_dataset(dataset, "title")
            ItemText.from_dataset(dataset, "title")
        said = [record.getMessage() for record in caplog.records if "shuffle_text=7" in record.getMessage()]
        assert len(said) == 1 and said[0].startswith("Item texts are shuffled")
        caplog.clear()
        found.append(dict(zip(text.tokens[1:], text.titles[1:], strict=True)))
        assert text.titles[0] == "" and sorted(text.titles[1:]) == sorted(TITLES)
        unmoved = ItemText.from_dataset(dataset, "title", shuffled=False)
        assert dict(zip(unmoved.tokens[1:], unmoved.titles[1:], strict=True)) == own
    assert found[0] == found[1] and all(found[0][token] != own[token] for token in TOKENS)


def test_all_columns_of_an_item_are_shuffled_together(ring):
    rows = [
        [token, title, title[:3], str(number)] for number, (token, title) in enumerate(zip(TOKENS, TITLES, strict=True))
    ]
    dataset = with_columns(ring, rows)
    template = "{title}; {kind}; {price}"
    own = filled_in(template, dataset, "title")
    dataset.config["shuffle_text"] = 0
    moved = filled_in(template, dataset, "title")
    assert moved[0] == "" and sorted(moved) == sorted(own)
    assert all(ours != theirs for ours, theirs in zip(moved[1:], own[1:], strict=True))


@pytest.mark.parametrize("value", [-1, 1.5, True, "yes"])
def test_what_is_no_seed_is_refused_also_under_recboles_own_config(ring, value):
    with pytest.raises(
        ValueError, match=rf"^shuffle_text={value}: is no seed; there are whole numbers.*Set shuffle_text"
    ):
        ItemText.from_dataset(load(ring, shuffle_text=value), "title")
