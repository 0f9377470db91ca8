"""The connection in Airflow's real UI, REST API and logs: the form is ours, and no secret comes out of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Error, Locator, Page, Response, expect

from airflow_vlm_provider.get_provider_info import get_provider_info
from airflow_vlm_provider.hooks.settings import VLMSettings, parse_settings
from demo.airflow_instance import AirflowInstance, start_airflow
from tests.support.browser import start_browser
from tests.support.stub_endpoint import start_stub

pytestmark = pytest.mark.integration

expect.set_options(timeout=30_000)

KEY = "sk-in-the-password-91c7"
HEADERS = {
    "Authorization": "Bearer sk-in-authorization-27d0",
    "x-api-key": "sk-in-x-api-key-5b38",
    # Names by which Airflow itself does not know a secret.
    "X-Gateway": "sk-in-x-gateway-e4a6",
    "Cookie": "session=sk-in-cookie-08f2",
}
SECRETS = [KEY, *(value.split("sk-")[1] for value in HEADERS.values())]

DAG = """
import hashlib

from airflow.sdk import dag, task


@dag(schedule=None)
def talkative():
    @task
    def through_the_hook(**context):
        from airflow_vlm_provider.hooks.vlm import VLMHook

        hook = VLMHook("secretive")
        client = hook.get_conn()
        print("connection", connection := hook.get_connection("secretive"), connection.extra)
        print("extra", connection.extra_dejson)
        print("hook", hook, vars(hook))
        print("settings", hook.settings)
        print("client", client.api_key, client.default_headers)
        found = [client.api_key, *(client.default_headers[name] for name in context["params"]["headers"])]
        assert [hashlib.sha256(each.encode()).hexdigest() for each in found] == context["params"]["digests"]

    @task
    def past_the_hook():
        from airflow.sdk import BaseHook

        connection = BaseHook.get_connection("secretive")
        print("connection", connection, connection.password, connection.extra)

    @task(retries=0)
    def failing():
        from airflow_vlm_provider.hooks.vlm import VLMHook

        client = VLMHook("secretive").get_conn()
        raise RuntimeError(f"failed with {client.api_key} and {client.default_headers}")

    through_the_hook()
    past_the_hook()
    failing()


talkative()
"""


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AirflowInstance]:
    home = tmp_path_factory.mktemp("airflow")
    dags = home / "dags"
    dags.mkdir()
    (dags / "talkative.py").write_text(DAG)
    with start_airflow(home, dags_folder=dags) as instance:
        yield instance


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with start_browser() as started:
        yield started


@pytest.fixture
def page(browser: Browser, airflow: AirflowInstance) -> Iterator[Page]:
    opened = browser.new_page(viewport={"width": 1100, "height": 1700})
    opened.goto(f"{airflow.url}/connections")
    yield opened
    opened.close()


@pytest.fixture
def secretive(airflow: AirflowInstance) -> Iterator[str]:
    """A connection with a secret in each place that one can sit in."""
    airflow.api(
        "POST",
        "connections",
        {
            "connection_id": "secretive",
            "conn_type": "vlm",
            "host": "http://127.0.0.1:9/v1",
            "password": KEY,
            "extra": json.dumps({"model": "m", "tokens_per_minute": 60000, "headers": HEADERS}),
        },
    )
    yield "secretive"
    airflow.api("DELETE", "connections/secretive")


def conn_fields() -> dict[str, dict[str, Any]]:
    (connection_type,) = get_provider_info()["connection-types"]
    return connection_type["conn-fields"]


def new_connection(page: Page, connection_id: str) -> Locator:
    """Open the form for a new connection of our type, with its extra fields."""
    page.get_by_role("button", name="Add Connection").click()
    form = page.get_by_role("dialog")
    form.get_by_label("Connection ID").fill(connection_id)
    form.get_by_role("combobox").fill("vlm")
    page.get_by_role("option", name="Vision-language model").click()
    return form


def open_section(form: Locator, name: str) -> None:
    form.get_by_role("button", name=name, exact=True).click()


def replace_json(page: Page, form: Locator, label: str, value: dict[str, str]) -> None:
    """Type into the code editor that the form shows for a JSON field."""
    editor = form.get_by_role("group").filter(has_text=label).locator(".monaco-editor")
    editor.click()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.insert_text(json.dumps(value))
    # The editor has closed brackets and quotes by itself.
    page.keyboard.press("ControlOrMeta+Shift+End")
    page.keyboard.press("Delete")


def assert_no_secret(text: str, where: str) -> None:
    assert [secret for secret in SECRETS if secret in text] == [], f"in clear in {where}"


def test_the_form_shows_our_fields(page, tmp_path):
    form = new_connection(page, "vlm_default")

    for label in ("Host or base URL", "API key", "Port", "Scheme"):
        expect(form.get_by_text(label, exact=True)).to_be_visible()
    expect(form.get_by_label("API key")).to_have_attribute("type", "password")
    expect(form.get_by_text("Login", exact=True)).to_have_count(0)

    open_section(form, "Extra Fields")
    for field in conn_fields().values():
        expect(form.get_by_text(field["label"], exact=True)).to_be_visible()
        expect(form.get_by_text(field["description"], exact=True)).to_be_visible()
    expect(form.get_by_text("openai", exact=True)).to_be_visible()
    page.screenshot(path=tmp_path / "connection-form.png")


def test_the_hook_reads_what_was_typed_into_the_form(page, airflow):
    form = new_connection(page, "typed")
    form.get_by_label("Host or base URL").fill("gpu-1")
    form.get_by_label("Port").fill("8000")
    form.get_by_label("Scheme").fill("http")
    form.get_by_label("API key").fill(KEY)
    open_section(form, "Extra Fields")
    form.locator("[name=element_model]").fill("org/model")
    for name, value in {
        "max_concurrency": "16",
        "tokens_per_minute": "60000",
        "timeout": "2.5",
        "prompt_price_per_million": "0.15",
        "completion_price_per_million": "0.6",
    }.items():
        form.locator(f"[name=element_{name}]").fill(value)
    replace_json(page, form, "Headers", {"X-Gateway": HEADERS["X-Gateway"]})
    form.get_by_role("button", name="Save").click()
    expect(form).to_have_count(0)

    stored = airflow.api("GET", "connections/typed")

    settings, headers = parse_settings(
        "typed", **{name: stored[name] for name in ("host", "port", "schema", "extra")}
    )
    assert settings == VLMSettings(
        conn_id="typed",
        engine="openai",
        model="org/model",
        base_url="http://gpu-1:8000/v1",
        max_concurrency=16,
        tokens_per_minute=60000.0,
        timeout=2.5,
        prices=(0.15, 0.6),
    )
    assert headers == {"X-Gateway": "***"}
    assert stored["password"] == "***"


def test_the_rest_api_masks_every_secret(airflow, secretive):
    one = airflow.api("GET", f"connections/{secretive}")
    everything = airflow.api("GET", "connections")

    assert one["password"] == "***"
    extra = json.loads(one["extra"])
    assert extra["headers"] == dict.fromkeys(HEADERS, "***")
    assert extra["tokens_per_minute"] == 60000, "not a secret, though its name holds the word token"
    assert_no_secret(json.dumps([one, everything]), "the REST API")


def test_the_edit_form_masks_every_secret_and_keeps_it_on_saving(page, airflow, secretive):
    seen: list[Response] = []
    page.on("response", lambda response: seen.append(response))
    page.reload()
    page.get_by_role("row", name=secretive).get_by_role("button", name="Edit Connection").click()
    form = page.get_by_role("dialog")
    expect(form.get_by_label("API key")).to_have_value("***")
    form.get_by_label("Description").fill("edited")
    open_section(form, "Extra Fields")
    expect(form.get_by_role("group").filter(has_text="Headers").locator(".monaco-editor")).to_contain_text(
        "***"
    )
    assert_no_secret(page.content(), "the form")
    form.get_by_role("button", name="Save").click()
    expect(form).to_have_count(0)
    page.wait_for_load_state("networkidle")

    bodies = []
    for response in seen:
        with contextlib.suppress(Error):  # a redirect has no body
            bodies.append(response.text())
    assert any(secretive in body for body in bodies), "the test would prove nothing"
    assert_no_secret("".join(bodies), "what the browser received")

    assert airflow.api("GET", f"connections/{secretive}")["description"] == "edited"
    (stored,) = json.loads(airflow.cli("connections", "get", secretive, "--output", "json"))
    assert stored["password"] == KEY, "saving has put something else in its place"
    assert stored["extra_dejson"]["headers"] == HEADERS


def test_no_log_shows_a_secret(airflow, secretive):
    conf = {
        "headers": list(HEADERS),
        "digests": [hashlib.sha256(each.encode()).hexdigest() for each in (KEY, *HEADERS.values())],
    }
    run_id = airflow.trigger_dag("talkative", conf)
    airflow.wait_for_run("talkative", run_id)

    states = {each["task_id"]: each["state"] for each in airflow.task_instances("talkative", run_id)}
    assert states == {"through_the_hook": "success", "past_the_hook": "success", "failing": "failed"}
    for task_id in states:
        log = airflow.task_log("talkative", run_id, task_id)
        assert "***" in log
        assert_no_secret(log, f"the log of {task_id}")
    # Not so the scheduler's output: under LocalExecutor, Airflow repeats there what tasks print, and masks
    # nothing in it, not even passwords.
    paths = list(airflow.log_dir.rglob("*.log"))
    assert len(paths) > len(states)
    for path in paths:
        assert_no_secret(path.read_text(errors="replace"), str(path))
    assert_no_secret(json.dumps(airflow.api("GET", "eventLogs", params={"limit": 100})), "the audit log")


def test_the_test_button_answers_in_our_words(airflow):
    with start_stub(api_key=KEY, models=["served"]) as stub:
        answers = [
            airflow.api(
                "POST",
                "connections/test",
                {
                    "connection_id": "tried",
                    "conn_type": "vlm",
                    "host": stub.base_url,
                    "password": key,
                    "extra": json.dumps({"model": "served"}),
                },
            )
            for key in (KEY, "sk-wrong-key-0002")
        ]

    assert [answer["status"] for answer in answers] == [True, False]
    assert "serves 'served'" in answers[0]["message"]
    assert "refuses the API key (HTTP 401)" in answers[1]["message"]
    assert "sk-wrong-key-0002" not in answers[1]["message"]
