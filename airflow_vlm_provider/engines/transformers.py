"""Answers in process, with transformers' batched ``generate``: for workers and models without a vLLM server."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from airflow_vlm_provider.engines.batching import Batcher, BatchTooLargeError, Ticket
from airflow_vlm_provider.engines.checkpoints import Checkpoint, load_checkpoint
from airflow_vlm_provider.engines.decoding import (
    DEFAULT_MAX_TOKENS,
    Decoding,
    Rows,
    RowSampler,
    generation_options,
    seed_of,
)
from airflow_vlm_provider.engines.devices import free_memory, is_device_lost, is_out_of_memory
from airflow_vlm_provider.engines.grammar import GrammarMask, Grammars
from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError, VLMError
from airflow_vlm_provider.types import Answer, Choice, Media, Request, Usage

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
class _Prompt:
    """A request that stands ready for the model.

    :param copies: How often to hand out each answer: greedy candidates are all the same one.
    """

    text: str
    images: list[Any]
    decoding: Decoding
    copies: int
    seed: int
    grammar: Any | None


class TransformersEngine:
    """Answers requests with a chat model that is loaded into this process.

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
        self.takes_video = False
        self._device = device
        self._dtype = dtype
        self._trust_remote_code = trust_remote_code
        self._model_params = dict(model_params or {})
        self._linger = linger
        self._batcher: Batcher[Request, _Prompt, Any, Answer] | None = None
        self._checkpoint: Checkpoint | None = None
        self._grammars: Grammars | None = None

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
        :raises EngineError: the device failed, or the engine was closed.
        :raises ConfigError: a sampling parameter or the schema is wrong.
        """
        if self._batcher is None:
            raise EngineError("The engine is not open: use it as an asynchronous context manager")
        decoding = Decoding.of(request)
        seed_of(request)
        kinds = frozenset(part.kind for part in request.parts if isinstance(part, Media))
        return await self._batcher.submit(request, group=(decoding, kinds), weight=decoding.sequences)

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
        self._grammars = Grammars(
            checkpoint.tokenizer, vocabulary=checkpoint.vocabulary, eos_ids=checkpoint.eos_ids
        )
        self._checkpoint = checkpoint

    def _unload_model(self) -> None:
        self._checkpoint = self._grammars = None
        free_memory()

    def _run(self, tickets: Sequence[Ticket[_Prompt, Answer]], inputs: Any) -> list[Answer]:
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

    def _generate(self, tickets: Sequence[Ticket[_Prompt, Answer]], inputs: Any) -> list[Answer]:
        import torch
        from transformers import BatchFeature

        assert self._checkpoint is not None
        assert self._grammars is not None
        checkpoint, prompts = self._checkpoint, [ticket.loaded for ticket in tickets]
        decoding = prompts[0].decoding
        each = decoding.sequences
        rows = Rows(
            len(prompts) * each,
            eos_ids=checkpoint.eos_ids,
            stop=decoding.stop,
            decode=lambda tokens: checkpoint.tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            ),
            abandoned=lambda row: tickets[row // each].abandoned,
        )
        processors: list[Any] = []
        if any(prompt.grammar is not None for prompt in prompts):
            compiled = [prompt.grammar for prompt in prompts for _ in range(each)]
            processors.append(GrammarMask(self._grammars, compiled, rows))
        if not decoding.greedy:
            processors.append(RowSampler(decoding, [prompt.seed for prompt in prompts]))
        prompt_tokens = inputs["attention_mask"].sum(dim=-1).tolist()
        # A copy, because `to` works in place, and the device's memory has to be free again when this returns.
        inputs = BatchFeature(dict(inputs)).to(checkpoint.model.device, checkpoint.model.dtype)
        with torch.inference_mode():
            checkpoint.model.generate(
                **inputs,
                **generation_options(decoding),
                logits_processor=processors,
                stopping_criteria=[rows],
            )
        return [
            self._answer(prompt, rows, range(index * each, (index + 1) * each), prompt_tokens[index])
            for index, prompt in enumerate(prompts)
        ]

    def _answer(self, prompt: _Prompt, rows: Rows, mine: Sequence[int], prompt_tokens: int) -> Answer:
        completion_tokens = sum(len(rows.tokens[row]) for row in mine)
        return Answer(
            choices=tuple(Choice(rows.answer(row), rows.finish_reason(row)) for row in mine) * prompt.copies,
            model=self.model,
            usage=Usage(requests=1, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens),
        )

    # In the loading thread.

    def _load(self, request: Request) -> _Prompt:
        assert self._checkpoint is not None
        assert self._grammars is not None
        decoding = Decoding.of(request)
        return _Prompt(
            text=_render(self._checkpoint, request, self.model),
            images=[_decode(part) for part in request.parts if isinstance(part, Media)],
            decoding=decoding,
            copies=request.n // decoding.sequences,
            seed=seed_of(request),
            grammar=None if request.schema is None else self._grammars.compile(request.schema),
        )

    def _collate(self, prompts: Sequence[_Prompt]) -> Any:
        assert self._checkpoint is not None
        checkpoint = self._checkpoint
        images = [prompt.images for prompt in prompts]
        bos = checkpoint.tokenizer.bos_token
        inputs = checkpoint.processor(
            text=[prompt.text for prompt in prompts],
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            # Some chat templates write it themselves.
            add_special_tokens=not (bos and prompts[0].text.startswith(bos)),
        )
        if checkpoint.context is not None:
            longest = int(inputs["attention_mask"].sum(dim=-1).max())
            max_tokens = prompts[0].decoding.max_tokens
            if longest + max_tokens > checkpoint.context:
                raise SampleError(
                    "rejected",
                    f"A prompt of {longest} tokens and an answer of at most {max_tokens} exceed the model's "
                    f"{checkpoint.context}; lower max_tokens, or max_pixels",
                )
        return inputs


def _render(checkpoint: Checkpoint, request: Request, model: str) -> str:
    """The prompt as the model's chat template has it."""
    texts = [request.system or "", *(part for part in request.parts if isinstance(part, str))]
    for placeholder in checkpoint.placeholders:
        if any(placeholder in text for text in texts):
            raise SampleError(
                "rejected", f"The text holds {placeholder!r}, which stands for a picture to this model"
            )
    messages = [{"role": "user", "content": [_content(part) for part in request.parts]}]
    if request.system is not None:
        messages.insert(0, {"role": "system", "content": [_content(request.system)]})
    try:
        prompt: str = checkpoint.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:
        raise ConfigError(
            f"The chat template of model={model!r} can't take this conversation ({error}); some models know no "
            "system prompt: try without one"
        ) from error
    return prompt


def _content(part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Media) and part.kind == "image":
        return {"type": "image"}
    raise ConfigError(
        f"The transformers engine takes text and images, not {part!r}; use engine vllm or openai"
    )


def _decode(media: Media) -> Any:
    from PIL import Image

    try:
        return Image.open(io.BytesIO(media.data)).convert("RGB")
    except Exception as error:
        raise SampleError("media_corrupt", f"The image can't be decoded: {error}", media=media.ref) from error


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
