"""Run all tests: unit, integration and system tests beside each other, because the latter two wait more than they compute.

For the same reason the integration tests run in two processes, a file of theirs in one of them. All system tests share
an Airflow.

The unit tests' output is shown as it comes, that of the others when they have ended. The exit status is that of
whatever failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest"]
LAYERS = {"system": [], "integration": ["-n", "2", "--dist", "loadfile"]}


def main() -> int:
    begun = time.monotonic()
    with ExitStack() as stack:
        waiting = {}
        for layer, options in LAYERS.items():
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            command = [*PYTEST, "-p", "no:cacheprovider", *options, f"tests/{layer}"]
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            # Also when this is interrupted; on their own end, nothing happens.
            stack.callback(process.wait)
            stack.callback(process.terminate)
            waiting[layer] = (process, output)
        failed = subprocess.run([*PYTEST, "tests/unit"], cwd=ROOT, check=False).returncode
        for layer, (process, output) in reversed(waiting.items()):
            failed = process.wait() or failed
            output.seek(0)
            print(output.read())
            print(f"The {layer} tests ended after {time.monotonic() - begun:.0f} s.", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
