"""The operator that asks again for dead letters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.errors import ConfigError, ShardError
from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.engines import EngineOptions
from airflow_vlm_provider.operators.parameters import ParameterError, is_known
from airflow_vlm_provider.operators.plans import resolve_shards, shards_label
from airflow_vlm_provider.operators.runners import storage_of
from airflow_vlm_provider.steps.base import Step
from airflow_vlm_provider.steps.image_captioning import ImageCaptioningStep
from airflow_vlm_provider.steps.image_captioning_gpt4v import ImageCaptioningFromGPT4VStep
from airflow_vlm_provider.steps.tagging import TaggingStep
from airflow_vlm_provider.steps.video_captioning import VideoCaptioningStep
from airflow_vlm_provider.steps.vlm_map import VLMMapStep

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.sdk.definitions.mappedoperator import OperatorPartial

    from airflow_vlm_provider.ledger.failed_shards import FailedGroup
    from airflow_vlm_provider.ledger.manifest import Manifest
    from airflow_vlm_provider.operators.runners import Prepared
    from airflow_vlm_provider.runner import ShardRunner


class RemadeStep(Step, Protocol):
    """A step that can be made again."""

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Step:
        """The step whose parameters these are."""


STEPS: Mapping[str, type[RemadeStep]] = {
    "image_tagging": TaggingStep,
    "image_captioning": ImageCaptioningStep,
    "image_captioning_gpt4v": ImageCaptioningFromGPT4VStep,
    "video_captioning": VideoCaptioningStep,
    "vlm_map": VLMMapStep,
}
"""The steps that can be made again from what a manifest says of them, by their names in the ledger."""


class RedriveOperator(ShardOperator):
    """
    Ask again for the dead letters below a destination, and merge what comes of it into the committed outputs.

    Which step it was, with what parameters and model, and where the shards and their media are, is read from the
    manifests; only whom to ask is given here. No other sample is asked about: their answers are taken from the
    journals, and every output is committed whole. A sample that failed for its media is only tried again when these
    have changed. Where the manifests below a destination differ, each kind of them is done by itself.

    Returns what the shards' own operator does, summed up over the shards that had dead letters, and besides
    ``redriven`` (dead letters that were tried again), ``recovered`` (that are none any more) and ``still_failed``.

    :param destination: Where outputs and the ledger are (templated).
    :param step: Only dead letters of the step of this name (``image_tagging``, ``video_captioning``, ...); None takes all steps' (templated).
    :param shards: Only those of these shards, by their names: one or a list; None takes all (templated).
    :param kinds: Only dead letters of these kinds (``unparsable``, ``transient``, ...); None takes all (templated).
    :param vlm_conn_id: Connection of type ``vlm``, which serves the model that the manifests name (templated).
    :param aws_conn_id: Connection for S3; None uses boto3's own search for credentials (templated).
    :param storage_conn_id: Connection for other object stores; see :class:`ShardOperator` (templated).
    :param engine: ``openai``, ``vllm`` or ``transformers``; None takes the connection's, or else ``openai``.
    :param api_endpoint: Path below the base URL that requests go to, or a full URL (``openai`` engine only).
    :param model_params: As the shards' own operator has it. None takes the manifest's, with the engine ``openai``, and
        none with others.
    :param max_error_rate: Share of rows that failed still, of the shards that had dead letters, above which the task
        fails (after committing).
    :param concurrency: Requests in flight; None takes the connection's ``max_concurrency``.
    :param trust_media: Don't look whether media have changed, so that those that failed are not tried again.
    """

    template_fields: Sequence[str] = (
        "destination",
        "step",
        "shards",
        "kinds",
        "vlm_conn_id",
        "aws_conn_id",
        "storage_conn_id",
    )

    def __init__(
        self,
        *,
        destination: str,
        step: str | None = None,
        shards: str | Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        vlm_conn_id: str = "vlm_default",
        aws_conn_id: str | None = "aws_default",
        storage_conn_id: str | None = None,
        engine: str | None = None,
        api_endpoint: str | None = None,
        model_params: Mapping[str, Any] | None = None,
        max_error_rate: float = 0.1,
        concurrency: int | None = None,
        trust_media: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            # Known when the manifests are.
            source="",
            destination=destination,
            shards=shards,
            vlm_conn_id=vlm_conn_id,
            aws_conn_id=aws_conn_id,
            storage_conn_id=storage_conn_id,
            engine=engine,
            api_endpoint=api_endpoint,
            model_params=model_params,
            max_error_rate=max_error_rate,
            concurrency=concurrency,
            trust_media=trust_media,
            failed_only=True,
            **kwargs,
        )
        self.step = step
        self.kinds = kinds
        self._check()
        self._groups: list[FailedGroup] = []
        self._group: FailedGroup | None = None
        self._options = EngineOptions()
        self._redriven = self._recovered = 0

    @classmethod
    def partial(cls, **kwargs: Any) -> OperatorPartial:
        """Begin a mapped operator. Its step is not known before the manifests are, so there is little to check."""
        return super(ShardOperator, cls).partial(**kwargs)

    def _check(self) -> None:
        """Check what is known already.

        :raises ParameterError: a parameter is wrong.
        """
        kinds = self.kinds
        if kinds is not None and is_known(kinds):
            if isinstance(kinds, str) or not all(isinstance(each, str) for each in kinds):
                raise ParameterError(f"kinds={kinds!r} must be a list of dead letters' kinds, or None.")
            if not kinds:
                raise ParameterError(
                    "kinds is empty, so nothing would be asked again; leave it out to take all."
                )
        if self.step is not None and is_known(self.step):
            self._step_class(self.step)

    def execute(self, context: Context) -> dict[str, Any]:
        """Ask again.

        :raises AirflowFailException: something only the author can mend; retries would not help.
        :raises AirflowException: too many rows failed still, or the engine or a store is gone; a retry may help.
        """
        from airflow_vlm_provider.ledger.manifest import Counts

        try:
            self._check()
            self._groups = self._find()
        except (ConfigError, PermissionError) as error:
            raise AirflowFailException(str(error)) from error
        self._redriven = self._recovered = 0
        if not self._groups:
            self.log.info("There are no dead letters to ask again for below %s", self.destination)
            return {**asdict(Counts()), "shards": 0, "destination": self.destination, **self._extra_summary()}
        return super().execute(context)

    def _find(self) -> list[FailedGroup]:
        from airflow_vlm_provider.ledger.failed_shards import failed_groups

        storage = storage_of(self)
        groups = failed_groups(
            storage.open_store(self.destination),
            step=self.step,
            shards=resolve_shards(self.shards, open_store=storage.open_store),
            kinds=self.kinds,
        )
        for group in groups:
            self._remake(group)
        return groups

    async def _run(self, context: Context) -> tuple[ShardRunner, list[Manifest], list[Manifest]]:
        """Do one group after another; what can't be done of one does not keep the others from it."""
        before: list[Manifest] = []
        fresh: list[Manifest] = []
        errors: list[ConfigError | ShardError] = []
        runner = None
        for group in self._groups:
            self._group = group
            self.log.info(
                "%d dead letters in %d shards of %s, step %s",
                sum(shard.chosen for shard in group.shards.values()),
                len(group.shards),
                group.source,
                group.step,
            )
            try:
                runner, done, new = await super()._run(context)
            except (ConfigError, ShardError) as error:
                errors.append(error)
                continue
            before += done
            fresh += new
            for manifest in new:
                shard = group.shards[manifest.input["uri"].removeprefix(group.source)]
                self._redriven += shard.chosen
                self._recovered += shard.failed - manifest.counts.failed
        if errors:
            raise type(errors[0])(" ".join(str(error) for error in errors))
        assert runner is not None
        return runner, before, fresh

    def prepare(self, context: Context) -> Prepared:
        """Make everything that the run of one group needs, as the operator that made its manifests would.

        :raises ConfigError: a parameter is wrong, or a shard is not there.
        """
        group = self._group
        assert group is not None
        step, engine = group.parameters["step"], group.parameters["engine"]
        media = group.parameters["media"]
        own = copy.copy(self)
        own.source = group.source
        own.shards = list(group.shards)
        own.api_or_hf_model = engine["model"]
        own.media_roots = media["roots"]
        own.max_pixels = media["max_pixels"]
        own.output_form = group.parameters["output"]["output"]
        for key in ("text_key", "image_key", "video_key", "meta_key"):
            setattr(own, key, step.get(key, getattr(self, key)))
        # Only requests over HTTP can be told from what is recorded; a model in process takes what can't be written.
        if "response_path" in engine:
            own.response_path = engine["response_path"]
            own._options = EngineOptions(detail=engine["detail"])
            if self.model_params is None:
                own.model_params = engine["model_params"]
        return super(RedriveOperator, own).prepare(context)

    def engine_options(self) -> EngineOptions:
        """What the operator wanted that made the group which is done now."""
        return self._options

    def make_step(self) -> Step:
        """The step of the group that is done now.

        :raises ConfigError: it can't be made again.
        """
        if self._group is None:
            raise ConfigError("Which step is asked again is read from the manifests when the task runs.")
        return self._remake(self._group)

    def _remake(self, group: FailedGroup) -> Step:
        """Make a group's step again.

        :raises ConfigError: it can't be.
        """
        missing = {"step", "engine", "media", "output"} - set(group.parameters)
        if missing:
            raise ConfigError(
                f"{next(iter(group.shards))} was committed without its parameters ({', '.join(sorted(missing))}). Run "
                "the operator that made it, with failed_only=True."
            )
        try:
            own = {name: value for name, value in group.parameters["step"].items() if name != "name"}
            return self._step_class(group.step).from_parameters(own)
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"The step {group.step!r} can't be made again from what {next(iter(group.shards))} was committed with "
                f"({error!r}); another version of this package wrote it. Run the operator that made it."
            ) from error

    @staticmethod
    def _step_class(name: str) -> type[RemadeStep]:
        if name not in STEPS:
            raise ParameterError(
                f"The step {name!r} can't be made again from its manifests; those that can are "
                f"{', '.join(sorted(STEPS))}. Run the operator that made them, with failed_only=True."
            )
        return STEPS[name]

    def _extra_summary(self) -> dict[str, Any]:
        return {
            "redriven": self._redriven,
            "recovered": self._recovered,
            "still_failed": self._redriven - self._recovered,
        }

    def _label(self) -> str:
        if self.shards is None:
            return self.destination.rstrip("/").rpartition("/")[2]
        return shards_label(self.shards)
