"""The operator that exports: committed shards in, one file for training code out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import AirflowFailException

import airflow_vlm_provider
from airflow_vlm_provider.errors import ConfigError, ShardError
from airflow_vlm_provider.exporters.coco import Coco
from airflow_vlm_provider.exporters.examples import SPECIAL_TOKENS, ExampleReader, LeftOut
from airflow_vlm_provider.exporters.llava import PROMPT, Llava
from airflow_vlm_provider.exporters.pairs import JsonLinesPairs, TabSeparatedPairs
from airflow_vlm_provider.operators.destination import check_destination
from airflow_vlm_provider.operators.parameters import ParameterError, is_known
from airflow_vlm_provider.operators.plans import resolve_shards
from airflow_vlm_provider.operators.storage import Storage, find_shards

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_vlm_provider.exporters.base import Exporter
    from airflow_vlm_provider.shards.stores import ObjectInfo, Store
    from airflow_vlm_provider.types import Sample

SUFFIXES = {
    "llava": Llava.suffixes,
    "coco": Coco.suffixes,
    "pairs": JsonLinesPairs.suffixes + TabSeparatedPairs.suffixes,
}
LEFT_OUT: tuple[str, ...] = ("rows_unreadable", *get_args(LeftOut))


class ExportDatasetOperator(BaseOperator):
    """
    Export the rows of a dataset's shards to one file that training code reads.

    Rows are read one by one and the file appears whole or not at all. Returns how many rows there were, how many
    records they became, and how many rows and images were left out for which reason; see :doc:`exports`. It fails
    when not one row became a record.

    :param source: Where the shards are, as a rule another task's destination: a prefix or one shard (templated).
    :param destination: The file to write: ``s3://bucket/sets/train.json``, ``file:///path`` or a local path; its
        name ends in ``.json`` (LLaVA, COCO), ``.jsonl`` or ``.tsv`` (pairs) (templated).
    :param format: ``llava`` (LLaVA conversations), ``coco`` (COCO captions) or ``pairs`` (image and text).
    :param shards: Names under ``source``, one or a list; None takes all (templated).
    :param text_field: Where the caption stands: a field's name, or a path of names joined by dots, as in
        ``__dj__meta__.image_tags``. A list of tags is joined by commas (templated).
    :param image_key: Field of the list of image references.
    :param image_base: URI or path to put before relative references; None writes them relative to ``source``
        (templated).
    :param prompt: What the human asks (``llava`` only); None asks to describe the image.
    :param aws_conn_id: Connection for S3; None uses boto3's own search for credentials (templated).
    :param storage_conn_id: Connection for other object stores than S3 (``gs://``, ``abfs://``, ...); None takes the
        one in the URI, or the default one of the scheme (templated).
    """

    template_fields: Sequence[str] = (
        "source",
        "shards",
        "destination",
        "text_field",
        "image_base",
        "aws_conn_id",
        "storage_conn_id",
    )

    def __init__(
        self,
        *,
        source: str,
        destination: str,
        format: str = "llava",
        shards: str | Sequence[str] | None = None,
        text_field: str = "text",
        image_key: str = "images",
        image_base: str | None = None,
        prompt: str | None = None,
        aws_conn_id: str | None = "aws_default",
        storage_conn_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.destination = destination
        self.format = format
        self.shards = shards
        self.text_field = text_field
        self.image_key = image_key
        self.image_base = image_base
        self.prompt = prompt
        self.aws_conn_id = aws_conn_id
        self.storage_conn_id = storage_conn_id
        _check(self)

    def execute(self, context: Context) -> dict[str, Any]:  # noqa: ARG002
        """Read the shards and write the file.

        :raises AirflowFailException: something only the author can mend; retries would not help.
        :raises ShardError: a shard can't be read.
        """
        try:
            _check(self)
            storage = Storage(aws_conn_id=self.aws_conn_id, storage_conn_id=self.storage_conn_id)
            names = resolve_shards(self.shards, open_store=storage.open_store)
            source, shards = find_shards(self.source, names, storage=storage)
            folder, slash, name = self.destination.rpartition("/")
            target = storage.open_store(folder + slash or ".")
            summary = self._export(source, shards, target, name)
        except (ConfigError, PermissionError) as error:
            raise AirflowFailException(str(error)) from error
        if left_out := ", ".join(f"{name} {summary[name]}" for name in LEFT_OUT if summary[name]):
            self.log.warning("Left out of the export: %s", left_out)
        self.log.info("Done: %s", ", ".join(f"{name} {value}" for name, value in summary.items()))
        return summary

    def _export(
        self, source: Store, shards: Sequence[ObjectInfo], target: Store, name: str
    ) -> dict[str, Any]:
        exporter = self._exporter()
        reader = ExampleReader(
            text_field=self.text_field,
            image_key=self.image_key,
            image_base=self.image_base,
            special_tokens=(*SPECIAL_TOKENS, *exporter.reserved),
        )
        counts: Counter[str] = Counter()
        with target.create(name) as stream, exporter.open(stream) as sink:
            for shard in shards:
                for sample in self._samples(source, shard.name):
                    counts["rows"] += 1
                    if sample.row is None:
                        counts["rows_unreadable"] += 1
                        continue
                    found = reader.read(sample.row, folder=self._folder(shard.name, sample))
                    counts.update(found.left_out)
                    counts["records"] += sink.add(found.examples)
            if counts["rows"] and not counts["records"]:
                raise ConfigError(
                    f"Not one of the {counts['rows']} rows below {source.uri} has an image in "
                    f"image_key={self.image_key!r} and a caption in text_field={self.text_field!r}: "
                    f"{_counted(counts)}. Correct these two; nothing was written."
                )
        return {
            "shards": len(shards),
            **_counted(counts),
            "format": self.format,
            "source": source.uri,
            "destination": target.uri + name,
        }

    def _samples(self, source: Store, shard: str) -> Iterator[Sample]:
        from airflow_vlm_provider.shards.formats import RowKeys, shard_format
        from airflow_vlm_provider.shards.stores import StoreError

        form = shard_format(shard)
        # Parquet may hold an object as JSON text.
        first, dot, _ = self.text_field.partition(".")
        keys = RowKeys(image=self.image_key, objects=frozenset({first} if dot else ()))
        try:
            with (
                source.open_seekable(shard) if form.seekable else source.open(shard) as stream,
                form.open(stream, keys=keys) as rows,
            ):
                yield from rows
        except (ShardError, StoreError, FileNotFoundError) as error:
            raise ShardError(f"{source.uri}{shard} can't be read: {error}") from error

    def _folder(self, shard: str, sample: Sample) -> str:
        """What a row's relative references are relative to, as seen from the source."""
        folders = [shard.rpartition("/")[0]]
        if sample.key is not None and sample.row is not None:
            images = sample.row.get(self.image_key)
            if isinstance(images, list) and images and images[0] in sample.embedded:
                # A tar's members are where unpacking it beside itself would put them.
                folders.append(sample.key.rpartition("/")[0])
        return "/".join(folder for folder in folders if folder)

    def _exporter(self) -> Exporter:
        if self.format == "llava":
            return Llava(prompt=PROMPT if self.prompt is None else self.prompt)
        if self.format == "coco":
            return Coco(description=f"Exported by airflow-provider-vlm {airflow_vlm_provider.__version__}")
        tabs = self.destination.lower().endswith(TabSeparatedPairs.suffixes)
        return TabSeparatedPairs() if tabs else JsonLinesPairs()


def _counted(counts: Counter[str]) -> dict[str, int]:
    return {name: counts[name] for name in ("rows", "records", *LEFT_OUT)}


def _check(given: ExportDatasetOperator) -> None:
    """Check the parameters as far as they are known.

    :raises ParameterError: the sentence names the parameter, its value and the remedy.
    """
    if given.format not in SUFFIXES:
        raise ParameterError(f"format={given.format!r} is not known. Use one of {', '.join(SUFFIXES)}.")
    for name in ("text_field", "image_key"):
        value = getattr(given, name)
        if is_known(value) and (not isinstance(value, str) or not value):
            raise ParameterError(f"{name}={value!r} must be a field's name.")
    if given.image_base is not None and is_known(given.image_base) and not isinstance(given.image_base, str):
        raise ParameterError(f"image_base={given.image_base!r} must be a URI or a path, or None.")
    if given.prompt is not None and (given.format != "llava" or not isinstance(given.prompt, str)):
        raise ParameterError(f"prompt={given.prompt!r} must be a string, and goes with format='llava' only.")
    _check_shards(given.shards)
    _check_destination(given)


def _check_shards(shards: Any) -> None:
    if shards is None or isinstance(shards, str) or not is_known(shards):
        return
    if not isinstance(shards, Sequence) or not all(isinstance(each, str) for each in shards):
        raise ParameterError(f"shards={shards!r} must be a list of strings, or None.")


def _check_destination(given: ExportDatasetOperator) -> None:
    from airflow_vlm_provider.shards.formats import is_shard

    destination = given.destination
    if not is_known(destination):
        return
    suffixes = SUFFIXES[given.format]
    if not isinstance(destination, str) or not destination.lower().endswith(suffixes):
        raise ParameterError(
            f"destination={destination!r} must be one file, whose name ends in {' or '.join(suffixes)} for "
            f"format={given.format!r}."
        )
    # The next export would read it. A file that is no shard may lie beside the shards.
    if is_shard(destination) and is_known(given.source):
        try:
            check_destination(given.source, destination)
        except ConfigError as error:
            raise ParameterError(str(error)) from None
