"""The general operator: any prompt about any row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.parameters import check_parameters
from airflow_vlm_provider.steps.base import Step
from airflow_vlm_provider.steps.chunks import SpecialTokens
from airflow_vlm_provider.steps.vlm_map import DEFAULT_STEP_NAME, VLMMapStep

if TYPE_CHECKING:
    from pydantic import BaseModel


class VLMMapOperator(ShardOperator):
    """
    Ask a vision-language model one question about every sample, and write the answer into a field.

    The images and videos of a sample are sent along, if it has any. Samples that have the field already are left as
    they are, and so are those about which there is nothing to ask. An answer that is of no use is asked for again.
    Takes what :class:`ShardOperator` documents, and:

    :param prompt: A template in which ``{text}``, ``{meta.title}`` become the sample's values; other braces are left
        alone, and it is no Jinja template. Or a function of the sample (a dict, its own copy) that returns the prompt,
        or None where there is nothing to ask.
    :param field: Field that takes the answer.
    :param output_type: A pydantic model that answers have to fit; the field takes its values as JSON. None takes the
        answer's text.
    :param system_prompt: System prompt; None sends none.
    :param sampling_params: Sampling parameters by their OpenAI names over the defaults: ``max_tokens`` 512,
        temperature 0, or 1 with several answers.
    :param n: How many answers are drawn, by one request; with more than 1 the field takes a list of them.
    :param try_num: How often it is asked at most until the answer can be used.
    :param images: Whether a sample's images are sent.
    :param videos: Whether its videos are.
    :param fps: Frames that are looked at of every second of a video.
    :param max_frames: Most frames of a video, spread evenly.
    :param transport: ``video`` sends a video as such, ``frames`` as one image for each frame, ``auto`` as the model
        takes it.
    :param version: Stands for the code of the function and of ``output_type``, which else are told by their source:
        another version, and shards are done again.
    :param step_name: Names the step's folder in the ledger.
    """

    def __init__(
        self,
        *,
        prompt: str | Callable[..., str | None],
        field: str = "answer",
        output_type: type[BaseModel] | None = None,
        system_prompt: str | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        n: int = 1,
        try_num: int = 3,
        images: bool = True,
        videos: bool = True,
        fps: float = 2.0,
        max_frames: int = 32,
        transport: str = "auto",
        version: str | None = None,
        step_name: str = DEFAULT_STEP_NAME,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.prompt = prompt
        self.field = field
        self.output_type = output_type
        self.system_prompt = system_prompt
        self.sampling_params = sampling_params
        self.n = n
        self.try_num = try_num
        self.images = images
        self.videos = videos
        self.fps = fps
        self.max_frames = max_frames
        self.transport = transport
        self.version = version
        self.step_name = step_name
        check_parameters(self)

    def make_step(self) -> Step:
        """The step with this operator's parameters.

        :raises ConfigError: one of them is wrong.
        """
        return VLMMapStep(**step_parameters(self))


def step_parameters(given: Any) -> dict[str, Any]:
    """The step's parameters out of an operator, or anything with its attributes."""
    names = (
        *(
            "prompt",
            "field",
            "output_type",
            "system_prompt",
            "sampling_params",
            "n",
            "try_num",
            "images",
            "videos",
        ),
        *("fps", "max_frames", "transport", "version", "step_name", "text_key", "image_key", "video_key"),
    )
    tokens = SpecialTokens(
        given.image_special_token,
        given.video_special_token,
        given.audio_special_token,
        given.eoc_special_token,
    )
    return {**{name: getattr(given, name) for name in names}, "special_tokens": tokens}
