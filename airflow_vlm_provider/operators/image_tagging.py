"""The operator that tags images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.parameters import check_parameters, special_tokens
from airflow_vlm_provider.steps.base import Step
from airflow_vlm_provider.steps.tagging import TaggingStep


class ImageTaggingVLMOperator(ShardOperator):
    """
    Tag the images of every sample with a vision-language model.

    The tags stand in ``row[meta_key][tag_field_name]``, one list of 5 to 10 tags for each image, in the order of
    ``row[image_key]``. Samples that have the field already are left as they are. Takes the parameters of
    Data-Juicer's ``image_tagging_vlm_mapper``, and what :class:`ShardOperator` documents.

    :param tag_field_name: Field under ``meta_key`` that takes the tags.
    :param system_prompt: System prompt instead of the project's own, taken as it is: prompts are no Jinja templates.
    :param input_template: User message beside the image; ``{text}`` in it becomes the sample's text, other braces
        are left alone.
    :param sampling_params: Sampling parameters by their OpenAI names (``temperature``, ``max_tokens``, ...).
    :param try_num: How often an image is asked about at most until its answer holds tags.
    """

    def __init__(
        self,
        *,
        tag_field_name: str = "image_tags",
        system_prompt: str | None = None,
        input_template: str | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        try_num: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.tag_field_name = tag_field_name
        self.system_prompt = system_prompt
        self.input_template = input_template
        self.sampling_params = sampling_params
        self.try_num = try_num
        check_parameters(self)

    def make_step(self) -> Step:
        """The tagging step with this operator's parameters.

        :raises ConfigError: one of them is wrong.
        """
        return TaggingStep(
            tag_field_name=self.tag_field_name,
            system_prompt=self.system_prompt,
            input_template=self.input_template,
            sampling_params=self.sampling_params,
            try_num=self.try_num,
            text_key=self.text_key,
            image_key=self.image_key,
            meta_key=self.meta_key,
            special_tokens=special_tokens(self),
        )
