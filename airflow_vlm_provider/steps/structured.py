"""Answers in the form of a pydantic model: what is asked for, and from an answer's text to the model's values."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, PydanticUserError, ValidationError

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.steps.loose_json import Pairs, read_values
from airflow_vlm_provider.steps.strict_schema import column_schema, strict_schema

# More than a model has to say; bounds the time that a runaway answer takes.
_EXAMINED = 100_000
_THOUGHT_END = "</think>"
_VALUES = 20
_MESSAGE = 200


class StructuredOutput:
    """
    A model's values as they are asked for, read and written.

    :param model: A pydantic model whose JSON is an object.
    :ivar asked: The JSON schema that answers have to satisfy.
    :ivar written: The JSON schema of the values, as far as formats with types need it.
    :raises ConfigError: it is no such model.
    """

    def __init__(self, model: type[BaseModel]) -> None:
        if not inspect.isclass(model) or not issubclass(model, BaseModel):
            raise ConfigError(
                f"output_type is {model!r}; give a class derived from pydantic.BaseModel, or None."
            )
        self.model = model
        try:
            self.asked = strict_schema(model.model_json_schema())
            dumped = model.model_json_schema(by_alias=False, mode="serialization")
        except PydanticUserError as error:
            raise ConfigError(f"output_type {model.__name__} has no JSON schema: {error.message}") from None
        if self.asked.get("type") != "object":
            raise ConfigError(
                f"output_type {model.__name__} is no object in JSON, as engines want it; make what it holds a field of "
                "a model."
            )
        self.written = column_schema(dumped)

    def read(self, text: str, *, complete: bool) -> Any:
        """
        The model's values in an answer, as JSON values: as they stand there, or else as they were meant.

        :param complete: False takes only what was written to its end.
        :raises SampleError: ``unparsable``, with the reason that pydantic gives.
        """
        text = text.rpartition(_THOUGHT_END)[2].strip()
        reason = "it holds no JSON object"
        # As it stands; between code fences or among words.
        for candidate in (text, text[text.find("{") : text.rfind("}") + 1]):
            try:
                return self._dumped(self.model.model_validate_json(candidate))
            except ValidationError as error:
                reason = _reason(error) or reason
        if complete:
            # What reads tolerantly takes long numbers for floats, and leaves out what it can't read. A model that
            # repeats the form it was told, or drafts, gives its answer last.
            for value in reversed(list(read_values(text[:_EXAMINED]))[-_VALUES:]):
                if not isinstance(value, Pairs):
                    continue
                try:
                    found = self.model.model_validate_json(json.dumps(_as_json(value)))
                except ValidationError as error:
                    reason = _reason(error) or reason
                    continue
                if _is_whole(found):
                    return self._dumped(found)
                reason = "not all of it can be read"
        raise SampleError("unparsable", f"The answer is no {self.model.__name__}: {reason}.")

    @staticmethod
    def _dumped(found: BaseModel) -> Any:
        return found.model_dump(mode="json", by_alias=False)

    def classes(self) -> list[type[BaseModel]]:
        """The model and those that it is made of, in a lasting order: whose code decides what is accepted."""
        found: dict[type[BaseModel], None] = {}
        left: list[Any] = [self.model]
        while left:
            each = left.pop()
            if not inspect.isclass(each) or not issubclass(each, BaseModel):
                left.extend(get_args(each))
            elif each not in found:
                bases = [
                    base for base in each.__mro__ if issubclass(base, BaseModel) and base is not BaseModel
                ]
                found.update(dict.fromkeys(bases))
                left.extend(field.annotation for field in each.model_fields.values())
        return list(found)


def _reason(error: ValidationError) -> str:
    """Why a value does not fit; empty where it is no JSON at all."""
    errors = error.errors(include_url=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        return ""
    where = ".".join(str(part) for part in errors[0]["loc"])
    what = errors[0]["msg"][:_MESSAGE]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{where}: {what}{more}" if where else f"{what}{more}"


def _is_whole(value: Any) -> bool:
    """Whether every field of a model was given, and none made up from a default, also of models in it."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return value.model_fields_set >= fields.keys() and all(
            _is_whole(getattr(value, name)) for name in fields
        )
    if isinstance(value, Mapping):
        return all(map(_is_whole, value.values()))
    return not isinstance(value, list | tuple | set | frozenset) or all(map(_is_whole, value))


def _as_json(value: Any) -> Any:
    if isinstance(value, Pairs):
        return {key: _as_json(each) for key, each in value}
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
