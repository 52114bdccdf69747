"""Every answer of the corpus, cut everywhere: at each token, at each character, and inside each character."""

from __future__ import annotations

import itertools

import pytest

from chat_corpus import PLAIN, THINKING
from chat_grammar import FAILING, LEGAL, LEGAL_PLAIN
from kimi_native.chat.parser import OutputParser, merge_events, parse
from kimi_native.tokenizer import load_tokenizer
from naive_parser import naive_parse, to_ids
from tokenizer_files import SLOTS_WITHOUT_THINK, published_folder, small_tokenizer

# format -> name -> (text, what it means)
CORPUS = {
    "k2-thinking": {**THINKING, **LEGAL, **FAILING},
    "k2-instruct": {**PLAIN, **LEGAL_PLAIN},
}
CASES = [(format, name) for format, corpus in CORPUS.items() for name in corpus]
# What control ids do inside a character, or THINK where it is text and so part of the arguments.
ONLY_AS_IDS = {"marker inside a character", "thinking inside arguments"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def without_think(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), SLOTS_WITHOUT_THINK)


@pytest.fixture(scope="module")
def published():
    return load_tokenizer(published_folder())


def ids_cut_at_characters(tokenizer, text):
    """The different ways to write the text in ids when no token may reach over one of its characters' borders."""
    found = {tuple(to_ids(tokenizer, text, by_byte=True)), tuple(to_ids(tokenizer, text, False))}
    for cut in range(1, len(text)):
        inside_name = any(
            text.rfind(opening, 0, cut) > text.rfind(closing, 0, cut)
            for opening, closing in (("<", ">"), ("[", "]"))
        )
        if not inside_name:
            halves = [to_ids(tokenizer, half, False) for half in (text[:cut], text[cut:])]
            found.add((*halves[0], *halves[1]))
    return sorted(found)


def shortened(tokenizer, format, name):
    """A case; of a long one the beginning, which ends inside a call, with what the oracle makes of it."""
    text, expected = CORPUS[format][name]
    if len(text) <= 400:
        return text, expected
    return text[:400], naive_parse(tokenizer, to_ids(tokenizer, text[:400], False), True)


def test_corpus_has_two_hundred_different_answers():
    assert len({text for text, _ in CORPUS["k2-thinking"].values()}) >= 400
    assert len({text for text, _ in CORPUS["k2-instruct"].values()}) >= 45
    failures = {int(name.split()[0]) for name in FAILING if name[0].isdigit()}
    assert failures == {3, 6, 7, 8, 9, 10}  # 1, 2, 4 and 5 are failures of prompts


@pytest.mark.parametrize(("format", "name"), CASES)
def test_answer_means_the_same_wherever_its_text_is_cut_into_ids(small, format, name):
    text, expected = shortened(small, format, name)
    for ids in ids_cut_at_characters(small, text):
        assert parse(small, ids, format=format) == expected


@pytest.mark.parametrize(("format", "name"), CASES)
def test_answer_cut_at_any_token_is_what_the_oracle_reads(small, format, name):
    """What an end at the cut makes of it; before that, what the two halves say is what the whole says."""
    text, _ = CORPUS[format][name]
    ids = to_ids(small, text[:300], by_byte=False)
    whole = OutputParser(small, format=format)
    said = [whole.push(token_id) for token_id in ids]
    for cut in range(len(ids) + 1):
        parser = OutputParser(small, format=format)
        assert [parser.push(token_id) for token_id in ids[:cut]] == said[:cut]
        ended = merge_events([*itertools.chain(*said[:cut]), *parser.finish()])
        assert ended == naive_parse(small, ids[:cut], format == "k2-thinking"), cut


@pytest.mark.parametrize("name", [n for n in CORPUS["k2-thinking"] if n not in ONLY_AS_IDS])
def test_think_found_as_text_means_the_same_wherever_it_is_cut(small, without_think, name):
    text, expected = shortened(small, "k2-thinking", name)
    for ids in ids_cut_at_characters(without_think, text):
        assert parse(without_think, ids, format="k2-thinking") == expected


@pytest.mark.parametrize("format", CORPUS)
def test_answers_cut_into_published_ids_mean_the_same(published, format):
    for name in CORPUS[format]:
        text, expected = shortened(published, format, name)
        for ids in ids_cut_at_characters(published, text):
            assert parse(published, ids, format=format) == expected, name
