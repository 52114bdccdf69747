"""Model.agenerate and astream: the same results without blocking the loop, and nothing left behind when canceled."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from fakes import CACHE_TOKENS, make_fake_model
from kimi_native.asynchronous import in_thread
from kimi_native.chat.types import Finish
from kimi_native.errors import RequestError
from tokenizer_files import small_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_model(tokenizer):
    """make_fake_model with this module's tokenizer; its answers take as long as the test likes."""
    return lambda answer=None, **options: make_fake_model(tokenizer, answer, **options)


def assert_idle(model, cache):
    assert (model._engine.num_running, model._engine.num_waiting) == (0, 0)
    assert cache.free_tokens == CACHE_TOKENS
    assert not cache.sequences


async def cancel_after_first_step(network, work):
    """Starts the coroutine and cancels it once the network has decoded."""
    task = asyncio.create_task(work)
    while not network.batches:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def slowly(network, seconds=0.01):
    """Makes every decode take a moment, so that a cancellation comes in the middle."""
    decode = network.decode

    def slow(*args):
        time.sleep(seconds)
        return decode(*args)

    network.decode = slow


# ---- results --------------------------------------------------------------------------------------------------------


def test_agenerate_equals_generate(make_model):
    model, _, cache = make_model()
    options = {"max_tokens": 12, "seed": 3}
    actual = asyncio.run(model.agenerate(["a", "b"], **options))
    expected = model.generate(["a", "b"], **options)
    assert [r.ids for r in actual] == [r.ids for r in expected]
    assert asyncio.run(model.agenerate("a", **options)).ids == expected[0].ids
    assert_idle(model, cache)


def test_astream_equals_stream(make_model):
    model, _, cache = make_model(lambda ids: "Hello there, all of you")

    async def collect():
        return [event async for event in model.astream("Hi")]

    assert asyncio.run(collect()) == list(model.stream("Hi"))
    assert_idle(model, cache)


def test_agenerate_shares_one_batch(make_model):
    """Requests asked for at once are computed at once."""
    model, network, _ = make_model(max_batch=4)
    slowly(network)

    async def ask():
        prompts = [model.agenerate(text, max_tokens=30, seed=1) for text in "abcd"]
        return await asyncio.gather(*prompts)

    results = asyncio.run(ask())
    assert max(network.batches) > 1
    assert [r.ids for r in results] == [
        model.generate(text, max_tokens=30, seed=1).ids for text in "abcd"
    ]


def test_agenerate_leaves_the_loop_free(make_model):
    model, network, _ = make_model()
    slowly(network)

    async def main():
        task = asyncio.create_task(model.agenerate("a", max_tokens=20))
        turns = 0
        while not task.done():
            await asyncio.sleep(0)
            turns += 1
        return turns

    assert asyncio.run(main()) > 20


@pytest.mark.parametrize("options", [{"temperature": -1}, {"wrong": 1}])
def test_async_raises_what_the_blocking_form_raises(make_model, options):
    model, _, cache = make_model()

    async def first():
        return await anext(model.astream("a", **options))

    for work in (model.agenerate("a", **options), first()):
        with pytest.raises((RequestError, TypeError)):
            asyncio.run(work)
    assert_idle(model, cache)


# ---- cancellation ---------------------------------------------------------------------------------------------------


def test_agenerate_canceled_ends_its_requests(make_model):
    model, network, cache = make_model()
    slowly(network)
    work = model.agenerate(["a", "b"], max_tokens=200, ignore_eos=True)
    asyncio.run(cancel_after_first_step(network, work))
    assert_idle(model, cache)
    assert len(network.batches) < 100
    assert model.generate("a", max_tokens=2).ids


def test_agenerate_canceled_while_it_waits_for_a_place(make_model):
    """A request that has not begun is taken off the queue; the one that runs is not disturbed."""
    model, network, cache = make_model(max_batch=1)
    slowly(network)

    async def main():
        first = asyncio.create_task(model.agenerate("a", max_tokens=40, ignore_eos=True, seed=1))
        await asyncio.sleep(0.05)
        prefills = len(network.prefills)
        await asyncio.gather(cancel_soon(model.agenerate("b", max_tokens=40)))
        assert len(network.prefills) == prefills == 1
        assert not first.done()
        return await first

    async def cancel_soon(work):
        task = asyncio.create_task(work)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert len(asyncio.run(main()).ids) == 40
    assert_idle(model, cache)


def test_astream_canceled_ends_its_request(make_model):
    model, network, cache = make_model()
    slowly(network)

    async def listen():
        async for _ in model.astream("a", max_tokens=200, ignore_eos=True):
            pass

    asyncio.run(cancel_after_first_step(network, listen()))
    assert_idle(model, cache)


def test_astream_closed_early_ends_its_request(make_model):
    model, _, cache = make_model()

    async def first():
        async with aclosing(model.astream("a", max_tokens=200, ignore_eos=True)) as events:
            async for event in events:
                return event

    assert not isinstance(asyncio.run(first()), Finish)
    assert_idle(model, cache)


def test_generate_canceled_says_so_and_keeps_what_there_is(make_model):
    model, network, cache = make_model()
    result = model.generate(
        "a", max_tokens=50, ignore_eos=True, is_canceled=lambda: len(network.batches) >= 3
    )
    assert (result.finish_reason, len(result.ids)) == ("canceled", 4)
    assert_idle(model, cache)


def test_in_thread_canceled_twice_still_waits():
    release, canceled = threading.Event(), []

    def work():
        release.wait(20)
        raise ValueError("late")

    async def main():
        task = asyncio.create_task(in_thread(work, lambda: canceled.append(1)))
        await asyncio.sleep(0.02)
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.02)
        assert not task.done()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert canceled == [1]
