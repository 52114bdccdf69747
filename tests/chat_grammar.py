"""More answers than can be written by hand: every legal interleaving by a grammar, every failure in every place.

    answer   = thought spoken called end
    thought  = nothing | opened | unopened | empty | blank | twice
    spoken   = nothing | text | blank
    called   = nothing | one call | two calls | two sections | three calls with lines between
    end      = <|im_end|> | [EOS] | cut by the token limit

Each part knows what it means where it stands, so the expected answer is put together beside the text.
"""

from __future__ import annotations

import itertools

from chat_corpus import (
    ARGS,
    BEIJING,
    CALL,
    CALL_END,
    CLOSE,
    END,
    SECTION,
    SECTION_END,
    THINK,
    W0,
    W1,
    calls,
    one,
    out,
)

W2 = "functions.get_weather:2"

# name: text, reasoning, whether the answer is still thinking behind it
THOUGHTS = {
    "no thought": ("", "", True),
    "thought": (f"{THINK}h\nm {CLOSE}", "h\nm", False),
    "thought unopened": (f"hm{CLOSE}", "hm", False),
    "empty thought": (f"{THINK}{CLOSE}", "", False),
    "blank thought": (f"{THINK} \n{CLOSE}", "", False),
    "thought twice": (f"{THINK}a{CLOSE}{THINK}b 月{CLOSE}", "ab 月", False),
}
SPOKEN = {"silent": "", "spoke": "Ok é.", "blank": "\n "}
# name: text, the calls in it
CALLED = {
    "no call": ("", []),
    "one call": (SECTION + one(W0, BEIJING) + SECTION_END, [(W0, BEIJING)]),
    "two calls": (
        SECTION + one(W0, BEIJING) + one(W1, "{}") + SECTION_END,
        [(W0, BEIJING), (W1, "{}")],
    ),
    "two sections": (
        SECTION + one(W0, "{}") + SECTION_END + SECTION + one(W1, BEIJING) + SECTION_END,
        [(W0, "{}"), (W1, BEIJING)],
    ),
    "three calls in lines": (
        f"{SECTION}\n{one(W0, '{}')}\n{one(W1, '[1]')}\n{one(W2, '{}')}\n{SECTION_END}\n",
        [(W0, "{}"), (W1, "[1]"), (W2, "{}")],
    ),
}
ENDS = {"stop": (END, None), "EOS": ("<EOS>", None), "cut": ("", "length")}


def legal(thinks: bool):
    """name -> (text, ParsedOutput) of every sentence of the grammar; without thinking, of those that think nothing."""
    corpus = {}
    thoughts = THOUGHTS if thinks else {"": ("", "", False)}
    for names in itertools.product(thoughts, SPOKEN, CALLED, ENDS):
        (thought, reasoning, still_thinking) = thoughts[names[0]]
        spoken, (called, pairs), (end, reason) = (
            SPOKEN[names[1]],
            CALLED[names[2]],
            ENDS[names[3]],
        )
        content = "" if spoken.isspace() and pairs else spoken
        if still_thinking:
            reasoning, content = spoken.rstrip(), ""
        corpus[", ".join(filter(None, names))] = (
            thought + spoken + called + end,
            out(reasoning or None, content or None, calls(*pairs), reason),
        )
    return corpus


# ---- failures ------------------------------------------------------------------------------------------------------

# where a failure happens: text before it, reasoning, content, earlier calls
PLACES = {
    "in reasoning": (f"{THINK}a ", "a", None, []),
    "in unopened reasoning": ("a", "a", None, []),
    "after reasoning": (f"{THINK}a{CLOSE}", "a", None, []),
    "after content": (f"{THINK}a{CLOSE}b", "a", "b", []),
    "after a section": (f"{CLOSE}{SECTION}{one(W0, '{}')}{SECTION_END}", None, None, [(W0, "{}")]),
}
# name: text, its calls, whether the last is unfinished; the numbers are those of the list of known failures
FAILURES = {
    "6 section without </think>": (
        SECTION + one(W1, BEIJING) + SECTION_END,
        [(W1, BEIJING)],
        False,
    ),
    "6 call without section": (one(W1, BEIJING), [(W1, BEIJING)], False),
    "7 text before the call": (
        f"{SECTION}calling 月{one(W1, BEIJING)}{SECTION_END}",
        [(W1, BEIJING)],
        False,
    ),
    "7 text between calls": (
        f"{SECTION}{one(W1, '{}')}and{one(W2, BEIJING)}{SECTION_END}",
        [(W1, "{}"), (W2, BEIJING)],
        False,
    ),
    "7 text after the section": (
        f"{SECTION}{one(W1, BEIJING)}{SECTION_END}done",
        [(W1, BEIJING)],
        False,
    ),
    "7 large arguments": (
        f"{SECTION}{one(W1, '[' + '123,' * 60 + '0]')}{SECTION_END}",
        [(W1, "[" + "123," * 60 + "0]")],
        False,
    ),
    "7 newline in the id": (
        f"{SECTION}{one(chr(10) + W1 + chr(10), '{}')}{SECTION_END}",
        [(W1, "{}")],
        False,
    ),
    "7 markers in a row": (f"{SECTION}{SECTION}{CALL}{W1}{ARGS}{CALL_END}", [(W1, "{}")], False),
    "7 section end without its begin": (SECTION_END + one(W1, "{}"), [(W1, "{}")], False),
    "9 two sections": (
        f"{SECTION}{one(W1, '{}')}{SECTION_END}{SECTION}{one(W2, BEIJING)}{SECTION_END}",
        [(W1, "{}"), (W2, BEIJING)],
        False,
    ),
    "9 section in a section": (
        f"{SECTION}{one(W1, '{}')}{SECTION}{one(W2, BEIJING)}{SECTION_END}{SECTION_END}",
        [(W1, "{}"), (W2, BEIJING)],
        False,
    ),
    "9 section never ended": (f"{SECTION}{one(W1, BEIJING)}", [(W1, BEIJING)], False),
    "3 foreign id": (SECTION + one("call_abc", "{}") + SECTION_END, [("call_abc", "{}")], False),
    "3 dashes in the id": (
        SECTION + one("functions.a-b.c:0", "{}") + SECTION_END,
        [("functions.a-b.c:0", "{}")],
        False,
    ),
    "8 wrong counter": (
        SECTION + one("functions.get_weather:17", "{}") + SECTION_END,
        [("functions.get_weather:17", "{}")],
        False,
    ),
    "10 arguments that are no JSON": (
        SECTION + one(W1, '{"city": Beijing') + SECTION_END,
        [(W1, '{"city": Beijing')],
        False,
    ),
    "empty arguments": (SECTION + one(W1, "") + SECTION_END, [(W1, "{}")], False),
    "blank arguments": (SECTION + one(W1, " \n") + SECTION_END, [(W1, "{}")], False),
    "call end missing": (f"{SECTION}{CALL}{W1}{ARGS}[1]{SECTION_END}", [(W1, "[1]")], False),
    "arguments missing": (f"{SECTION}{CALL}{W1}{CALL_END}{SECTION_END}", [(W1, "{}")], False),
    "unnamed call": (SECTION + one("", "{}") + SECTION_END, [], False),
    "thinking between calls": (
        f"{SECTION}{one(W1, '{}')}{THINK}c{CLOSE}{one(W2, '{}')}{SECTION_END}",
        [(W1, "{}"), (W2, "{}")],
        False,
    ),
    "other control tokens": (
        f"<|im_middle|>{SECTION}[BOS]{CALL}{W1}<|im_user|>{ARGS}{{<|im_system|>}}{CALL_END}",
        [(W1, "{}")],
        False,
    ),
    "cut in the header": (f"{SECTION}{CALL}functions.get", [], True),
    "cut before the arguments": (f"{SECTION}{CALL}{W1}{ARGS}", [(W1, "")], True),
    "cut in the arguments": (f'{SECTION}{CALL}{W1}{ARGS} {{"c', [(W1, '{"c')], True),
}


def failing():
    """name -> (text, ParsedOutput): every failure in every place, stopped or, where it is a cut, cut."""
    corpus = {}
    for (failure, (text, pairs, unfinished)), place in itertools.product(FAILURES.items(), PLACES):
        before, reasoning, content, earlier = PLACES[place]
        end, reason = ("", "length") if unfinished else (END, None)
        corpus[f"{failure}, {place}"] = (
            before + text + end,
            out(reasoning, content, calls(*earlier, *pairs), reason, unfinished),
        )
    return corpus


LEGAL = legal(thinks=True)
LEGAL_PLAIN = legal(thinks=False)
FAILING = failing()
