"""Answers in process, with transformers' batched ``generate``: for workers and models without a vLLM server.

Chat models and models that only go on with a text differ in how a request is put to them, which is a
:class:`~airflow_vlm_provider.engines.local_prompts.Reader`'s affair; all else here is the same for both.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from airflow_vlm_provider.engines.batching import Batcher, BatchTooLargeError, Ticket
from airflow_vlm_provider.engines.captioners import Captions
from airflow_vlm_provider.engines.checkpoints import Checkpoint, load_checkpoint
from airflow_vlm_provider.engines.conversations import Conversations
from airflow_vlm_provider.engines.decoding import (
    DEFAULT_MAX_TOKENS,
    Decoding,
    Rows,
    RowSampler,
    generation_options,
    seed_of,
)
from airflow_vlm_provider.engines.devices import free_memory, is_device_lost, is_out_of_memory
from airflow_vlm_provider.engines.grammar import GrammarMask, Grammars, writes_json
from airflow_vlm_provider.engines.local_prompts import Prompt, Reader
from airflow_vlm_provider.engines.prefill import SharedPrefill
from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError, VLMError
from airflow_vlm_provider.types import Answer, Choice, Request, Usage

# Arguments of from_pretrained that say where a model comes from and where it runs, but not what it answers.
_NO_INFLUENCE = frozenset(
    {
        "attn_implementation",
        "cache_dir",
        "device_map",
        "force_download",
        "local_files_only",
        "low_cpu_mem_usage",
        "max_memory",
        "offload_buffers",
        "offload_folder",
        "proxies",
        "token",
        "use_safetensors",
    }
)


@dataclass(frozen=True)
class _Question:
    """A request that stands ready for the model.

    :param copies: How often to hand out each answer: greedy candidates are all the same one.
    """

    prompt: Prompt
    decoding: Decoding
    copies: int
    seed: int
    grammar: Any | None

    @property
    def group(self) -> Hashable:
        return self.decoding, self.prompt.group


class TransformersEngine:
    """Answers requests with a model that is loaded into this process.

    A checkpoint with a chat template is asked ``system`` and ``parts``; one without is given ``completion`` to go on
    with, and one picture.

    Requests that wait at the same time are answered together, in batches. When the device's memory does not hold a
    batch, it is halved, and batches stay that small from then on. A sample that the model can't cope with becomes a
    :class:`~airflow_vlm_provider.errors.SampleError`, and never its neighbours in the batch; so does one for which
    the memory is too small even when it is alone.

    Without a temperature, decoding is greedy. A seed decides an answer whatever else is in the batch, but for
    rounding: batches of another shape can round differently.

    :param model: Name on the Hugging Face hub, or a folder.
    :param revision: Branch, tag or commit on the hub.
    :param gpu_batch_size: How many answers are generated at once at most; a request for ``n`` candidates counts
        ``n`` times.
    :param device: Such as ``"cuda:1"`` or ``"cpu"``; None takes CUDA before MPS before the CPU.
    :param dtype: Precision: ``"auto"`` (the checkpoint's), ``"bfloat16"``, ``"float16"``, ``"float32"``. None takes
        bfloat16 on a GPU that knows it, float16 on one that does not, and float32 on the CPU.
    :param trust_remote_code: Run the code that a checkpoint brings along.
    :param model_params: More arguments for the model's ``from_pretrained``, such as ``attn_implementation``.
    :param linger: Seconds that an idle model waits after a request for others to join it.
    :param concurrency: How many requests are kept in flight; None is twice the batch size, so that the next batch
        is loaded while one runs.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        gpu_batch_size: int = 8,
        device: str | None = None,
        dtype: Any = None,
        trust_remote_code: bool = False,
        model_params: Mapping[str, Any] | None = None,
        linger: float = 0.02,
        concurrency: int | None = None,
    ) -> None:
        if not model:
            raise ConfigError(
                "The transformers engine needs a model: give model=, or set it in the connection's extra"
            )
        if gpu_batch_size < 1:
            raise ConfigError(f"gpu_batch_size={gpu_batch_size} must be at least 1")
        self.model = model
        self.revision = revision
        self.gpu_batch_size = gpu_batch_size
        self.concurrency = concurrency or 2 * gpu_batch_size
        # Not known to be otherwise: that is seen when the model is loaded.
        self.takes_video = True
        self._device = device
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._model_params = dict(model_params or {})
        self._linger = linger
        self._batcher: Batcher[Request, _Question, Any, Answer] | None = None
        self._checkpoint: Checkpoint | None = None
        self._grammars: Grammars | None = None
        self._reader: Reader | None = None

    @property
    def window(self) -> int:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return self.concurrency

    @property
    def in_flight(self) -> int:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return 0 if self._batcher is None else self._batcher.in_flight

    @property
    def pressure(self) -> str | None:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return None

    def parameters(self) -> Mapping[str, Any]:
        """What decides an answer besides the request."""
        return {
            "engine": "transformers",
            "model": self.model,
            "revision": self.revision,
            "dtype": None if self._dtype is None else str(self._dtype).removeprefix("torch."),
            "model_params": {
                name: value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
                for name, value in sorted(self._model_params.items())
                if name not in _NO_INFLUENCE
            },
            "sampling": {"temperature": 0, "max_tokens": DEFAULT_MAX_TOKENS},
        }

    async def __aenter__(self) -> TransformersEngine:
        self._batcher = Batcher(
            load=self._load,
            group=lambda question: question.group,
            collate=self._collate,
            run=self._run,
            blame=_blame,
            size=self.gpu_batch_size,
            in_flight=self.concurrency,
            linger=self._linger,
        )
        try:
            await self._batcher.in_model_thread(self._load_model)
        except BaseException:
            self._batcher.end_threads()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._batcher is not None
        try:
            await self._batcher.stop()
            await self._batcher.in_model_thread(self._unload_model)
        finally:
            self._batcher.end_threads()

    async def ask(self, request: Request) -> Answer:
        """Answer one request whose media are loaded.

        :raises SampleError: the model can't cope with the request: ``media_corrupt`` (not decodable),
            ``media_too_large`` (no memory for it), ``rejected`` (too long, or anything else).
        :raises NoVideoError: it holds a video, and the model takes none.
        :raises EngineError: the device failed, or the engine was closed.
        :raises ConfigError: a sampling parameter or the schema is wrong.
        """
        if self._batcher is None:
            raise EngineError("The engine is not open: use it as an asynchronous context manager")
        decoding = Decoding.of(request)
        seed_of(request)
        return await self._batcher.submit(request, weight=decoding.sequences)

    # In the model thread.

    def _load_model(self) -> None:
        checkpoint = load_checkpoint(
            self.model,
            revision=self.revision,
            device=self._device,
            dtype=self._dtype,
            trust_remote_code=self._trust_remote_code,
            model_params=self._model_params,
        )
        self._grammars = _grammars(checkpoint)
        self._reader = (Conversations if checkpoint.conversational else Captions)(checkpoint, self.model)
        self.takes_video = self._reader.takes_video
        self._checkpoint = checkpoint

    def _unload_model(self) -> None:
        self._checkpoint = self._grammars = self._reader = None
        free_memory()

    def _run(self, tickets: Sequence[Ticket[_Question, Answer]], inputs: Any) -> list[Answer]:
        try:
            return self._generate(tickets, inputs)
        except Exception as error:
            if is_out_of_memory(error):
                failure: Exception = BatchTooLargeError(str(error))
            elif is_device_lost(error):
                failure = EngineError(f"The device failed: {error}")
            else:
                raise
        # Only now, because the handled exception kept every tensor of the failed batch alive.
        free_memory()
        raise failure

    def _generate(self, tickets: Sequence[Ticket[_Question, Answer]], inputs: Any) -> list[Answer]:
        import torch
        from transformers import BatchFeature

        assert self._checkpoint is not None
        checkpoint, questions = self._checkpoint, [ticket.loaded for ticket in tickets]
        decoding = questions[0].decoding
        each = decoding.sequences
        rows = Rows(
            len(questions) * each,
            eos_ids=checkpoint.eos_ids,
            stop=decoding.stop,
            decode=lambda tokens: checkpoint.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            abandoned=lambda row: tickets[row // each].abandoned,
        )
        processors: list[Any] = []
        if self._grammars is not None and any(question.grammar is not None for question in questions):
            compiled = [question.grammar for question in questions for _ in range(each)]
            processors.append(GrammarMask(self._grammars, compiled, rows))
        if not decoding.greedy:
            processors.append(RowSampler(decoding, [question.seed for question in questions]))
        prompt_tokens = inputs["attention_mask"].sum(dim=-1).tolist()
        # A copy, because `to` works in place, and the device's memory has to be free again when this returns.
        inputs = BatchFeature(dict(inputs)).to(checkpoint.model.device, checkpoint.model.dtype)
        options = dict(generation_options(decoding))
        if each > 1 and SharedPrefill.works_with(checkpoint.model):
            options.update(num_return_sequences=1, custom_generate=SharedPrefill(each))
        with torch.inference_mode():
            checkpoint.model.generate(
                **inputs,
                **options,
                logits_processor=processors,
                stopping_criteria=[rows],
            )
        return [
            self._answer(question, rows, range(index * each, (index + 1) * each), prompt_tokens[index])
            for index, question in enumerate(questions)
        ]

    def _answer(self, question: _Question, rows: Rows, mine: Sequence[int], prompt_tokens: int) -> Answer:
        completion_tokens = sum(len(rows.tokens[row]) for row in mine)
        return Answer(
            choices=tuple(Choice(rows.answer(row), rows.finish_reason(row)) for row in mine)
            * question.copies,
            model=self.model,
            usage=Usage(requests=1, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens),
        )

    # In the loading thread.

    def _load(self, request: Request) -> _Question:
        assert self._reader is not None
        decoding = Decoding.of(request)
        # A model that can't say JSON answers freely.
        grammar = None
        if self._grammars is not None and request.schema is not None:
            grammar = self._grammars.compile(request.schema)
        return _Question(
            prompt=self._reader.read(request),
            decoding=decoding,
            copies=request.n // decoding.sequences,
            seed=seed_of(request),
            grammar=grammar,
        )

    def _collate(self, questions: Sequence[_Question]) -> Any:
        assert self._checkpoint is not None
        assert self._reader is not None
        checkpoint = self._checkpoint
        inputs = self._reader.collate([question.prompt for question in questions])
        if checkpoint.context is not None:
            longest = int(inputs["attention_mask"].sum(dim=-1).max())
            max_tokens = questions[0].decoding.max_tokens
            # Where a prompt is read by one half of the model and the answer written by the other, each has its own.
            apart = checkpoint.model.config.is_encoder_decoder
            if (max(longest, max_tokens) if apart else longest + max_tokens) > checkpoint.context:
                raise SampleError(
                    "rejected",
                    f"A prompt of {longest} tokens and an answer of at most {max_tokens} exceed the model's "
                    f"{checkpoint.context}; lower max_tokens, or max_pixels",
                )
        return inputs


def _grammars(checkpoint: Checkpoint) -> Grammars | None:
    """What answers can be constrained with; None where they can't be."""
    if not checkpoint.conversational and not (checkpoint.starts_freely and writes_json(checkpoint.tokenizer)):
        return None
    return Grammars(checkpoint.tokenizer, vocabulary=checkpoint.vocabulary, eos_ids=checkpoint.eos_ids)


def _blame(error: Exception) -> Exception:
    """What a request's caller gets for an error of a batch that held nothing else."""
    if isinstance(error, VLMError):
        return error
    if isinstance(error, BatchTooLargeError):
        message = (
            f"The device's memory does not hold this request even alone: lower max_pixels or n ({error})"
        )
        return SampleError("media_too_large", message, attempts=1)
    return SampleError(
        "rejected", f"The model can't take this request: {type(error).__name__}: {error}", attempts=1
    )
