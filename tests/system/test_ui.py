"""A finished run is cleared by hand, in Airflow's UI in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, expect

from tests.support.browser import start_browser

pytestmark = pytest.mark.system

expect.set_options(timeout=60_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with start_browser() as started:
        yield started


def test_clearing_a_finished_run_in_the_ui_asks_nothing(deployment, browser, tmp_path):
    prefix = "cleared-by-hand/"
    deployment.dataset("users", prefix, shards=2, rows=10, seed=8)
    run_id = deployment.run("one_task", prefix)
    asked = deployment.asked()
    written = deployment.written("users", f"out/{prefix}")

    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto(f"{deployment.airflow.url}/dags/one_task/runs/{quote(run_id)}")
    page.get_by_role("button", name=re.compile("to clear$")).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text(f"Clear Dag Run: {run_id}")
    expect(dialog).to_contain_text("Affected Tasks: 1")
    dialog.get_by_role("button", name="Confirm").click()
    expect(dialog).to_have_count(0)

    # The page follows the run by itself.
    task = page.get_by_role("row").filter(has_text="ImageTaggingVLMOperator")
    expect(task.get_by_role("cell", name="2", exact=True)).to_be_visible(timeout=180_000)
    expect(task.get_by_role("cell", name="Success")).to_be_visible(timeout=180_000)
    deployment.wait_for_success("one_task", run_id)
    page.screenshot(path=tmp_path / "cleared.png")
    page.close()

    assert deployment.asked() == asked
    assert deployment.written("users", f"out/{prefix}") == written
    result = deployment.airflow.xcom("one_task", run_id, "tag")
    assert (result["rows_in"], result["cached"], result["requests"]) == (20, 20, 0)
    assert result["shards_unchanged"] == 2
