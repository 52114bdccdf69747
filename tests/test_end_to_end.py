"""Checkpoints of the package's own maker through load, generate, stream and the command line: nothing is a stand-in."""

from __future__ import annotations

import io
import json
import re
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import kimi_native as kn
from kimi_native import cli, network, ops
from kimi_native.errors import RequestError
from kimi_native.make_checkpoint import make_checkpoint
from made_checkpoints import make_tiny_folders
from oracle import threads

PRESETS = ["tiny", "tiny-noqlora", "tiny-yarn", "tiny-groups", "tiny-v2", "tiny-k25"]
PROMPTS = [
    "A",
    "Once upon a time there was",
    "Hello, world! " * 20,
    "月之暗面",
    "def f(x):\n    return",
]
SAMPLING = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "min_p": 0.01, "logprobs": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny preset as int4, bf16 and fp8; the first two mean the same weights."""
    return make_tiny_folders(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folders):
    return kn.load(folders["int4"], max_context=512, max_batch=5)


# ---- what is loaded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["int4", "bf16", "fp8"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_and_format_generates(tmp_path, preset, format):
    make_checkpoint(tmp_path / "c", preset=preset, format=format)
    model = kn.load(tmp_path / "c", max_context=128, max_batch=1)
    options = {"max_tokens": 4, "seed": 3, "ignore_eos": True}
    result = model.generate("Hello", raw_prompt=True, **options)
    assert (len(result.ids), result.finish_reason) == (4, "length")
    assert result.usage.prompt_tokens == len(model.tokenizer.encode("Hello"))
    assert model.generate("Hello", raw_prompt=True, **options).ids == result.ids
    if model.chat_format is not None:
        chat = model.generate("Hello", **options)
        assert model.tokenizer.decode(chat.prompt_ids).endswith(("<|im_middle|>", "<think>"))


def test_cache_holds_a_full_context_for_every_place_in_the_batch(folders):
    model = kn.load(folders["int4"], max_context=100, max_batch=3)
    assert model.max_context == 100
    assert model._engine._cache.num_pages == 3 * 2  # 100 tokens take two pages of 64


def test_int4_and_bf16_of_one_seed_give_the_same_tokens(folders, model):
    """The experts of both mean the same values, so greedy answers agree as far as fp32 rounding does not decide."""
    options = {"raw_prompt": True, "temperature": 0, "max_tokens": 24, "logprobs": 2}
    models = [kn.load(folders[f], max_context=512, dtype="float32") for f in ("int4", "bf16")]
    for prompt in PROMPTS:
        int4, bf16 = (m.generate(prompt, **options) for m in models)
        for a, b in zip(int4.logprobs, bf16.logprobs, strict=True):
            (_, first), (_, second) = b.top_logprobs
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            if first - second < 1e-3:
                break  # a tie: the answers may part here
            assert a.id == b.id


@pytest.mark.parametrize("dense", ["int8", "int4"])
def test_dense_formats_generate_alone_in_a_batch_and_from_the_command_line(folders, capsys, dense):
    model = kn.load(folders["int4"], max_context=512, max_batch=5, dense=dense)
    together = model.generate(PROMPTS, raw_prompt=True, seed=11, **SAMPLING)
    alone = [model.generate(p, raw_prompt=True, seed=11, **SAMPLING) for p in PROMPTS]
    assert [outcome(r) for r in together] == [outcome(r) for r in alone]
    argv = ["generate", "--model", str(folders["int4"]), "--dense", dense, "--raw-prompt"]
    sampling = [
        "--max-tokens",
        "12",
        "--temperature",
        "0.9",
        "--top-p",
        "0.95",
        "--min-p",
        "0.01",
        "--seed",
        "11",
    ]
    assert cli.main([*argv, *sampling, "--json", PROMPTS[1]]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == alone[1].ids


# ---- the same tokens whatever happens beside them -------------------------------------------------------------------


def outcome(result):
    return result.ids, result.text, result.finish_reason, result.logprobs


def test_batches_give_what_each_prompt_gives_alone(folders, model):
    together = model.generate(PROMPTS, raw_prompt=True, seed=11, **SAMPLING)
    alone = [model.generate(p, raw_prompt=True, seed=11, **SAMPLING) for p in PROMPTS]
    for a, b in zip(together, alone, strict=True):
        assert outcome(a) == outcome(b)  # logprobs too: to the last bit
    narrow = kn.load(folders["int4"], max_context=512, max_batch=2)
    for a, b in zip(
        narrow.generate(PROMPTS, raw_prompt=True, seed=11, **SAMPLING), alone, strict=True
    ):
        assert outcome(a) == outcome(b)
    assert len({tuple(r.ids) for r in alone}) == len(PROMPTS)


def test_threads_change_nothing(model):
    results = []
    for n in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        with threads(n):
            results.append(model.generate(PROMPTS, raw_prompt=True, seed=5, **SAMPLING))
        torch.set_num_threads(before)
    for others in results[1:]:
        assert [outcome(r) for r in others] == [outcome(r) for r in results[0]]


def test_stream_gives_the_same_answer(model):
    result = model.generate("What is this?", seed=2, max_tokens=40)
    events = list(model.stream("What is this?", seed=2, max_tokens=40))
    for kind, expected in ((kn.ContentDelta, result.text), (kn.ReasoningDelta, result.reasoning)):
        assert "".join(e.text for e in events if isinstance(e, kind)) == expected
    assert events[-1] == kn.Finish(result.finish_reason, result.usage, result.unfinished_call)


def test_penalties_reach_the_tokens_alone_and_in_a_batch(model):
    options = {"raw_prompt": True, "temperature": 0, "max_tokens": 24, "ignore_eos": True}
    plain = model.generate(PROMPTS[:2], **options)
    for penalty in (  # those that reward what has been said show within few tokens
        {"repetition_penalty": 0.1},
        {"presence_penalty": -2.0},
        {"frequency_penalty": -2.0},
    ):
        penalized = model.generate(PROMPTS[:2], **options, **penalty)
        assert [r.ids for r in penalized] != [r.ids for r in plain], penalty
        assert penalized[0].ids == model.generate(PROMPTS[0], **options, **penalty).ids


def test_stop_string_across_token_boundaries_cuts_the_text(model):
    options = {"raw_prompt": True, "seed": 4, "max_tokens": 30, "ignore_eos": True}
    whole = model.generate("The", **options)
    decode = model.tokenizer.decode
    at = next(n for n in range(2, 29) if "\ufffd" not in decode(whole.ids[n - 1 : n + 1]))
    # The last character of one token and the first of the next.
    stop = decode(whole.ids[at - 1 : at])[-1] + decode(whole.ids[at : at + 1])[0]
    cut = model.generate("The", **options, stop=stop)
    assert (cut.text, cut.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    assert len(cut.ids) < len(whole.ids)


# ---- the command line -----------------------------------------------------------------------------------------------


def run(capsys, *argv, stdin=None, monkeypatch=None):
    """(exit code, stdout, stderr) of one call, in this process."""
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


GENERATE = ("--raw-prompt", "--max-tokens", "6", "--seed", "9", "--max-context", "128")


def test_command_line_json_has_the_promised_fields(folders, model, capsys):
    argv = ("generate", "--model", folders["int4"], *GENERATE, "--json", "Hi 🙂")
    started = time.perf_counter()
    code, out, err = run(capsys, *argv)
    elapsed = time.perf_counter() - started
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert list(result) == [
        *("text", "reasoning", "tool_calls", "ids", "prompt_ids", "finish_reason"),
        *("usage", "timing", "seed"),
    ]
    expected = model.generate("Hi 🙂", raw_prompt=True, max_tokens=6, seed=9)
    assert (result["text"], result["ids"]) == (expected.text, expected.ids)
    assert result["prompt_ids"] == expected.prompt_ids == model.tokenizer.encode("Hi 🙂")
    assert result["finish_reason"] == expected.finish_reason
    tokens = {"prompt_tokens": len(expected.prompt_ids), "completion_tokens": len(expected.ids)}
    assert result["usage"] == {**tokens, "reused_tokens": 0, "total_tokens": sum(tokens.values())}
    assert set(result["timing"]) == {
        *("load_s", "waiting_s", "prefill_s", "decode_s"),
        *("prefill_tokens_per_s", "decode_tokens_per_s"),
    }
    seconds = [result["timing"][f"{part}_s"] for part in ("load", "waiting", "prefill", "decode")]
    assert min(seconds) > 0
    assert sum(seconds) <= elapsed


def test_command_line_prints_the_same_text_plain_streamed_and_from_stdin(
    folders, model, capsys, monkeypatch
):
    call = ("generate", "--model", folders["int4"], *GENERATE)
    text = model.generate("Hello", raw_prompt=True, max_tokens=6, seed=9).text
    assert run(capsys, *call, "Hello") == (0, text + "\n", "")
    assert run(capsys, *call, "--stream", "Hello") == (0, text + "\n", "")
    assert run(capsys, *call, stdin="Hello\n", monkeypatch=monkeypatch) == (0, text + "\n", "")


def test_command_line_temperature_zero_needs_no_seed(folders, capsys):
    call = ("generate", "--model", folders["int4"], "--raw-prompt", "--max-tokens", "6", "Hello")
    texts = {run(capsys, *call, "--temperature", "0")[1] for _ in range(3)}
    assert len(texts) == 1


def test_inspect_of_a_made_checkpoint(folders, capsys):
    code, out, _ = run(capsys, "inspect", folders["int4"], "--json", "--plan")
    summary = json.loads(out)
    assert code == 0
    assert summary["quantization"] == "int4, groups of 32"
    assert summary["bytes"] == sum(summary["bytes_by_kind"].values())
    assert summary["cache_bytes_per_token"] == 4 * (64 + 16) * 2
    assert summary["bytes_per_decoded_token"]["total"] < summary["bytes"]
    assert summary["plan"]["fits"] is True


# ---- bad input ------------------------------------------------------------------------------------------------------


def edit_json(folder, name, change):
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))


def edit_tensors(folder, change):
    file = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(folder):
    file = folder / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


SCALE = "model.layers.2.mlp.experts.3.up_proj.weight_scale"
NORM = "model.layers.1.input_layernorm.weight"
BAD_FOLDERS = {
    "truncated file": (truncate, "model-00001-of-00001.safetensors: tensor .* must ascend within"),
    "missing tensor": (
        lambda f: (
            edit_tensors(f, lambda t: t.pop(SCALE)),
            edit_json(f, "model.safetensors.index.json", lambda d: d["weight_map"].pop(SCALE)),
        ),
        rf"every tensor of the model \(missing 1: {SCALE}\)",
    ),
    "wrong shape": (
        lambda f: edit_tensors(f, lambda t: t.update({SCALE: t[SCALE][:, :4].contiguous()})),
        rf"tensor {SCALE}: shape must be \[128, 8\] \(got \[128, 4\]\)",
    ),
    "wrong dtype": (
        lambda f: edit_tensors(f, lambda t: t.update({SCALE: t[SCALE].float()})),
        rf"tensor {SCALE}: dtype must be BF16 \(got F32\)",
    ),
    "index leaves the folder": (
        lambda f: edit_json(
            f, "model.safetensors.index.json", lambda d: d["weight_map"].update(x="../x")
        ),
        r"model\.safetensors\.index\.json: tensor x must be in a file of this folder, .*\(got '\.\./x'\)",
    ),
    "unknown key": (
        lambda f: edit_json(f, "config.json", lambda d: d.update(index_topk=4)),
        "config.json: keys must be known .*got index_topk = ",
    ),
    "unknown quantization key": (
        lambda f: edit_json(f, "config.json", lambda d: d["quantization_config"].update(x=4)),
        r"config.json: keys must be known .*got quantization_config\.x = ",
    ),
    "value out of range": (
        lambda f: edit_json(f, "config.json", lambda d: d.update(num_experts_per_tok=17)),
        r"config.json: num_experts_per_tok must be at most .*16 \(got 17\)",
    ),
    "no tokenizer": (
        lambda f: (f / "tiktoken.model").unlink(),
        "must hold tiktoken.model or tokenizer.json",
    ),
    "broken tokenizer": (
        lambda f: (f / "tiktoken.model").write_bytes(b"IQ== 0\nIQ== 1\n"),
        "tiktoken.model: line 2: a token must occur once",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "with a config.json"),
    "NaN in a weight": (
        lambda f: edit_tensors(f, lambda t: t[NORM].fill_(torch.nan)),
        r"logits must be finite \(got 2048 NaN",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_checkpoint_is_one_line_and_exit_code_1(tmp_path, capsys, case):
    break_it, message = BAD_FOLDERS[case]
    folder = tmp_path / "c"
    make_checkpoint(folder)
    break_it(folder)
    argv = ("generate", "--model", folder, *GENERATE, "Hello")
    code, out, err = run(capsys, *argv)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert re.search(rf"^kimi-native: error: .*{message}", err), err
    with pytest.raises(kn.KimiNativeError):
        cli.main([*map(str, argv), "--debug"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("x" * 3000,), "prompt and at least one new token must fit the context of 128 tokens"),
        (("",), "the prompt must not be empty"),
        (("Hi", "--max-tokens", "0"), "max_tokens must be an integer from 1"),
        (("Hi", "--isa", "sse9"), r"load: isa=sse9 is not available here \(supported: .*generic"),
        (("Hi", "--threads", "0"), "threads must be an integer of at least 1"),
        (("Hi", "--max-context", "9000"), r"max_context must be 1 to 8192 \(got 9000\)"),
    ],
    ids=str,
)
def test_bad_request_is_one_line_and_exit_code_1(folders, capsys, argv, message):
    code, out, err = run(capsys, "generate", "--model", folders["int4"], *GENERATE, *argv)
    ops.force_isa("")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert re.search(rf"^kimi-native: error: .*{message}", err), err


def test_prompt_beyond_the_context_is_refused_before_the_weights(folders, capsys, monkeypatch):
    def no_weights(*args, **options):
        raise AssertionError("a weight would have been read")

    monkeypatch.setattr(network, "load_network", no_weights)
    for raw in ([], ["--raw-prompt"]):
        argv = ["generate", "--model", folders["int4"], "--max-context", "64", *raw, "x" * 3000]
        code, out, err = run(capsys, *argv)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert "must fit the context of 64 tokens" in err
    with pytest.raises(RequestError, match="must be integers from 0 to 2047"):
        kn.load(folders["int4"], prompt=[1, 2048])
    with pytest.raises(AssertionError, match="a weight"):
        kn.load(folders["int4"], prompt=[1, 2047])
