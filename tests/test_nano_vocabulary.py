"""kimi-nano's vocabulary: the package has the files that the generator makes; numbers are digits, labels one id."""

from __future__ import annotations

import random

import pytest

from kimi_native.byte_pairs import BYTE_TOKENS, count_pieces, learned_tokens
from kimi_native.folder_names import NANO_FOLDER
from kimi_native.nano import vocabulary
from kimi_native.nano.problems import LABELS
from kimi_native.nano.small_talk import TOPICS, WORDINGS, all_exchanges
from kimi_native.nano.world import KEYS, NOTES
from kimi_native.presets import PRESETS
from tokenizer_files import KIMI_SLOTS, random_text

RANKS = 1136


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.nano_tokenizer()


def test_vocabulary_in_the_package_is_the_one_made_anew():
    made = vocabulary.vocabulary_files()
    assert sorted(made) == ["tiktoken.model", "tokenizer_config.json"]
    for name, content in made.items():
        assert (NANO_FOLDER / name).read_bytes() == content, (
            f"{name} must be made anew: vocabulary.write_vocabulary()"
        )


def test_vocabulary_writes_where_it_is_told(tmp_path, tokenizer):
    vocabulary.write_vocabulary(tmp_path / "new")
    assert (tmp_path / "new" / "tiktoken.model").read_bytes().count(b"\n") == RANKS


def test_vocabulary_has_the_familys_control_tokens_after_its_ranks(tokenizer):
    assert tokenizer.vocab_size == RANKS + 256 == PRESETS["nano"]["vocab_size"]
    for offset, (name, special) in KIMI_SLOTS.items():
        assert tokenizer.control_ids[name] == RANKS + offset
        assert (RANKS + offset in tokenizer.special_ids) == special
    assert len(tokenizer.control_ids) == 256


def test_vocabulary_no_token_holds_a_digit_beside_anything(tokenizer):
    for token_id in range(RANKS):
        token = tokenizer.decode_bytes([token_id])
        assert len(token) == 1 or not any(chr(b).isdigit() for b in token)


def test_vocabulary_every_number_is_its_digits(tokenizer):
    digits = [tokenizer.encode(d)[0] for d in "0123456789"]
    for number in (0, 7, 10, 99, 100, 512, 999, 1000, 1234567):
        assert tokenizer.encode(str(number)) == [digits[int(d)] for d in str(number)]


def test_vocabulary_every_label_is_one_token(tokenizer):
    """At the start of a line, in the list and in what the model writes; each another."""
    ids = [tokenizer.encode(f"\n{label}:") for label in LABELS]
    assert {len(i) for i in ids} == {3}
    assert len({i[1] for i in ids}) == len(LABELS)
    assert all(tokenizer.encode(f"{a}: ")[0] == i[1] for a, i in zip(LABELS, ids, strict=True))


@pytest.mark.parametrize("name", [*KEYS, *NOTES])
def test_vocabulary_names_are_one_token(tokenizer, name):
    """In a list (after a space) and in a call (after a quote), so that a name is copied in one go."""
    assert len(tokenizer.encode(name)) == len(tokenizer.encode(" " + name)) == 1


def test_vocabulary_any_text_comes_back(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary_of_byte_pairs_is_the_textbooks():
    """aaabdaaabac: aa four times; then aaa and ab twice each, of which aaa has the smaller bytes; then aaa with b."""
    assert learned_tokens({"aaabdaaabac": 1}, 3) == (b"aa", b"aaa", b"aaab")
    assert learned_tokens({"ab": 1}) == (b"ab",)
    assert learned_tokens({}) == ()
    assert sorted(BYTE_TOKENS) == [bytes([b]) for b in range(256)]
    with pytest.raises(ValueError, match=r"ASCII \(got 'é'\)"):
        count_pieces("café")


# ---- small talk ----------------------------------------------------------------------------------------------------


def test_small_talk_has_a_few_hundred_wordings_each_with_one_answer():
    exchanges = all_exchanges()
    assert len({e.question for e in exchanges}) == len(exchanges) > 500
    assert all(e.answer and e.thought for e in exchanges)
    assert all(e.question == e.question.strip() for e in exchanges)
    assert not any(c in e.question for e in exchanges for c in "{|}")
    assert len(WORDINGS) == len(TOPICS)
