"""A measurement as one HTML page: loads to look into, the tokens in the colors of their experts, and the table.

The page holds all it needs and may load nothing: its policy allows this one script, by its hash. Whatever comes from
the prompt is escaped, as text and inside the script's data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_native.routing_report import HEADER, label_line, summary, table
from kimi_native.routing_statistics import LayerStatistics

if TYPE_CHECKING:
    from kimi_native.routing import RoutedText, Routing

SHOWN_TOKENS = 2000  # of K2's size a page with as many has 11 MB
_HERE = Path(__file__)

_MEANING = {
    "max/mean": "load of the busiest expert over the mean load; 1 is balance",
    "variation": "standard deviation of the loads over their mean; 0 is balance",
    "entropy": "of the load, over the logarithm of the number of experts; 1 is balance",
    "never": "experts that no token chose",
    "bits": "what a token's expert tells about its label, less what it seems to tell by chance",
    "by chance": "the same estimate with the labels shuffled among the tokens",
    "busiest": "experts with the largest loads, and these over the mean",
}


def page(routing: Routing, statistics: Sequence[LayerStatistics], model: str) -> str:
    """The page as text. The first SHOWN_TOKENS tokens are shown; loads and table are of all."""
    shown = _shown_texts(routing)
    script = _asset("routing_page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = f"Expert routing of {model}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_asset("routing_page.css")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="soft">{escape(summary(routing))}.</p>
</header>
<main>
{_map_section(statistics)}
{_token_section(routing, statistics, shown)}
{_table_section(routing, statistics)}
</main>
<script type="application/json" id="data">{_json(_data(routing, statistics, shown))}</script>
<script>{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return _HERE.with_name(name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


# ---- sections -------------------------------------------------------------------------------------------------------


def _map_section(statistics: Sequence[LayerStatistics]) -> str:
    top = max(s.max_over_mean for s in statistics)
    return f"""<section aria-labelledby="loads">
<h2 id="loads">Load: layers down, experts across</h2>
<div><canvas id="map" tabindex="0" role="application"
 aria-label="Heat map of loads; arrow keys move, Enter shows the tokens of an expert"
 aria-describedby="cell"></canvas></div>
<div class="legend"><span>load / mean: 0</span><span class="ramp"></span><span>{top:.1f}</span>
<span><span class="swatch never"></span> chosen by no token</span>
<span><kbd>←</kbd> <kbd>↑</kbd> <kbd>↓</kbd> <kbd>→</kbd> move,
 <kbd>Enter</kbd> or a click shows the tokens of an expert, <kbd>Esc</kbd> all</span></div>
<output id="cell" aria-live="polite"></output>
<noscript><p>Without JavaScript there are the tokens and the table, without colors.</p></noscript>
</section>"""


def _token_section(
    routing: Routing, statistics: Sequence[LayerStatistics], shown: list[tuple[RoutedText, int]]
) -> str:
    options = [
        f'<option value="{i}">experts of layer {s.layer}</option>' for i, s in enumerate(statistics)
    ]
    count = sum(number for _, number in shown)
    cut = (
        ""
        if count == routing.num_tokens
        else f" The first {count:,} of {routing.num_tokens:,} are shown."
    )
    texts = []
    for place, (text, number) in enumerate(shown, 1):
        heading = f"<h3>Text {place}</h3>\n" if len(routing.texts) > 1 else ""
        spans = "".join(_span(text, i) for i in range(number))
        texts.append(f'{heading}<p class="tokens">{spans}</p>')
    return f"""<section aria-labelledby="text">
<h2 id="text">Tokens</h2>
<p><label>Color by <select id="by">{"".join(options)}<option value="label">label</option></select></label>
<span class="soft">A token has the color of its heaviest expert; the line under it is all of them by weight.
 What the model said is bold.{cut}</span></p>
{"".join(texts)}
<output id="token" aria-live="polite">Point at a token, or go from one to the next with the arrow keys.</output>
</section>"""


def _span(text: RoutedText, index: int) -> str:
    kinds = ["special"] if text.labels[index] == "special" else []
    kinds += ["said"] if index >= text.prompt_tokens else []
    attribute = f' class="{" ".join(kinds)}"' if kinds else ""
    shown = escape("".join(map(_visible, text.tokens[index])))
    ends_line = text.tokens[index].endswith("\n")
    return f"<span{attribute}>{shown}</span>" + ("\n" if ends_line else "")


def _visible(character: str) -> str:
    """A character that would not be seen as a sign for it."""
    if character == "\n":
        return "⏎"
    if ord(character) < 32:
        return chr(0x2400 + ord(character))
    return character if character == " " or character.isprintable() else "\N{REPLACEMENT CHARACTER}"


def _table_section(routing: Routing, statistics: Sequence[LayerStatistics]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in HEADER)
    rows = [
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table(statistics)
    ]
    meaning = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _MEANING.items())
    return f"""<section aria-labelledby="numbers">
<h2 id="numbers">Numbers</h2>
<div class="scroll" tabindex="0" role="region" aria-labelledby="numbers">
<table><thead><tr>{head}</tr></thead>
<tbody>
{chr(10).join(rows)}
</tbody></table></div>
<p class="soft">Tokens by label: {escape(label_line(routing))} of entropy, more than which no expert can tell.</p>
<details><summary>What they mean</summary><dl>{meaning}</dl></details>
</section>"""


# ---- data -----------------------------------------------------------------------------------------------------------


def _shown_texts(routing: Routing) -> list[tuple[RoutedText, int]]:
    """The texts that the page shows, and of each the number of tokens."""
    shown, room = [], SHOWN_TOKENS
    for text in routing.texts:
        if room > 0:
            shown.append((text, min(room, len(text.ids))))
            room -= len(text.ids)
    return shown


def _data(
    routing: Routing, statistics: Sequence[LayerStatistics], shown: list[tuple[RoutedText, int]]
) -> dict[str, Any]:
    place = {name: i for i, name in enumerate(routing.label_names)}
    return {
        "experts": routing.num_experts,
        "tokens": routing.num_tokens,
        "labels": list(routing.label_names),
        "layers": [
            {
                "layer": s.layer,
                "counts": s.counts.tolist(),
                "shares": [round(x, 4) for x in s.shares.tolist()],
                "mean_weights": [
                    0 if math.isnan(w) else round(w, 4) for w in s.mean_weights.tolist()
                ],
                "label_counts": s.label_counts.tolist(),
            }
            for s in statistics
        ],
        "ids": [i for text, number in shown for i in text.ids[:number]],
        "label_of": [place[name] for text, number in shown for name in text.labels[:number]],
        "choices": [token for text, number in shown for token in _choices(text, number)],
    }


def _choices(text: RoutedText, number: int) -> list[list[list[Any]]]:
    """[tokens][layers]: the experts and their weights."""
    experts = text.experts[:number].tolist()
    weights = text.weights[:number].astype(np.float64).round(3).tolist()
    return [
        [list(pair) for pair in zip(*token, strict=True)]
        for token in zip(experts, weights, strict=True)
    ]
