"""What a newcomer runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.system


def test_the_demo_tags_its_pictures_with_the_bundled_model():
    done = subprocess.run(
        [sys.executable, "demo/run.py"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    right, of = map(int, re.search(r"(\d+) of (\d+) pictures have exactly the tags", done.stdout).groups())
    assert of == 72
    assert right >= 0.95 * of
    assert re.search(r"rows_in +72\n", done.stdout)
    assert re.search(r"failed +0\n", done.stdout)
    assert len(list((REPOSITORY / ".demo" / "output" / "_vlm").rglob("manifest.json"))) == 6
