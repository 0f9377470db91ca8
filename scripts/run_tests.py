"""Run all tests: those under a real scheduler beside the others, because both wait more than they compute.

What the system tests print is shown when they have ended. The exit status is that of whatever failed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest"]


def main() -> int:
    with tempfile.TemporaryFile("w+") as output:
        command = [*PYTEST, "-p", "no:cacheprovider", "tests/system"]
        system = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            others = subprocess.run([*PYTEST, "tests/integration", "tests/unit"], cwd=ROOT, check=False)
            status = system.wait()
        finally:
            # Also when this is interrupted; on its own end, nothing happens.
            system.terminate()
            system.wait()
        output.seek(0)
        print(output.read(), flush=True)
    return others.returncode or status


if __name__ == "__main__":
    sys.exit(main())
