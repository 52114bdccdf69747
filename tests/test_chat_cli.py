"""The verbs render and parse: files in, prompts, ids and events out, and one line for whatever is wrong."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest

from chat_corpus import ARGS, BEIJING, CALL, CALL_END, CLOSE, END, ONE, SECTION, THINK, W0
from kimi_native import cli
from kimi_native.chat.template import render
from kimi_native.make_checkpoint import make_checkpoint
from kimi_native.tokenizer import load_tokenizer
from tokenizer_files import small_tokenizer

MESSAGES = [
    {"role": "user", "content": "月 Hi"},
    {"role": "assistant", "content": "Hello", "reasoning_content": "greet"},
    {"role": "user", "content": "More"},
]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]
ANSWER = f"{THINK}hmm{CLOSE}Well.{ONE}{END}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tokenizer files, and the JSON files of a conversation."""
    path = tmp_path_factory.mktemp("chat")
    small_tokenizer(path)
    (path / "messages.json").write_text(json.dumps(MESSAGES))
    (path / "tools.json").write_text(json.dumps(TOOLS))
    (path / "answer.txt").write_text(ANSWER)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def run(folder, monkeypatch):
    """Runs a verb in the folder with the k2-thinking format, unless told otherwise."""
    monkeypatch.chdir(folder)

    def run(*argv, format="k2-thinking"):
        return cli.main([*argv, "--format", format, "--tokenizer", "."])

    return run


def stdin_of(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def events_of(capsys):
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


# ---- render ---------------------------------------------------------------------------------------------------------


def test_render_prints_prompt_and_ids(run, tokenizer, capsys):
    assert run("render", "--messages", "messages.json") == 0
    out, err = capsys.readouterr()
    ids = render(MESSAGES, format="k2-thinking", tokenizer=tokenizer)
    assert out == tokenizer.decode(ids) + "\n" + " ".join(map(str, ids)) + "\n"
    assert err == ""


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ([], {}),
        (["--tools", "tools.json"], {"tools": TOOLS}),
        (["--keep-thinking", "all"], {"keep_thinking": "all"}),
        (["--no-thinking"], {"thinking": False}),
        (["--no-generation-prompt"], {"add_generation_prompt": False}),
    ],
    ids=str,
)
def test_render_json_follows_its_options(run, tokenizer, capsys, argv, options):
    assert run("render", "--messages", "messages.json", "--json", *argv, format="k2.5") == 0
    ids = render(MESSAGES, format="k2.5", tokenizer=tokenizer, **options)
    (printed,) = events_of(capsys)
    assert printed == {"format": "k2.5", "prompt": tokenizer.decode(ids), "ids": ids}


def test_render_takes_the_format_of_a_model(tmp_path, folder, capsys):
    make_checkpoint(tmp_path / "tiny")
    argv = ["render", "--model", str(tmp_path / "tiny"), "--json"]
    argv += ["--messages", str(folder / "messages.json")]
    assert cli.main(argv) == 0
    (printed,) = events_of(capsys)
    assert printed["format"] == "k2-thinking"
    tokenizer = load_tokenizer(tmp_path / "tiny")
    assert printed["ids"] == render(MESSAGES, format="k2-thinking", tokenizer=tokenizer)
    assert cli.main([*argv, "--format", "k2-instruct"]) == 0
    assert events_of(capsys)[0]["format"] == "k2-instruct"


def test_render_reads_stdin(run, monkeypatch, capsys):
    stdin_of(monkeypatch, json.dumps(MESSAGES).encode())
    assert run("render", "--messages", "-", "--json") == 0
    assert "greet" not in events_of(capsys)[0]["prompt"]


# ---- parse ----------------------------------------------------------------------------------------------------------

EVENTS = [
    {"event": "ReasoningDelta", "text": "hmm"},
    {"event": "ContentDelta", "text": "Well."},
    {"event": "ToolCallDelta", "index": 0, "id": W0, "name": "get_weather", "arguments": ""},
    {"event": "ToolCallDelta", "index": 0, "id": None, "name": None, "arguments": BEIJING},
]


def merged(events):
    """Neighboring texts of one kind joined."""
    result = []
    for event in events:
        field = "text" if "text" in event else "arguments"
        before = result[-1] if result else {}
        is_more = event.get("id") is None and {**before, field: ""} == {**event, field: ""}
        if field in event and is_more:
            result[-1] = {**before, field: before[field] + event[field]}
        else:
            result.append(event)
    return result


@pytest.mark.parametrize("form", ["text", "numbers", "commas", "list", "object"])
def test_parse_json_prints_the_events(run, folder, tokenizer, capsys, form):
    ids = tokenizer.encode_with_control(ANSWER)
    written = {
        "text": ANSWER,
        "numbers": "\n".join(map(str, ids)) + "\n",
        "commas": ", ".join(map(str, ids)),
        "list": json.dumps(ids),
        "object": json.dumps({"text": "Well.", "ids": ids, "prompt_ids": []}),
    }
    (folder / "answer").write_text(written[form])
    assert run("parse", "answer", "--json", *(["--text"] if form == "text" else [])) == 0
    *events, finish = events_of(capsys)
    assert merged(events) == EVENTS
    assert finish == {
        "event": "Finish",
        "reason": "tool_calls",
        "usage": {"prompt_tokens": 0, "completion_tokens": len(ids), "reused_tokens": 0},
        "unfinished_call": False,
    }


def test_parse_prints_the_answer(run, capsys):
    assert run("parse", "answer.txt", "--text") == 0
    rows = [re.split(" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if row != [""]] == [
        ["answer"],
        ["reasoning", "hmm"],
        ["content", "Well."],
        [f"call {W0}", BEIJING],
        ["finish reason", "tool_calls"],
        ["unfinished call", "no"],
    ]


def test_parse_starts_where_the_prompt_ends(run, folder, capsys):
    assert run("render", "--messages", "messages.json", "--json", format="k2.5") == 0
    (folder / "prompt.json").write_text(capsys.readouterr().out)
    (folder / "plain.txt").write_text(f"a{CLOSE}b{END}")
    argv = ["parse", "plain.txt", "--text", "--json", "--prompt", "prompt.json"]
    assert run(*argv, format="k2.5") == 0
    events = events_of(capsys)
    assert events[:2] == [
        {"event": "ReasoningDelta", "text": "a"},
        {"event": "ContentDelta", "text": "b"},
    ]
    prompt = json.loads((folder / "prompt.json").read_text())["ids"]
    assert events[-1]["usage"]["prompt_tokens"] == len(prompt)


def test_parse_repairs_ids_with_tools(run, monkeypatch, capsys):
    answer = f"{CLOSE}{SECTION}{CALL}get-weather_7{ARGS}{{}}{CALL_END}{END}"
    for tools, expected in [([], "get-weather_7"), (["--tools", "tools.json"], W0)]:
        stdin_of(monkeypatch, answer.encode())
        assert run("parse", "-", "--text", "--json", *tools) == 0
        assert events_of(capsys)[0]["id"] == expected


# ---- what is wrong --------------------------------------------------------------------------------------------------

WRONG = {
    "unknown format": ("render --messages messages.json --format chatml", "chat: format must be"),
    "no file": (
        "render --messages missing.json",
        "missing.json: cannot be used (got No such file or directory)",
    ),
    "no JSON": ("render --messages answer.txt", "answer.txt: must be valid JSON (Expecting"),
    "no list": ("render --messages object", "object: messages must be a JSON list (got dict)"),
    "no UTF-8": ("render --messages bytes", "bytes: must be UTF-8 text ("),
    "infinite": ("render --messages infinite", "infinite: numbers must be finite (got Infinity)"),
    "deep": ("render --messages deep", "deep: JSON nests too deep"),
    "empty": ("render --messages empty", "messages: must hold at least one message (got 0)"),
    "bad message": ("render --messages tools.json", "message: unknown field 'type'"),
    "tools that are messages": (
        "render --messages messages.json --tools object",
        "object: tools must be a JSON list (got dict)",
    ),
    "reasoning kept where there is none": (
        "render --messages messages.json --keep-thinking all --format moonlight",
        "chat: format moonlight has no reasoning",
    ),
    "words for ids": ("parse answer.txt", "answer.txt: ids must be whole numbers (got '<think>"),
    "an object without ids": ("parse object", "object: ids must be a list of whole numbers"),
    "ids that are none": ("parse truths", "truths: ids must be a list of whole numbers"),
    "prompt_ids that are none": ("parse prompts", "prompts: prompt_ids must be a list of whole"),
    "id beyond the vocabulary": ("parse large", "tokenizer: "),
    "messages for tools": ("parse answer.txt --text --tools object", "object: tools must be"),
    "two tools of a name": (
        "parse answer.txt --text --tools twice",
        "tools: names must differ (got 'get_weather' twice)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line_and_exit_code_1(run, folder, capsys, name):
    (folder / "object").write_text("{}")
    (folder / "bytes").write_bytes(b"[\xff]")
    (folder / "infinite").write_text("[Infinity]")
    (folder / "deep").write_text("[" * 100_000)
    (folder / "empty").write_text("[]")
    (folder / "truths").write_text('{"ids": [true]}')
    (folder / "prompts").write_text('{"ids": [], "prompt_ids": 7}')
    (folder / "large").write_text("5 999999999")
    (folder / "twice").write_text(json.dumps(TOOLS * 2))
    command, message = WRONG[name]
    argv = command.split()
    format = argv.pop() if "--format" in argv else "k2-thinking"
    assert run(*[word for word in argv if word != "--format"], format=format) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"kimi-native: error: {message}")


@pytest.mark.parametrize(
    "argv",
    [
        "render --messages messages.json",
        "render --messages messages.json --tokenizer .",
        "render --messages messages.json --model . --tokenizer .",
        "render --messages - --tools - --format k2.5 --tokenizer .",
        "render --messages messages.json --keep-thinking last --format k2.5 --tokenizer .",
        "render --format k2.5 --tokenizer .",
        "parse - --prompt - --format k2.5 --tokenizer .",
    ],
)
def test_wrong_usage_is_exit_code_2(run, capsys, argv):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv.split())
    assert caught.value.code == 2
    assert "usage: kimi-native" in capsys.readouterr().err


def test_render_of_a_model_without_a_known_format(tmp_path, folder, capsys):
    make_checkpoint(tmp_path / "tiny")
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config["model_type"] = "deepseek_v3"
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    names = tmp_path / "tiny" / "tokenizer_config.json"
    names.write_text(names.read_text().replace("<|im_middle|>", "<|other|>"))
    argv = ["--model", str(tmp_path / "tiny")]
    assert cli.main(["render", *argv, "--messages", str(folder / "messages.json")]) == 1
    assert (
        "no chat format known here and no chat template; pass --format" in capsys.readouterr().err
    )
    assert cli.main(["parse", *argv, str(folder / "answer.txt"), "--text", "--json"]) == 0


def test_render_and_parse_import_no_torch(folder):
    code = (
        "import sys\nfrom kimi_native import cli\n"
        "common = ['--format', 'k2-thinking', '--tokenizer', '.']\n"
        "assert cli.main(['render', '--messages', 'messages.json', *common]) == 0\n"
        "assert cli.main(['parse', 'answer.txt', '--text', *common]) == 0\n"
        "assert 'torch' not in sys.modules and 'kimi_native._native' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
