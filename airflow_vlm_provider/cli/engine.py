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
    number = signal.SIGTERM if args.force else signal.SIGUSR1
    # By server, the name of the keeper that was told. A task may have another one started before this process looks.
    told: dict[str, str] = {}
    left, used = running, []
    deadline = time.monotonic() + STOP_TIMEOUT
    while left:
        ways = {each.key: _ending(each, number, told) for each in left}
        for key in (key for key, way in ways.items() if way == "stopped"):
            print(f"{key} stopped")
        used += [key for key, way in ways.items() if way == "used"]
        left = [each for each in left if ways[each.key] == "waited for"]
        if time.monotonic() > deadline:
            break
        if left:
            time.sleep(0.1)
    failed = [f"{each.key} has not ended after {STOP_TIMEOUT:g} s; see {each.path}." for each in left]
    if used:
        failed.append(f"Tasks or DAG runs have come to {', '.join(used)} meanwhile, so it goes on.")
    if failed:
        raise SystemExit(" ".join(failed))
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


def _ending(server: ServerFolder, number: signal.Signals, told: dict[str, str]) -> str:
    """How far a server is that is to be stopped: ``stopped``, ``waited for``, or ``used``, which is why it goes on.

    :param number: What its keeper is told, unless it has been. At SIGUSR1, a task that has come meanwhile keeps it.
    :param told: By server, the keeper that was; one that does not run yet can't be.
    """
    with server.gate():
        state = server.read_state()
        if not server.has_keeper():
            return "stopped"
        if server.key not in told:
            if state is not None and server.signal_keeper(number):
                told[server.key] = state.keeper
            return "waited for"
        if state is not None and state.keeper != told[server.key]:
            return "stopped"
        if state is None or state.phase in ("stopping", "stopped", "failed"):
            return "waited for"
        used = number == signal.SIGUSR1 and (server.leases() or server.pins())
    return "used" if used else "waited for"


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
        try:
            file = server.log.open(errors="replace")
        except FileNotFoundError:
            # It waits for its GPU; what it prints later is new.
            place, kept = os.SEEK_SET, _is_kept(server)
            time.sleep(0.5)
            continue
        with file:
            file.seek(0, place)
            while True:
                kept = _is_kept(server)
                # At a certain size it begins anew.
                last = not (kept and is_file_of(file.fileno(), server.log))
                while line := file.readline():
                    yield line
                if last:
                    break
                time.sleep(0.5)
        place = os.SEEK_SET
