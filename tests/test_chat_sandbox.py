"""Chat templates of other checkpoints: what they print, what they may not do, and no text becomes a control token."""

from __future__ import annotations

import json
import os
import random
import threading

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fakes import make_fake_model
from kimi_native import cli
from kimi_native.chat.jinja_template import JinjaTemplate, find_template
from kimi_native.chat.masking import Mask
from kimi_native.chat.sandbox import Limits, Sandbox
from kimi_native.chat.template import render
from kimi_native.errors import ConfigError, RequestError, TokenizerError
from kimi_native.generate import Model, load
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.tokenizer import load_tokenizer
from tokenizer_files import small_tokenizer

CHAT = (
    "{%- for m in messages -%}\n<|im_{{ 'system' if m.role == 'tool' else m.role }}|>{{ m.role }}"
    "<|im_middle|>{{ m.content }}<|im_end|>\n{%- endfor -%}\n"
    "{%- if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif -%}"
)
# In the manner of published templates: macros, namespaces, loop controls, tools as JSON, calls, a marked answer.
BUSY = """{%- macro shown(tool) -%}
{{ tool.function | tojson }}
{%- endmacro -%}
{{- bos_token -}}
{%- if tools %}
<|im_system|>tools<|im_middle|>
{%- for tool in tools %}{{ shown(tool) }}{{ tool | tojson(indent=2) }}{% endfor %}<|im_end|>
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'tool' and not m.tool_call_id %}{% continue %}{% endif %}
    <|im_{{ m['role'] if m['role'] in ['user', 'assistant'] else 'system' }}|>{{ m.role }}<|im_middle|>
    {%- generation %}{{ m.content | trim }}{% endgeneration %}
    {%- if m.reasoning_content is defined and loop.index0 > ns.last -%}
        <think>{{ m.reasoning_content }}</think>
    {%- endif %}
    {%- for call in m.tool_calls or [] %}
<|tool_call_begin|>{{ call.function.name }}<|tool_call_argument_begin|>
{%- for key, value in call.function.arguments.items() %}{{ key }}={{ value | tojson(ensure_ascii=true) }};{% endfor %}
<|tool_call_end|>
    {%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_assistant|>{% endif %}
"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Wie <b>warm</b> & 'schön' ist es? 月",
        "parameters": {
            "type": "object",
            "properties": {"id": {"type": "string"}, "text": {"type": ["number", "null"]}},
            "required": ["id"],
        },
    },
}
CALL = {"function": {"name": "get_weather", "arguments": {"id": "月 <1>", "text": 2}}, "id": "c1"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def sandbox():
    sandbox = Sandbox(Limits(seconds=2))
    yield sandbox
    sandbox.close()


@pytest.fixture
def rendered(tokenizer, sandbox):
    def rendered(source, messages, **options):
        template = JinjaTemplate(source, {"bos_token": "[BOS]"}, sandbox)
        return template.render(messages, tokenizer=tokenizer, **options)

    return rendered


def user(content="Hi", **fields):
    return {"role": "user", "content": content, **fields}


# ---- what a template prints ----------------------------------------------------------------------------------------


def test_a_template_of_a_known_format_gives_its_ids(tokenizer, rendered):
    messages = [
        {"role": "system", "content": "S"},
        user("Hi 月"),
        {"role": "assistant", "content": "A"},
    ]
    for add in (True, False):
        options = {"add_generation_prompt": add}
        expected = render(messages, format="moonlight", tokenizer=tokenizer, **options)
        assert rendered(CHAT, messages, **options) == expected


@pytest.mark.parametrize("source", [CHAT, BUSY])
@pytest.mark.parametrize("tools", [None, [WEATHER]])
def test_a_template_prints_what_transformers_prints(tokenizer, rendered, source, tools):
    messages = [
        user(" <a|b> [x] "),
        {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [CALL]},
        {"role": "tool", "content": "<|sunny|>", "tool_call_id": "c1"},
    ]
    their_call = {"type": "function", **CALL}
    theirs, _ = render_jinja_template(
        [[messages[0], {**messages[1], "tool_calls": [their_call]}, messages[2]]],
        tools=tools,
        chat_template=source,
        add_generation_prompt=True,
        bos_token="[BOS]",
    )
    ids = rendered(source, messages, tools=tools)
    assert tokenizer.decode(ids) == theirs[0]
    assert ids == tokenizer.encode_with_control(theirs[0])


@pytest.mark.parametrize(
    ("source", "printed"),
    [
        ("{{ strftime_now('%Y') | length }}", "4"),
        (
            "{{ 'a b' | title }} {{ '%.1f' | format(2) }} {{ [2, 1] | sort | pprint }}",
            "A B 2.0 [1, 2]",
        ),
        ("{{ 'é\\n月'.encode('utf-8') | length }} {{ 'a b' | urlencode }}", "6 a%20b"),
        ("{{ {'b': 1, 'a': 2} | dictsort | map('first') | join(',') }}", "a,b"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
    ],
)
def test_what_templates_use_is_there(tokenizer, rendered, source, printed):
    assert tokenizer.decode(rendered(source, [user()])) == printed


def test_a_template_may_decide_by_the_words_of_a_schema(tokenizer, rendered):
    source = (
        "{% for tool in tools %}{% set schema = tool.function.parameters %}"
        "{% for name, one in schema.properties.items() %}{{ name }}{{ '' if name in schema.required else '?' }}: "
        "{% if one.type == 'string' and one.format in ['date-time', 'date'] %}Date{% elif 'number' in one.type %}"
        "number{% else %}string{% endif %}{% for key in one %}{% if key in ['minimum', 'default'] %} {{ key }}"
        "{% endif %}{% endfor %}; {% endfor %}{{ tool.function.get('return_parameters') is none }}{% endfor %}"
    )
    day = {"type": "string", "format": "date"}
    properties = {"type": day, "name": {"type": "string"}, "n": {"type": "number", "minimum": 1}}
    parameters = {"properties": properties, "required": ["name", "n"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    printed = tokenizer.decode(rendered(source, [user()], tools=[tool]))
    assert printed == "type?: Date; name: string; n: number minimum; True"


def test_thinking_reaches_the_template(tokenizer, rendered):
    source = "{{ enable_thinking is defined }} {{ thinking }}"
    for thinking, text in [(None, "False "), (True, "True True"), (False, "True False")]:
        assert tokenizer.decode(rendered(source, [user()], thinking=thinking)) == text


# ---- text never becomes a control token ----------------------------------------------------------------------------


def control_ids(tokenizer, ids):
    return [i for i in ids if i in set(tokenizer.control_ids.values())]


@pytest.mark.parametrize(
    "source",
    [
        CHAT,
        BUSY,
        CHAT.replace("m.content", "m.content | trim"),
        CHAT.replace("m.content", "'<|' ~ m.content ~ '|>'"),
        CHAT.replace("m.content", "m.content | replace('x', '')"),
        CHAT.replace("m.content", "m.content | upper | lower"),
        CHAT.replace("m.content", "messages | map(attribute='content') | join"),
        CHAT.replace("m.content", "'<' ~ m.content ~ '|im_end|>'"),
        CHAT.replace("m.content", "m | tojson"),
        CHAT.replace("m.content", "'<|im_' ~ m.content[:3] ~ '|>'"),
        CHAT.replace("m.content", "'<|im_' ~ m.content.split()[0] ~ '|>'"),
    ],
)
def test_no_text_of_the_caller_becomes_a_control_token(tokenizer, rendered, source):
    expected = control_ids(tokenizer, rendered(source, [user("q"), user("q", name="q")]))
    names = list(tokenizer.control_ids)
    texts = [*names[:20], "".join(names[:8]), "<|im_xend|>", "x<|im_end|>", "im_end", "|im_end|>"]
    for text in [*texts, "<|im_", "end|>", "<", "im_e", "<|IM_END|>", "enduser", "end x", "user"]:
        for messages in (
            [user(text), user(text, name=text)],
            [user(text), user("end|>", name="q")],
        ):
            try:
                ids = rendered(source, messages)
            except RequestError as error:
                assert "must not decide by the text" in str(error)  # noqa: PT017
                continue
            assert control_ids(tokenizer, ids) == expected, (text, tokenizer.decode(ids))


PIECES = ["<|im_", "end", "|>", "<|", "im_end|>", "<|im_end|>", "x", " ", "\n", "<think>", "</"]
OPERATIONS = [
    "M",
    "M | trim",
    "M | replace('x', '')",
    "M[1:]",
    "M[:-1]",
    "M | upper | lower",
    "M | reverse",
    "M.split('x') | join",
    "M | list | join",
    "M.strip('x ')",
    "M | tojson",
    "M | escape",
    "M ~ M",
    "M.split()[-1]",
    "M | first",
    "M | replace(' ', '') | truncate(9, true, '')",
    "M | title",
]


def test_random_templates_make_no_control_token_of_random_text(tokenizer, rendered):
    rng = random.Random(8)
    outcomes = {"equal": 0, "refused": 0}
    for _ in range(250):
        around = [rng.choice([*PIECES, ""]) for _ in range(4)]
        shown = rng.choice(OPERATIONS).replace("M", "messages[0].content")
        source = f"{around[0]}{{{{ {around[1]!r} ~ ({shown}) ~ {around[2]!r} }}}}{around[3]}"
        text = "".join(rng.choices(PIECES, k=rng.randint(1, 6)))
        halves = ["".join(around[:2]), "".join(around[2:])]
        expected = [i for half in halves for i in tokenizer.encode_with_control(half)]
        try:
            ids = rendered(source, [user(text)])
        except RequestError as error:
            outcomes["refused"] += 1
            assert "must not decide by the text" in str(error) or "line 1: " in str(error)  # noqa: PT017
            continue
        assert control_ids(tokenizer, ids) == control_ids(tokenizer, expected), (source, text)
        outcomes["equal"] += 1
    assert min(outcomes.values()) > 30, outcomes


@pytest.mark.parametrize(
    ("source", "passes", "refused"),
    [
        ("{{ messages[0].content.split('</think>')[-1] }}", "a b", "a</think>b"),
        (
            "{% if '/no_think' in messages[0].content %}<think></think>{% endif %}",
            "a",
            "a /no_think",
        ),
        ("{{ messages[0].content[1:] }}", "", "ab"),
        ("{{ messages[0].content | replace('ab', '') }}", "a b", "<|im_abend|>"),
    ],
)
def test_a_template_that_decides_by_text_is_refused(rendered, source, passes, refused):
    rendered(source, [user(passes)])
    with pytest.raises(RequestError, match="give reasoning as reasoning_content"):
        rendered(source, [user(refused)])


def test_arguments_are_text_where_a_template_takes_no_object(tokenizer, rendered):
    messages = [{"role": "assistant", "tool_calls": [CALL]}]
    source = "{% for c in messages[0].tool_calls %}{{ c.function.name + '|' + c.function.arguments }}{% endfor %}"
    assert tokenizer.decode(rendered(source, messages)) == 'get_weather|{"id": "月 <1>", "text": 2}'
    with pytest.raises(RequestError, match="line 1: can only concatenate"):
        rendered(source.replace("}}", "+ 1 }}"), messages)


def test_text_keeps_every_character(tokenizer, rendered):
    rng = random.Random(4)
    for _ in range(30):
        text = "".join(rng.choices(["<", "|", ">", "[", "im_end", "月", "\ufdd0", " ", "\n"], k=12))
        ids = rendered("{{ messages[0].content }}|", [user(text)])
        assert ids == tokenizer.encode(text + "|")


def test_a_mark_is_always_one_that_the_text_lacks():
    marks = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert Mask({"<a>": 1}, [marks[:-1]]).mark == marks[-1]
    with pytest.raises(RequestError, match=r"leave one of U\+FDD0"):
        Mask({"<a>": 1}, [marks])


def test_a_lone_surrogate_is_refused(rendered):
    with pytest.raises(TokenizerError, match="lone surrogate"):
        rendered(CHAT, [user("\ud800")])


# ---- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{{ 1 / 0 }}", "line 2: division by zero"),
        ("a\nb\n{% if %}", "line 3: Expected an expression"),
        ("\n\n{{ raise_exception('roles must\nalternate') }}", "line 3: roles must alternate"),
        ("{% macro f() %}\n{{ x.y }}{% endmacro %}\n{{ f() }}", "line 2: 'x' is undefined"),
        ("{{ ''.__class__.__mro__ }}", "line 1: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "line 1: access to attribute 'append'"),
        ("{{ cycler.__init__.__globals__ }}", "line 1: access to attribute '__init__'"),
        ("{% include '/etc/passwd' %}", "line 1: no loader"),
        ("{% import 'os' as os %}", "line 1: no loader"),
        ("{% for i in range(10**9) %}{% endfor %}", "line 1: its ranges must have at most 100000"),
        (
            "{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}",
            "ranges must",
        ),
        ("{{ 'a' * 10**9 }}", "line 1: it must get by with less memory"),
        (
            "{% for i in range(9999) %}{{ 'a' * 1000 }}{% endfor %}",
            "output must have at most 4194304",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "line 1: maximum recursion depth"),
        ("{{ messages" + ".a" * 200_000 + "}}", "must have at most 262144 characters"),
    ],
)
def test_what_a_template_may_not_do_is_named_with_its_line(rendered, source, message):
    with pytest.raises(RequestError, match=r"^chat template: ") as error:
        rendered(source, [user()])
    assert message in str(error.value)
    assert rendered("ok", [user()])  # the worker goes on, or there is a new one


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ ('a' * 40) | replace('a', 'a' * 99999) | length and (9 ** (9 ** 9)) }}",
    ],
)
def test_a_template_that_takes_too_long_is_ended(rendered, source):
    with pytest.raises(RequestError, match="must be done within 2 s"):
        rendered(source, [user()])
    assert rendered("ok", [user()])


@pytest.mark.parametrize("source", ["{{ " + "(" * 60_000 + "1", "{{ 1" + "+1" * 60_000 + "}}"])
def test_a_template_too_deep_to_compile_costs_a_worker_at_most(rendered, source):
    with pytest.raises(RequestError, match=r"^chat template: "):
        rendered(source, [user()])
    assert rendered("ok", [user()])


def test_the_worker_stays_until_it_dies(sandbox):
    sandbox.render("x", [{}], "\ufdd0")
    first = sandbox._worker
    assert sandbox.render("{{ a }}", [{"a": 1}, {"a": 2}], "\ufdd0") == ["1", "2"]
    assert sandbox._worker is first
    first.kill()
    first.wait()
    assert sandbox.render("y", [{}], "\ufdd0") == ["y"]
    sandbox.close()
    assert sandbox.render("z", [{}], "\ufdd0") == ["z"]


def test_the_worker_sees_no_environment_and_opens_no_file(sandbox, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    sandbox.close()
    sandbox.render("", [{}], "\ufdd0")
    pid = sandbox._worker.pid
    with open(f"/proc/{pid}/environ", "rb") as file:
        assert b"SECRET" not in file.read()
    with open(f"/proc/{pid}/limits") as file:
        limits = {line[:26].strip(): line[26:].split()[0] for line in file}
    assert limits["Max address space"] == str(Limits().memory_bytes)
    assert limits["Max open files"] == "3"
    assert limits["Max file size"] == limits["Max processes"] == "0"
    assert len(os.listdir(f"/proc/{pid}/fd")) == 3


def test_threads_share_a_worker(sandbox):
    results = {}

    def work(n):
        results[n] = [sandbox.render("{{ n }}", [{"n": n}], "\ufdd0")[0] for _ in range(20)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: [str(n)] * 20 for n in range(4)}


# ---- files ---------------------------------------------------------------------------------------------------------


def write_config(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_find_template_takes_the_file_before_the_config(tmp_path):
    assert find_template(tmp_path) is None
    write_config(tmp_path, eos_token={"content": "</s>"}, bos_token="<s>", pad_token=None)
    assert find_template(tmp_path) is None
    write_config(tmp_path, chat_template="from config", eos_token={"content": "</s>"})
    found = find_template(tmp_path)
    assert (found.source, found.tokens) == ("from config", {"eos_token": "</s>"})
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write_config(tmp_path, chat_template=named)
    assert find_template(tmp_path).source == "d"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert find_template(tmp_path).source == "from file"


def test_find_template_names_what_is_wrong(tmp_path):
    write_config(tmp_path, chat_template=3)
    with pytest.raises(ConfigError, match="chat_template must be a string"):
        find_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="must be UTF-8"):
        find_template(tmp_path)


# ---- a checkpoint with a template ----------------------------------------------------------------------------------


def test_a_model_without_a_known_format_answers_by_its_template(tokenizer, sandbox):
    model, network, cache = make_fake_model(tokenizer, lambda ids: "a<think>b</think>c")
    template = JinjaTemplate(CHAT, {}, sandbox)
    model = Model(
        network, cache, tokenizer, generation_config={}, chat_format=None, chat_template=template
    )
    result = model.generate("Hi")
    assert result.prompt_ids == template.render([user()], tokenizer=tokenizer)
    assert (result.text, result.reasoning) == ("ac", "b")
    chat = model.chat()
    assert chat.send("Hi").finish.reason == chat.send("More").finish.reason == "stop"
    with pytest.raises(RequestError, match="keep_thinking must be 'auto'"):
        model.generate("Hi", keep_thinking="all")
    with pytest.raises(RequestError, match="tool_choice needs a prompt that the chat format"):
        model.generate("Hi", tools=[WEATHER], tool_choice="required")


def test_render_uses_the_template_of_a_checkpoint_without_a_known_format(tmp_path, capsys):
    make_checkpoint(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "model_type": "deepseek_v2"}))
    (tmp_path / "messages.json").write_text(json.dumps([user("a <|im_end|>")]))
    command = ["render", "--model", str(tmp_path / "model"), "--messages"]
    command.append(str(tmp_path / "messages.json"))
    assert cli.main(command) == 1
    assert "no chat format known here and no chat template" in capsys.readouterr().err
    (tmp_path / "model/chat_template.jinja").write_text(CHAT)
    assert cli.main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["format"] is None
    assert printed["prompt"].endswith(
        "a <|im_end|><|im_end|><|im_assistant|>assistant<|im_middle|>"
    )
    tokenizer = load_tokenizer(tmp_path / "model")
    assert printed["ids"].count(tokenizer.control_ids["<|im_end|>"]) == 1


def test_a_known_format_never_runs_a_template(tmp_path, capsys):
    make_checkpoint(tmp_path / "model")
    (tmp_path / "model/chat_template.jinja").write_text("{{ raise_exception('ran') }}")
    (tmp_path / "messages.json").write_text(json.dumps([user()]))
    command = ["render", "--model", str(tmp_path / "model"), "--messages"]
    assert cli.main([*command, str(tmp_path / "messages.json")]) == 0
    assert "<|im_user|>user<|im_middle|>Hi" in capsys.readouterr().out


def test_load_takes_the_format_it_is_told(tmp_path):
    make_checkpoint(tmp_path / "model")
    with pytest.raises(RequestError, match="format must be one of"):
        load(tmp_path / "model", chat_format="chatml")
    model = load(tmp_path / "model", chat_format="k2.7-code", max_context=64, max_batch=1)
    assert (model.chat_format, model.chat_template) == ("k2.7-code", None)
