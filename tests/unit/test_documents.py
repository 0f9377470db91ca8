"""What documents say of the code and the tests is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = sorted([*REPOSITORY.glob("docs/*.md"), REPOSITORY / "README.md"])
# A row of a table that names tests, and in its last column the file that they are in.
NAMED = re.compile(r"^\|.*\| `(tests/[\w/]+\.py)` \|$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_are_named_are_where_they_are_said_to_be(document):
    missing = []
    for row in NAMED.finditer(document.read_text()):
        path = REPOSITORY / row[1]
        source = path.read_text() if path.is_file() else ""
        names = re.findall(r"`(test_\w+)`", row[0])
        missing += [(name, row[1]) for name in names if f"def {name}(" not in source]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    missing = [link for link in LINK.findall(document.read_text()) if not (document.parent / link).exists()]
    assert missing == []


def test_there_are_tests_that_are_named():
    assert sum(len(NAMED.findall(document.read_text())) for document in DOCUMENTS) > 80
