"""The page of a measurement: read back by a parser that shares nothing with it, whatever the prompt spells."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from kimi_native import routing_page, routing_report
from kimi_native.routing import RoutedText, Routing
from kimi_native.routing_page import page
from kimi_native.token_roles import ROLES

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--",
    "]]>",
    '" onfocus="alert(1)',
    "'&lt;&amp;",
    "</p></section>",
    "<img src=x onerror=alert(1)>",
    "\u202eevil",
    "a\nb\n",
    "\t\x00\x1b[31m",
    "月 🙂",
    " ",
    "",
]
VOID = {"meta", "link", "br", "img", "input"}


def make_text(tokens, *, layers=3, topk=2, experts=8, prompt_tokens=None, seed=0):
    generator = np.random.default_rng(seed)
    n = len(tokens)
    chosen = [generator.permutation(experts)[:topk] for _ in range(n * layers)]
    return RoutedText(
        ids=list(range(n)),
        prompt_tokens=n if prompt_tokens is None else prompt_tokens,
        tokens=list(tokens),
        labels=[ROLES[i % len(ROLES)] for i in range(n)],
        experts=np.array(chosen, dtype=np.int32).reshape(n, layers, topk),
        weights=generator.random((n, layers, topk)).astype(np.float32),
    )


def make_routing(*texts, layers=3, experts=8):
    return Routing(tuple(range(1, layers + 1)), experts, ROLES, texts)


def made_page(routing, model="m"):
    return page(routing, routing.statistics(shuffles=2), model)


class Reader(HTMLParser):
    """What a browser would make of a page, its elements properly nested or an error."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes = [], [], []
        self.text, self.spans = {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))
            self.text.setdefault(self.open[-1], [])
        if tag == "span" and self.in_paragraph():
            self.spans.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]].append(data)
            if self.open[-1][0] == "span" and self.in_paragraph():
                self.spans[-1] += data

    def in_paragraph(self):
        return any(tag == "p" for tag, _ in self.open)


def token_spans(text):
    """Contents of the spans of the first text, by a parser."""
    (paragraph,) = re.findall(r'<p class="tokens">(.*?)</p>', text, re.DOTALL)[:1]
    return Reader(f"<p>{paragraph}</p>").spans


def test_page_escapes_what_the_prompt_spells():
    text = made_page(make_routing(make_text(HOSTILE)), "<b>\"&'")
    reader = Reader(text)
    plain = Reader(made_page(make_routing(make_text(["a"] * len(HOSTILE)))))
    assert reader.tags == plain.tags  # no more than a harmless prompt's
    assert reader.tags.count("script") == 2
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    assert "".join(reader.text[("title", None)]) == "Expert routing of <b>\"&'"
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "\x1b" not in text


def test_page_shows_every_token():
    spans = token_spans(made_page(make_routing(make_text(HOSTILE))))
    assert spans[:7] == HOSTILE[:7]
    assert spans[7:] == ["\ufffdevil", "a⏎b⏎", "␉␀␛[31m", "月 🙂", " ", ""]


def test_page_breaks_lines_where_tokens_do():
    text = made_page(make_routing(make_text(["a", "\n", "b", "c\n\n", "d"])))
    (paragraph,) = re.findall(r'<p class="tokens">(.*?)</p>', text, re.DOTALL)
    assert re.sub("<[^>]*>", "", paragraph) == "a⏎\nbc⏎⏎\nd"


def test_page_marks_what_the_model_said_and_control_tokens():
    text = made_page(make_routing(make_text(["p"] * 9, prompt_tokens=6)))
    (paragraph,) = re.findall(r'<p class="tokens">(.*?)</p>', text, re.DOTALL)
    classes = re.findall(r"<span(?: class=\"([a-z ]*)\")?>", paragraph)
    assert classes == ["special", *[""] * 5, "said", "special said", "said"]


def test_page_data_are_the_measurement():
    texts = make_text(["a"] * 5), make_text(["<b>"] * 4, seed=1)
    routing = make_routing(*texts)
    reader = Reader(made_page(routing))
    data = json.loads("".join(reader.text[("script", "data")]))
    assert (data["experts"], data["tokens"]) == (8, 9)
    assert data["ids"] == [*texts[0].ids, *texts[1].ids]
    assert [data["labels"][i] for i in data["label_of"]] == [*texts[0].labels, *texts[1].labels]
    chosen = np.concatenate([t.experts for t in texts])
    assert [[c[0] for c in token] for token in data["choices"]] == chosen.tolist()
    weights = np.concatenate([t.weights for t in texts])
    found = np.array([[c[1] for c in token] for token in data["choices"]])
    assert np.abs(found - weights).max() <= 0.0005 + 1e-9
    for layer, s in zip(data["layers"], routing.statistics(shuffles=2), strict=True):
        assert (layer["layer"], layer["counts"]) == (s.layer, s.counts.tolist())
        assert layer["label_counts"] == s.label_counts.tolist()
        assert np.abs(np.array(layer["shares"]) - s.shares).max() <= 5e-5 + 1e-12


def test_page_needs_nothing_else_and_may_load_nothing():
    reader = Reader(made_page(make_routing(make_text(["a"]))))
    names = {name for name, _ in reader.attributes}
    assert not names & {"src", "href", "action", "data", "srcset", "style"}
    (policy,) = [v for n, v in reader.attributes if n == "content" and "default-src" in v]
    script = "".join(reader.text[("script", None)])
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    style = "".join(reader.text[("style", None)])
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert not re.search(
        r"fetch|XMLHttpRequest|innerHTML|eval|document\.write", script.split("\n", 2)[2]
    )


def test_page_script_finds_what_it_asks_for():
    text = made_page(make_routing(make_text(["a", "b"])))
    reader = Reader(text)
    script = "".join(reader.text[("script", None)])
    ids = {value for name, value in reader.attributes if name == "id"}
    assert set(re.findall(r'getElementById\("(\w+)"\)', script)) <= ids
    data = json.loads("".join(reader.text[("script", "data")]))
    assert set(re.findall(r"\bdata\.(\w+)", script)) == set(data)
    used = set(re.findall(r"\b(?:layer|l|data\.layers\[layer\])\.(\w+)\b", script))
    assert used - {"length", "expert"} <= {*data["layers"][0], "layer"}
    colors = set(re.findall(r'color\("(--\w+)"\)', script))
    style = "".join(reader.text[("style", None)])
    for name in colors | {f"--r{i}" for i in range(5)}:
        assert style.count(f"{name}:") == 2, name  # light and dark


def test_page_can_be_used_with_a_keyboard():
    reader = Reader(made_page(make_routing(make_text(["a"]))))
    assert ("role", "application") in reader.attributes
    assert reader.attributes.count(("tabindex", "0")) == 2
    assert reader.attributes.count(("aria-live", "polite")) == 2
    labels = {value for name, value in reader.attributes if name == "aria-labelledby"}
    assert labels <= {value for name, value in reader.attributes if name == "id"}
    script = "".join(reader.text[("script", None)])
    for key in (
        "ArrowLeft",
        "ArrowRight",
        "ArrowUp",
        "ArrowDown",
        "Home",
        "End",
        "Enter",
        "Escape",
    ):
        assert key in script


def test_page_of_many_tokens_shows_the_first(monkeypatch):
    monkeypatch.setattr(routing_page, "SHOWN_TOKENS", 7)
    routing = make_routing(*(make_text(["x"] * 5, seed=s) for s in range(3)))
    text = made_page(routing)
    assert [p.count("<span") for p in re.findall(r'<p class="tokens">.*?</p>', text)] == [5, 2]
    assert "The first 7 of 15 are shown." in text
    data = json.loads("".join(Reader(text).text[("script", "data")]))
    assert (len(data["choices"]), len(data["ids"]), len(data["label_of"])) == (7, 7, 7)
    assert sum(data["layers"][0]["counts"]) == 15 * 2


# ---- the report -----------------------------------------------------------------------------------------------------


def test_report_is_json_without_nan():
    routing = make_routing(make_text(HOSTILE[:2], experts=8))
    found = routing_report.report(routing, routing.statistics(shuffles=1), "m")
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again == found
    layer = found["layers"][0]
    assert [w is None for w in layer["mean_weights"]] == [c == 0 for c in layer["counts"]]
    assert found["label_tokens"] == {name: int(name in ROLES[:2]) for name in ROLES}
    assert found["label_entropy"] == 1.0
    assert found["texts"][0]["tokens"] == HOSTILE[:2]


def test_report_names_the_busiest_experts():
    text = make_text(["a"] * 4, layers=1)
    text.experts[:] = np.array([[5, 2], [5, 2], [5, 7], [5, 7]]).reshape(4, 1, 2)
    (row,) = routing_report.table(make_routing(text, layers=1).statistics(shuffles=1))
    assert row[0] == "1"
    assert row[1] == "4.00"
    assert row[4] == "5"
    assert row[-1] == "5 (4.0), 2 (2.0), 7 (2.0)"
    assert len(row) == len(routing_report.HEADER)


@pytest.mark.parametrize("count", [1, 2])
def test_report_lines_say_how_much_there_was(count):
    routing = make_routing(*[make_text(["a"] * 1500)] * count)
    texts = "1 text" if count == 1 else "2 texts"
    assert routing_report.summary(routing) == (
        f"{1500 * count:,} tokens of {texts}; each chooses 2 of 8 experts in each of 3 layers"
    )
