"""Chat models in this process: a request becomes a conversation in the words of the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from airflow_vlm_provider.engines.checkpoints import Checkpoint
from airflow_vlm_provider.engines.clips import Clip, decode_clip, video_markers_doubled
from airflow_vlm_provider.engines.local_prompts import Prompt, decode_image
from airflow_vlm_provider.errors import ConfigError, NoVideoError, SampleError
from airflow_vlm_provider.types import Media, Request


@dataclass(frozen=True)
class _Content:
    text: str
    images: list[Any]
    clips: list[Clip]


class Conversations:
    """Makes a chat model's inputs of requests; a :class:`~airflow_vlm_provider.engines.local_prompts.Reader`.

    Prompts of unequal length share a batch, padded on the left.

    :param checkpoint: The model, with a chat template.
    :param model: Its name, for messages.
    """

    def __init__(self, checkpoint: Checkpoint, model: str) -> None:
        self._processor = checkpoint.processor
        self._bos = checkpoint.tokenizer.bos_token
        self._placeholders = checkpoint.placeholders
        self._model = model
        self.takes_video = self._renders_videos()
        self._unwrap = self.takes_video and video_markers_doubled(self._processor, checkpoint.tokenizer)

    def read(self, request: Request) -> Prompt:
        """Make a request ready.

        :raises SampleError: ``media_corrupt`` (not decodable), ``rejected`` (text that stands for media).
        :raises NoVideoError: it holds a video, and the model takes none.
        :raises ConfigError: the chat template can't take this conversation.
        """
        media = [part for part in request.parts if isinstance(part, Media)]
        if not self.takes_video and any(part.kind == "video" for part in media):
            raise NoVideoError(f"model={self._model!r} takes no videos")
        content = _Content(
            text=self._render(request),
            images=[decode_image(part) for part in media if part.kind == "image"],
            clips=[decode_clip(part) for part in media if part.kind == "video"],
        )
        # What a processor makes of a batch where only some prompts have media is anybody's guess.
        return Prompt(group=frozenset(part.kind for part in media), content=content)

    def collate(self, prompts: Sequence[Prompt]) -> Any:
        """Put prompts together to what the model's ``generate`` takes."""
        contents: list[_Content] = [prompt.content for prompt in prompts]
        images = [content.images for content in contents]
        clips = [clip for content in contents for clip in content.clips]
        videos: dict[str, Any] = {}
        if clips:
            videos = {
                "videos": [clip.frames for clip in clips],
                "video_metadata": [clip.metadata() for clip in clips],
                "do_sample_frames": False,
            }
        return self._processor(
            text=[content.text for content in contents],
            images=images if any(images) else None,
            **videos,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            # Some chat templates write it themselves.
            add_special_tokens=not (self._bos and contents[0].text.startswith(self._bos)),
        )

    def _render(self, request: Request) -> str:
        """The prompt as the model's chat template has it."""
        texts = [request.system or "", *(part for part in request.parts if isinstance(part, str))]
        for placeholder in self._placeholders:
            if any(placeholder in text for text in texts):
                raise SampleError(
                    "rejected", f"The text holds {placeholder!r}, which stands for a picture to this model"
                )
        messages = [{"role": "user", "content": [_content(part) for part in request.parts]}]
        if request.system is not None:
            messages.insert(0, {"role": "system", "content": [_content(request.system)]})
        try:
            prompt = self._templated(messages)
        except Exception as error:
            raise ConfigError(
                f"The chat template of model={self._model!r} can't take this conversation ({error}); some models "
                "know no system prompt: try without one"
            ) from error
        if self._unwrap:
            processor = self._processor
            video = str(processor.video_token)
            prompt = prompt.replace(
                f"{processor.vision_start_token}{video}{processor.vision_end_token}", video
            )
        return prompt

    def _renders_videos(self) -> bool:
        token = getattr(self._processor, "video_token", None)
        if getattr(self._processor, "video_processor", None) is None or token is None:
            return False
        try:
            prompt = self._templated([{"role": "user", "content": [{"type": "video"}]}])
        except Exception:
            return False
        return str(token) in prompt

    def _templated(self, messages: list[dict[str, Any]]) -> str:
        prompt: str = self._processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return prompt


def _content(part: Any) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Media):
        return {"type": part.kind}
    raise ConfigError(f"The transformers engine takes texts and loaded media, not {part!r}")
