"""``airflow vlm engine``: the vLLM servers of the worker that it is run on."""

from __future__ import annotations

import json
import os
import signal
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import Any

from airflow.cli.simple_table import AirflowConsole
from airflow.utils.cli import suppress_logs_and_warning
from airflow.utils.providers_configuration_loader import providers_configuration_loaded

from airflow_vlm_provider.engines.file_locks import is_file_of
from airflow_vlm_provider.engines.vllm_folder import EngineFolder, ServerFolder
from airflow_vlm_provider.errors import ConfigError

STOP_TIMEOUT = 60.0


@suppress_logs_and_warning
@providers_configuration_loaded
def list_engines(args: Namespace) -> None:
    """Print the servers of this worker, those that run and those that failed last."""
    found = [_described(each) for each in _folder().servers()]
    shown = [each for each in found if each["phase"] != "stopped" or args.verbose]
    if args.output == "json":
        print(json.dumps(shown))
        return
    if not shown:
        print(f"No vLLM server runs here, by what {_folder().path} says.")
        return
    AirflowConsole().print_as_table([_row(each) for each in shown])
    for each in shown:
        if each["error"]:
            print(f"{each['key']}: {each['error']}")


@suppress_logs_and_warning
@providers_configuration_loaded
def stop_engine(args: Namespace) -> None:
    """Stop servers, and wait until they have ended."""
    running = [each for each in _chosen(args.key) if _described(each)["phase"] not in ("stopped", "failed")]
    busy = [each.key for each in running if _is_in_use(each)]
    if busy and not args.force:
        raise SystemExit(
            f"Tasks use {', '.join(busy)}, or DAG runs keep it for theirs. Let them end, or stop it all the same with "
            "--force: tasks that need it will have it started again."
        )
    for server in running:
        with server.gate():
            # Without --force, a task that has come meanwhile keeps it.
            server.signal_keeper(signal.SIGTERM if args.force else signal.SIGUSR1)
    deadline = time.monotonic() + STOP_TIMEOUT
    for server in running:
        while _is_kept(server):
            if time.monotonic() > deadline:
                raise SystemExit(f"{server.key} has not ended after {STOP_TIMEOUT:g} s; see {server.path}.")
            time.sleep(0.1)
        print(f"{server.key} stopped")
    if not running:
        print("There was none to stop.")


@suppress_logs_and_warning
@providers_configuration_loaded
def engine_logs(args: Namespace) -> None:
    """Print the end of what a server has printed, and go on with it if so wished."""
    (server,) = _chosen([args.key])
    lines = server.log_tail(max_bytes=4_000_000).splitlines()
    print("\n".join(lines[-args.lines :]))
    if args.follow:
        for line in _following(server):
            print(line, end="", flush=True)


def _folder() -> EngineFolder:
    from airflow_vlm_provider.operators.engines import engine_config

    try:
        return EngineFolder(engine_config().folder)
    except ConfigError as error:
        raise SystemExit(str(error)) from error


def _chosen(keys: list[str]) -> list[ServerFolder]:
    """The servers whose keys begin like these; all where none is given."""
    servers = _folder().servers()
    if not keys:
        return servers
    chosen = []
    for key in keys:
        found = [each for each in servers if each.key.startswith(key)]
        if len(found) != 1:
            known = ", ".join(each.key for each in servers) or "none"
            what = "is the beginning of several" if found else "is not known"
            raise SystemExit(f"The server {key!r} {what} here; there are: {known}.")
        chosen += found
    return chosen


def _is_in_use(server: ServerFolder) -> bool:
    with server.gate():
        return bool(server.leases() or server.pins())


def _is_kept(server: ServerFolder) -> bool:
    with server.gate():
        return server.has_keeper()


def _described(server: ServerFolder) -> dict[str, Any]:
    """A server as JSON values, without its API key."""
    spec = server.read_spec()
    with server.gate():
        kept = server.has_keeper()
        leases, pins = server.leases(), server.pins()
    state = server.read_state()
    phase = "stopped" if state is None else state.phase
    if not kept and phase != "failed":
        phase = "stopped"
    return {
        "key": server.key,
        "phase": phase,
        "since": None if state is None else state.since,
        "model": spec["model"],
        "gpus": spec["gpus"],
        "engine_args": spec["args"],
        "tasks": [{name: value for name, value in each.items() if name != "owner"} for each in leases],
        "pins": pins,
        "url": state.url if state is not None and kept else None,
        "server_pid": state.server_pid if state is not None and kept else None,
        "loads": 0 if state is None else state.loads,
        "error": state.error if state is not None and phase == "failed" else None,
        "log": str(server.log),
    }


def _row(server: Mapping[str, Any]) -> dict[str, str]:
    seconds = 0 if server["since"] is None else max(0, int(time.time() - server["since"]))
    tasks = [f"{each.get('dag_id', '?')}.{each.get('task_id', '?')}" for each in server["tasks"]]
    return {
        "key": server["key"],
        "phase": server["phase"],
        "for": f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}",
        "model": server["model"],
        "gpus": ",".join(server["gpus"]),
        "tasks": f"{len(tasks)}: {', '.join(sorted(set(tasks))[:3])}" if tasks else "0",
        "loads": str(server["loads"]),
        "log": server["log"],
    }


def _following(server: ServerFolder) -> Iterator[str]:
    """What is added to a log, until the server has no keeper any more."""
    place, kept = os.SEEK_END, True
    while kept:
        with server.log.open(errors="replace") as file:
            file.seek(0, place)
            # At a certain size it begins anew.
            while kept and is_file_of(file.fileno(), server.log):
                kept = _is_kept(server)
                while line := file.readline():
                    yield line
                time.sleep(0.5)
        place = os.SEEK_SET
