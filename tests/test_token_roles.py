"""Labels of tokens: a conversation's are told by the prompt it is made of, a text's by its characters."""

from __future__ import annotations

import pytest

from kimi_native.chat.template import FORMATS, render
from kimi_native.errors import RequestError
from kimi_native.token_roles import (
    CHARACTERS,
    ROLES,
    characters,
    label_names,
    token_labels,
    token_roles,
)
from tokenizer_files import small_tokenizer

CALL = {"id": "functions.add:0", "function": {"name": "add", "arguments": '{"a": 17}'}}
MESSAGES = [
    {"role": "system", "content": "SSSS"},
    {"role": "user", "content": "UUUU"},
    {"role": "assistant", "content": "TTTT", "reasoning_content": "RRRR", "tool_calls": [CALL]},
    {"role": "tool", "content": "OOOO", "tool_call_id": "functions.add:0"},
    {"role": "tool", "content": "OOOO", "tool_call_id": "functions.add:0", "name": "add"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
MARK = {"S": "system", "U": "user", "T": "text", "R": "reasoning", "O": "result", "7": "call"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def by_role(ids, tokenizer):
    """Role -> the text of its runs."""
    runs = []
    for i, role in zip(ids, token_roles(ids, tokenizer), strict=True):
        if not runs or runs[-1][0] != role:
            runs.append((role, []))
        runs[-1][1].append(i)
    return [(role, tokenizer.decode(run)) for role, run in runs]


@pytest.mark.parametrize("format", [f for f in FORMATS if FORMATS[f].tools])
def test_roles_of_a_conversation_are_those_it_is_made_of(tokenizer, format):
    keep = {} if FORMATS[format].thinking == "no" else {"keep_thinking": "all"}
    ids = render(MESSAGES, format=format, tokenizer=tokenizer, tools=TOOLS, **keep)
    runs = by_role(ids, tokenizer)
    for mark, role in MARK.items():
        if mark == "R" and not keep:
            continue
        holders = {found for found, text in runs if mark * (1 if mark == "7" else 4) in text}
        assert holders == {role}, mark
    assert [text for role, text in runs if role == "call"] == ["functions.add:0", '{"a": 17}']
    results = [text for role, text in runs if role == "result"]
    assert results == ["## Return of functions.add:0\nOOOO"] * 2


def test_roles_headers_are_special(tokenizer):
    ids = render(MESSAGES[1:2], format="k2.5", tokenizer=tokenizer, thinking=False)
    assert by_role(ids, tokenizer) == [
        ("special", "<|im_user|>user<|im_middle|>"),
        ("user", "UUUU"),
        ("special", "<|im_end|><|im_assistant|>assistant<|im_middle|><think></think>"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|im_assistant|>a<|im_middle|><think>R", ["special"] * 4 + ["reasoning"]),
        ("a<think>b", ["text", "special", "text"]),  # in no turn the token is all there is
        ("<|im_user|>u<|im_middle|><think>b", ["special"] * 4 + ["user"]),
        ("<|im_middle|>b<|im_end|>c", ["special", "text", "special", "text"]),
        ("", []),
    ],
)
def test_roles_of_cut_conversations(tokenizer, text, expected):
    ids = tokenizer.encode_with_control(text)
    assert token_roles(ids, tokenizer) == expected


@pytest.mark.parametrize(
    ("token", "kind"),
    [
        (b" the", "words"),
        ("月".encode(), "words"),
        (b"00", "digits"),
        (b' "', "punctuation"),
        (b"\n\n", "spaces"),
        (b"", "spaces"),
        (b"\xe6\x9c", "bytes"),
        (b"a1", "words"),
        (b"1)", "digits"),
        (b"a)))", "punctuation"),
        ("é".encode(), "words"),
        (b"\x00", "punctuation"),
    ],
)
def test_characters_of_a_token(token, kind):
    assert characters(token) == kind
    assert kind in CHARACTERS


def test_labels_follow_what_the_texts_are(tokenizer):
    chat = render(MESSAGES[1:2], format="k2.5", tokenizer=tokenizer)
    raw = tokenizer.encode("the 00")
    assert label_names([raw], tokenizer) == CHARACTERS
    assert label_names([raw, chat], tokenizer) == ROLES
    assert label_names([chat], tokenizer, "characters") == CHARACTERS
    assert label_names([raw], tokenizer, "roles") == ROLES
    assert set(token_labels(raw, tokenizer, ROLES)) == {"text"}
    found = token_labels([*raw, tokenizer.control_ids["<|im_end|>"]], tokenizer, CHARACTERS)
    assert found[-1] == "special"
    assert "digits" in found
    with pytest.raises(RequestError, match=r"labels must be one of auto, roles, characters \(got"):
        label_names([raw], tokenizer, "words")
