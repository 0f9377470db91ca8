"""``airflow vlm ledger``: what the ledger says, and clearing it of what nothing needs."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from airflow.cli.simple_table import AirflowConsole
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException
from airflow.utils.cli import suppress_logs_and_warning
from airflow.utils.providers_configuration_loader import providers_configuration_loaded

from airflow_vlm_provider.cli import report
from airflow_vlm_provider.errors import ConfigError, VLMError

if TYPE_CHECKING:
    from airflow_vlm_provider.shards.stores import Store

DEFAULT_AWS_CONN_ID = "aws_default"
# Of a shard's dead letters, for people: the file has them all.
LETTERS = 5


@suppress_logs_and_warning
@providers_configuration_loaded
def show(args: Namespace) -> None:
    """Print what became of a shard, or of all shards of a destination."""
    from airflow_vlm_provider.ledger.history import histories, overview

    with _told():
        store, shard = find_ledger(args.uri, _opener(args))
        if shard is None:
            found = report.Overview(store.uri, overview(store))
            if args.output == "json":
                print(json.dumps(found.to_json()))
                return
            rows, problems = found.table()
            AirflowConsole().print_as_plain_table(rows)
            for problem in problems:
                print(problem)
            return
        steps = histories(store, shard, letters=LETTERS)
        if args.output == "json":
            print(json.dumps(report.shard_json(store.uri, shard, steps)))
            return
        for line in report.shard_lines(store.uri, shard, steps, verbose=args.verbose):
            print(line)


@suppress_logs_and_warning
@providers_configuration_loaded
def prune(args: Namespace) -> None:
    """Remove journal segments that no manifest refers to, and plans, that are old."""
    from airflow_vlm_provider.ledger.prune import prune as prune_ledger

    with _told():
        if not args.older_than >= 1:
            raise ConfigError(
                f"--older-than {args.older_than:g} is too short: what a running task was answered is not referred to "
                "before its commit. Give at least 1 day, and more than your longest task with all its retries."
            )
        store = _opener(args)(args.destination)
        if not has_ledger(store):
            raise ConfigError(_no_ledger(store.uri))
        pruned = prune_ledger(store, older_than_days=args.older_than, dry_run=args.dry_run)
        if args.output == "json":
            print(json.dumps(report.pruned_json(store.uri, pruned, dry_run=args.dry_run)))
        else:
            for line in report.pruned_lines(store.uri, pruned, dry_run=args.dry_run, verbose=args.verbose):
                print(line)
    if pruned.kept:
        raise SystemExit(f"{len(pruned.kept)} shards were left as they are: their manifests can't be read.")


def find_ledger(uri: str, open_store: Callable[[str], Store]) -> tuple[Store, str | None]:
    """Find the destination that a URI names, or that the shard lies in that it names.

    :return: The destination, and the shard's name or None.
    :raises ConfigError: there is no ledger.
    """
    from airflow_vlm_provider.ledger.tree import walk

    root = open_store(uri)
    if has_ledger(root):
        return root, None
    scheme, separator, path = root.uri.rstrip("/").partition("://")
    folders = path.split("/")
    # The bucket, or what precedes the first slash of a path, is no part of a name.
    for depth in range(len(folders) - 1, 0, -1):
        store = open_store(f"{scheme}{separator}{'/'.join(folders[:depth])}/")
        shard = "/".join(folders[depth:])
        if any(True for _ in walk(store, shard)):
            return store, shard
    raise ConfigError(_no_ledger(root.uri))


def has_ledger(store: Store) -> bool:
    """Whether a place is a destination: anything was ever committed, answered or planned there."""
    from airflow_vlm_provider.ledger.plans import PLANS_FOLDER
    from airflow_vlm_provider.ledger.tree import LEDGER_FOLDER

    return any(True for folder in (LEDGER_FOLDER, PLANS_FOLDER) for _ in store.list(folder))


def _no_ledger(uri: str) -> str:
    return (
        f"There is no ledger at {uri}, nor one that knows a shard of that name. Give an operator's destination, or the "
        "URI of a shard in it."
    )


def _opener(args: Namespace) -> Callable[[str], Store]:
    """Open stores by the connections that the arguments name.

    :raises ConfigError: a connection was named that does not exist.
    """
    from airflow_vlm_provider.operators.storage import Storage

    # As Airflow's own commands do that look up connections: this is no task, and may read the metadata database.
    os.environ["_AIRFLOW_PROCESS_CONTEXT"] = "server"
    for conn_id in (args.aws_conn_id, args.storage_conn_id):
        if conn_id:
            try:
                BaseHook.get_connection(conn_id)
            except AirflowNotFoundException as error:
                raise ConfigError(f"{error}. Create the connection, or name another one.") from error
    aws_conn_id = DEFAULT_AWS_CONN_ID if args.aws_conn_id is None else args.aws_conn_id or None
    storage = Storage(aws_conn_id=aws_conn_id, storage_conn_id=args.storage_conn_id)
    return storage.open_store


@contextmanager
def _told() -> Iterator[None]:
    """End the command with a sentence instead of a traceback."""
    try:
        yield
    except (VLMError, OSError) as error:
        raise SystemExit(str(error)) from error
