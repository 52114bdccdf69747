"""From a checkpoint folder and a prompt to text and events.

A text prompt becomes one user message in the checkpoint's chat format; a list of messages becomes that conversation;
with raw_prompt=True a text is continued as it stands, and nothing is parsed. All requests of a Model share one Engine,
so what is asked at once, from one thread or several, is computed in one batch; results do not depend on it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kimi_native.asynchronous import in_thread, iterate
from kimi_native.chat.jinja_template import JinjaTemplate, find_template
from kimi_native.chat.parser import OutputParser
from kimi_native.chat.template import KeepThinking, detect_format, get_format
from kimi_native.chat.tool import ToolLike, as_tools
from kimi_native.chat.types import Event, Message, as_messages
from kimi_native.conversation import Chat
from kimi_native.engine import Engine, check_prompt
from kimi_native.errors import RequestError
from kimi_native.folder_names import NANO_FOLDER
from kimi_native.generation import Generation, PlainOutput, Run, end_ids
from kimi_native.guide import UNGUIDED, Guiding, ToolChoice, answer_start, next_call_index
from kimi_native.load_counts import check_counts
from kimi_native.model_file import model_folder
from kimi_native.prefixes import KeptPrefix, checked_handles
from kimi_native.progress_bar import Progress
from kimi_native.prompts import Prompt, TextSide, is_conversation, prompt_ids, prompt_list
from kimi_native.sampling import SamplingParams
from kimi_native.transcript import read_transcript

if TYPE_CHECKING:
    from kimi_native.cache import LatentCache
    from kimi_native.config import KimiConfig
    from kimi_native.model import KimiModel
    from kimi_native.recorded import RecordedModel
    from kimi_native.schema_grammar import GrammarCompiler
    from kimi_native.tokenizer import Tokenizer

# Context when none is asked for: the published limits (up to 262,144 tokens) would reserve 18 GB of cache a sequence.
DEFAULT_CONTEXT = 8192
DEFAULT_BATCH = 8


# ---- loading --------------------------------------------------------------------------------------------------------


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    max_context: int | None = None,
    max_batch: int = DEFAULT_BATCH,
    threads: int | None = None,
    dtype: str = "bfloat16",
    dense: str = "bf16",
    cache: str = "exact",
    device: str = "cpu",
    experts: str | None = None,
    compute: str = "exact",
    isa: str | None = None,
    chat_format: str | None = None,
    prefetch: bool = True,
    ignore_config_keys: Sequence[str] = (),
    progress: Progress | None = None,
    prompt: Prompt | None = None,
    raw_prompt: bool = False,
) -> Model:
    """Opens a checkpoint folder as published; nothing is converted on disk. Without a folder: kimi-nano.

    max_context         tokens of prompt and answer together (default: the checkpoint's limit, at most 8192)
    max_batch           requests computed at once; the cache holds max_batch full contexts
    threads             threads of the kernels, at most 1024, and never more than the cores this process may use
                        (default: as they are set; at first those cores); process-wide
    dtype               activations and cache: "bfloat16" or "float32"
    dense               dense matrices: "bf16" as published, or rounded while loading to "int8" or "int4", not exact
    cache               rows of the latent cache: "exact", of dtype, or "fp8": 57 % of bf16's bytes, not exact
    device              "cpu", or a GPU: "cuda", "cuda:1", ...
    experts             "cpu" leaves the routed experts in host memory and on the CPU, beside a GPU (default: on it)
    compute             activations that meet INT4 matrices: "exact", or "int8", rounded to 8 bits per 32: faster on
                        long prompts, not exact (docs/kernels.md, int4_gemm)
    isa                 kernel tier, such as "avx2" (default: as it is set; at first the best here); process-wide
    chat_format         one of chat.template.FORMATS (default: the checkpoint's, see docs/chat.md)
    prefetch            read the weights into memory now, at the speed of the disk, if all of them fit; else each is
                        read when it is first used
    ignore_config_keys  config.json keys to accept although this package does not know them; of generation_config.json
                        with "generation_config." before them
    progress            called with (bytes done, bytes in all) while loading
    prompt, raw_prompt  what Model.generate will be asked first: refused now, before a weight is read, if it is too long

    Raises ConfigError, ModelFormatError, TokenizerError, MemoryPlanError, RequestError for an argument, RuntimeError
    for a tier this machine lacks, OSError for a file; then, and when interrupted, threads and isa are as before. Warns
    with MemoryPlanWarning if the weights do not all fit into memory.
    """
    path = NANO_FOLDER if path is None else model_folder("load", path)
    check_counts(max_context=max_context, max_batch=max_batch, threads=threads)
    from kimi_native.config import load_config
    from kimi_native.machine_settings import machine_settings
    from kimi_native.network import load_network
    from kimi_native.tokenizer import load_tokenizer

    started = time.perf_counter()
    ignored = tuple(ignore_config_keys)
    config = load_config(path, ignore_keys=ignored)
    tokenizer = load_tokenizer(path, vocab_size=config.vocab_size)
    chosen = get_format(chat_format).name if chat_format is not None else None
    chat_format = chosen or detect_format(config, tokenizer, path)
    template = find_template(path) if chat_format is None else None
    sizes = {"max_context": max_context or default_context(config), "max_batch": max_batch}
    if prompt is not None:
        text_side = TextSide(config, tokenizer, chat_format, template)
        check_prompt(prompt_ids(prompt, raw_prompt, {}, text_side), config, sizes["max_context"])
    weights = {"dtype": dtype, "dense": dense, "cache": cache, "compute": compute}
    reading = {"prefetch": prefetch, "progress": progress, "ignored": ignored}
    where = {"device": device, "experts": experts}
    with machine_settings(threads, isa):
        network, latents, checkpoint = load_network(path, **sizes, **weights, **reading, **where)
        return Model(
            network,
            latents,
            tokenizer,
            generation_config=checkpoint.generation_config,
            chat_format=chat_format,
            chat_template=template,
            **sizes,
            check_weights=checkpoint.check_readable,
            load_s=time.perf_counter() - started,
        )


def default_context(config: KimiConfig) -> int:
    """Context of a model loaded without max_context."""
    return min(config.max_position_embeddings, DEFAULT_CONTEXT)


# ---- the model ------------------------------------------------------------------------------------------------------


class Model:
    """A loaded checkpoint that answers prompts; made by `load`. Safe to use from several threads at once.

    network        RecordedModel
    cache          LatentCache, used by this Model alone
    chat_format    one of chat.template.FORMATS, or None: then
    chat_template  the checkpoint's own makes the prompts; None: only raw prompts and ids are answered

    Besides what each method names, an answer ends with ModelFormatError if a weight file was truncated meanwhile.
    """

    def __init__(
        self,
        network: RecordedModel,
        cache: LatentCache,
        tokenizer: Tokenizer,
        *,
        generation_config: Mapping[str, Any],
        chat_format: str | None,
        chat_template: JinjaTemplate | None = None,
        max_context: int | None = None,
        max_batch: int = DEFAULT_BATCH,
        check_weights: Callable[[], None] = lambda: None,
        load_s: float = 0.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = network.config
        self.chat_format = chat_format
        self.chat_template = chat_template
        self._text_side = TextSide(self.config, tokenizer, chat_format, chat_template)
        self.generation_config = dict(generation_config)
        self.load_s = load_s
        self.eos_ids = end_ids(network.config, generation_config, tokenizer)
        self._engine = Engine(
            network,
            cache,
            max_batch=max_batch,
            eos_ids=self.eos_ids,
            max_context=max_context,
            check_weights=check_weights,
        )
        self._network = network
        self._check_weights = check_weights
        self._lock = threading.Lock()  # held for one engine step at a time
        self._runs: dict[int, Run] = {}
        self._abandoned: deque[Run] = deque()
        self._dropped: deque[KeptPrefix] = deque()
        self._compiler_lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self._engine.max_context

    def prompt_ids(self, prompt: Prompt, *, raw_prompt: bool = False, **options: Any) -> list[int]:
        """The ids that `generate` starts from. options: of chat.template.render. Raises RequestError as it does."""
        ids = prompt_ids(prompt, raw_prompt, options, self._text_side)
        self._engine.check(ids)
        return ids

    @contextlib.contextmanager
    def held_network(self) -> Iterator[KimiModel]:
        """The network, for a caller that computes with it and a cache of its own; requests wait meanwhile."""
        try:
            with self._lock:
                yield self._network.model
        finally:
            self._release()
            self._check_weights()

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        raw_prompt: bool = False,
        sampling: SamplingParams | None = None,
        tools: Sequence[ToolLike] | None = None,
        thinking: bool | None = None,
        keep_thinking: KeepThinking | None = None,
        tool_choice: ToolChoice | None = None,
        constrain_tools: bool = True,
        thinking_budget: int | None = None,
        prefixes: Sequence[KeptPrefix] | None = None,
        is_canceled: Callable[[], bool] = lambda: False,
        **overrides: Any,
    ) -> Generation | list[Generation]:
        """Answers one prompt, or a list of prompts in one batch.

        prompt      a text (one user message), messages (Message or OpenAI-shaped dicts), token ids taken as they are,
                    or a list of these; a list gives a list of results, each equal to what it would be alone
        raw_prompt  a text is continued without any template; the output is not parsed
        sampling    all parameters (default: the checkpoint's generation_config.json); `overrides` are single fields
        tools, thinking, keep_thinking   see chat.template.render; of tools also chat.parser.OutputParser
        prefixes    one KeptPrefix for each prompt, used by one prompt at a time: what is in the cache of its last
                    prompt is not computed again. Results stay the same; `forget` frees the rows
        is_canceled  asked at every token; True ends what is unfinished, as it is, with finish_reason "canceled"

        Raises RequestError before any compute for a bad prompt or argument; NonFiniteLogitsError, or TokenizerError for
        an id the tokenizer lacks, when a single prompt fails. In a list such a result has finish_reason "error".
        """
        params = self._params(sampling, overrides)
        options = {"tools": tools, "thinking": thinking, "keep_thinking": keep_thinking}
        guiding = Guiding(tools, tool_choice, constrain_tools, thinking_budget)
        prompts = prompt_list(prompt)
        asked = prompts or [prompt]
        handles = checked_handles(prefixes, len(asked))
        runs = [
            self._prepare(p, raw_prompt, params, options, guiding, handle)
            for p, handle in zip(asked, handles, strict=True)
        ]
        try:
            self._submit(runs)
            pending = runs
            while pending and not is_canceled():
                self._wait(pending, is_canceled)
                for run in pending:
                    run.take_inbox(self.eos_ids)
                    if run.is_done:
                        self._abandon(run)
                pending = [run for run in pending if not run.is_done]
        finally:
            for run in runs:
                self._abandon(run)
        if prompts is not None:
            return [run.generation(self.load_s) for run in runs]
        if runs[0].error is not None:
            raise runs[0].error
        return runs[0].generation(self.load_s)

    def stream(
        self,
        prompt: Prompt,
        *,
        raw_prompt: bool = False,
        sampling: SamplingParams | None = None,
        tools: Sequence[ToolLike] | None = None,
        thinking: bool | None = None,
        keep_thinking: KeepThinking | None = None,
        tool_choice: ToolChoice | None = None,
        constrain_tools: bool = True,
        thinking_budget: int | None = None,
        is_canceled: Callable[[], bool] = lambda: False,
        **overrides: Any,
    ) -> Iterator[Event]:
        """Answers one prompt piece by piece: ReasoningDelta, ContentDelta, ToolCallDelta, at the end one Finish.

        Arguments and errors as in `generate`; what is wrong with the request is raised by this call, what fails during
        the computation by the iterator. Closing the iterator early ends the request and frees its pages; so does
        is_canceled, without a Finish.
        """
        params = self._params(sampling, overrides)
        options = {"tools": tools, "thinking": thinking, "keep_thinking": keep_thinking}
        guiding = Guiding(tools, tool_choice, constrain_tools, thinking_budget)
        if prompt_list(prompt) is not None:
            raise RequestError("stream: one prompt at a time (got a list of prompts)")
        return self._events(
            self._prepare(prompt, raw_prompt, params, options, guiding), is_canceled
        )

    async def agenerate(
        self, prompt: Prompt | Sequence[Prompt], **options: Any
    ) -> Generation | list[Generation]:
        """`generate` in a thread; canceling the task ends its requests and frees their pages."""
        canceled = threading.Event()
        work = partial(self.generate, prompt, is_canceled=canceled.is_set, **options)
        return await in_thread(work, canceled.set)

    def astream(self, prompt: Prompt, **options: Any) -> AsyncIterator[Event]:
        """`stream`, every step in a thread; canceling the task, or closing the iterator, ends the request.

        What `stream` raises is raised by the first step.
        """
        canceled = threading.Event()
        work = partial(self.stream, prompt, is_canceled=canceled.is_set, **options)
        return iterate(work, canceled.set)

    def chat(
        self,
        *,
        system: str | None = None,
        messages: Sequence[Message | Mapping[str, Any]] = (),
        transcript: str | os.PathLike[str] | None = None,
        tools: Sequence[ToolLike] | None = None,
        run_tools: Sequence[str] = (),
        max_tool_calls: int = 300,
        tool_timeout: float = 60.0,
        tool_choice: ToolChoice | None = None,
        thinking: bool | None = None,
        keep_thinking: KeepThinking | None = None,
        constrain_tools: bool = True,
        thinking_budget: int | None = None,
        sampling: SamplingParams | None = None,
        **overrides: Any,
    ) -> Chat:
        """A conversation that keeps its messages, its place in the cache, and runs tools.

        system, messages, transcript  what it begins with: a system text, messages, or a file that Chat.save wrote
        run_tools       names of tools that run without asking; at a call of another the chat pauses
        max_tool_calls  after one message of the user, declined ones too; then the model must answer without tools
        tool_timeout    seconds for the calls of one answer
        tool_choice     of the first answer to a message; the later ones are free

        The other arguments as in `generate`, for every answer. Raises RequestError, and OSError for the transcript.
        """
        params = self._params(sampling, overrides)
        options = {"tools": tools, "thinking": thinking, "keep_thinking": keep_thinking}
        prefix, declared, last = KeptPrefix(), as_tools(tools), []

        def answer(
            messages: Sequence[Message], choice: ToolChoice | None, is_canceled: Callable[[], bool]
        ) -> Iterator[Event]:
            guiding = Guiding(tools, choice, constrain_tools, thinking_budget)
            run = self._prepare(messages, False, params, options, guiding, prefix)
            last[:] = [run]
            return self._events(run, is_canceled)

        before = [Message("system", system)] if system is not None else []
        before += as_messages(messages) if messages else []
        before += [] if transcript is None else read_transcript(transcript, declared)
        return Chat(
            answer,
            lambda: self.forget(prefix),
            lambda: last[0].timing(self.load_s),
            messages=before,
            tools=declared,
            run_tools=run_tools,
            max_tool_calls=max_tool_calls,
            tool_timeout=tool_timeout,
            can_forbid_calls=constrain_tools and self.chat_format is not None,
            tool_choice=tool_choice,
        )

    def _events(self, run: Run, is_canceled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        try:
            self._submit([run])
            while not run.is_done and not is_canceled():
                self._wait([run], is_canceled)
                yield from run.take_inbox(self.eos_ids)
            if run.error is not None:
                raise run.error
        finally:
            self._abandon(run)

    # ---- from arguments to requests ---------------------------------------------------------------------------------

    def _params(
        self, sampling: SamplingParams | None, overrides: Mapping[str, Any]
    ) -> SamplingParams:
        if sampling is None:
            return SamplingParams.from_generation_config(self.generation_config, **overrides)
        if not isinstance(sampling, SamplingParams):
            raise RequestError(
                f"generate: sampling must be SamplingParams (got {type(sampling).__name__})"
            )
        return sampling.replace(**overrides)

    def _prepare(
        self,
        prompt: Prompt,
        raw_prompt: bool,
        params: SamplingParams,
        options: dict[str, Any],
        guiding: Guiding = UNGUIDED,
        prefix: KeptPrefix | None = None,
    ) -> Run:
        """Renders and checks one prompt; nothing is computed and nothing is queued."""
        ids = self.prompt_ids(prompt, raw_prompt=raw_prompt, **options)
        is_ids = isinstance(prompt, (list, tuple)) and not is_conversation(prompt)
        if raw_prompt or is_ids or self.chat_format is None:
            guiding.check_unused()
        if raw_prompt or (self.chat_format is None and self.chat_template is None):
            return Run(ids, params, PlainOutput(self.tokenizer), prefix=prefix)
        parser = OutputParser(
            self.tokenizer, format=self.chat_format, prompt_ids=ids, tools=options.get("tools")
        )
        guide = None
        if guiding.is_used and not is_ids and self.chat_format is not None:
            start = answer_start(get_format(self.chat_format), self.tokenizer, ids)
            guide = guiding.guide(
                self.tokenizer,
                vocab_size=self.config.vocab_size,
                eos_ids=self.eos_ids,
                start=start,
                first_index=0 if isinstance(prompt, str) else next_call_index(prompt),
                compiler=self._grammar_compiler,
            )
        return Run(ids, params, parser, guide=guide, prefix=prefix)

    def _grammar_compiler(self) -> GrammarCompiler:
        """Made when a tool is declared first: it reads the whole vocabulary."""
        with self._compiler_lock:
            if self._compiler is None:
                from kimi_native.schema_grammar import GrammarCompiler

                self._compiler = GrammarCompiler(self.tokenizer, self.config.vocab_size)
            return self._compiler

    # ---- the shared engine ------------------------------------------------------------------------------------------

    def _submit(self, runs: list[Run]) -> None:
        self._release()
        with self._lock:
            for run in runs:
                run.request_id = self._engine.add(
                    run.prompt_ids, run.params, prefix=run.prefix, guide=run.guide
                )
                run.report = self._engine.report(run.request_id)
                self._runs[run.request_id] = run

    def _wait(self, runs: list[Run], is_canceled: Callable[[], bool] = lambda: False) -> None:
        """Returns when one of `runs` has something in its inbox; steps the engine for everybody until then.

        Raises RuntimeError if one of them was lost because a forward pass failed in another thread.
        """
        while not any(run.inbox for run in runs) and not is_canceled():
            with self._lock:
                if any(run.inbox for run in runs):
                    return  # another thread stepped while this one waited for the lock
                if not all(self._engine.is_active(run.request_id) for run in runs):
                    raise RuntimeError(
                        "generate: every request of a forward pass ends when the pass fails "
                        "(got a failure in another thread)"
                    )
                for output in self._engine.step():
                    if (run := self._runs.get(output.request_id)) is not None:
                        run.inbox.append(output)
            self._release()

    def _abandon(self, run: Run) -> None:
        """Takes a run off the engine, at once or, if a step is being computed, right after it.

        Never waits for the lock: an iterator may be closed by the garbage collector in the middle of anything.
        """
        self._abandoned.append(run)
        self._release()

    def forget(self, prefix: KeptPrefix) -> None:
        """Frees what is kept of a conversation in the cache, at once or after the step being computed.

        Not needed for memory's sake: kept rows count as free, and who needs their pages gets them.
        """
        self._dropped.append(prefix)
        self._release()

    def _release(self) -> None:
        while (self._abandoned or self._dropped) and self._lock.acquire(blocking=False):
            try:
                while self._dropped:
                    self._engine.drop(self._dropped.popleft())
                while self._abandoned:
                    run = self._abandoned.popleft()
                    if self._runs.pop(run.request_id, None) is not None:
                        self._engine.cancel(run.request_id)
            finally:
                self._lock.release()
