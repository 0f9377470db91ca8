"""``airflow vlm recipe check``, called as Airflow's parser calls it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from airflow.cli.cli_parser import get_parser

SECRET = "sk-not-to-be-seen-41d8"
CONTENT: dict[str, Any] = {
    "dataset_path": "in/part.jsonl",
    "export_path": "out/part.jsonl",
    "np": 4,
    "image_special_token": "<img>",
    "process": [
        {"image_tagging_vlm_mapper": {"system_prompt": "x" * 500, "batch_size": 3}},
        {"image_captioning_mapper": {"caption_num": 3, "hf_img2seq": "some/model"}},
    ],
}


@pytest.fixture
def check(tmp_path):
    def check(content: dict[str, Any], *options: str) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        args = get_parser().parse_args(["vlm", "recipe", "check", str(path), *options])
        args.func(args)

    return check


def test_what_would_run_is_said_for_people(check, tmp_path, capsys):
    check(CONTENT)
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0] == f"{tmp_path}/recipe.yaml: 2 operators"
    order = [line.partition(":")[0] for line in lines if line.startswith("process[")]
    assert order == ["process[0].image_tagging_vlm_mapper", "process[1].image_captioning_mapper"]
    for words in (
        f"  source       {tmp_path}/in/part.jsonl",
        f"  destination  {tmp_path}/out/part",
        "ImageTaggingVLMOperator, task image_tagging",
        f'  destination = "{tmp_path}/out/part/_steps/image_tagging"',
        f'  source = "{tmp_path}/out/part/_steps/image_tagging/"',
        f'  media_roots = ["{tmp_path}/in/"]',
        "    caption_num = 3",
        '    keep_candidate_mode = "random_any"',
        '    hf_img2seq = "some/model"',
        '    image_special_token = "<img>"',
        "  np: how work is spread is Airflow's part",
        "  process[0].image_tagging_vlm_mapper.batch_size: what a task may use",
    ):
        assert any(line.startswith(words) or words in line for line in lines), words
    assert "x" * 101 not in said
    check(CONTENT, "--verbose")
    assert "x" * 500 in capsys.readouterr().out


def test_what_would_run_is_said_for_machines(check, tmp_path, capsys):
    check(CONTENT, "--output", "json")
    found = json.loads(capsys.readouterr().out)
    assert (found["source"], found["destination"]) == (f"{tmp_path}/in/part.jsonl", f"{tmp_path}/out/part")
    tag, caption = found["steps"]
    assert (tag["operator"], tag["task"], tag["output"]) == (
        "ImageTaggingVLMOperator",
        "image_tagging",
        "full",
    )
    assert tag["parameters"]["system_prompt"] == "x" * 500
    assert caption["parameters"]["caption_num"] == 3
    assert caption["parameters"]["keep_original_sample"] is True
    assert (caption["source"], caption["destination"]) == (f"{tag['destination']}/", found["destination"])
    assert {each["place"] for each in found["ignored"]} == {
        "np",
        "export_path",
        "process[0].image_tagging_vlm_mapper.batch_size",
    }


def test_places_that_are_left_to_the_dag_are_said_to_be(check, capsys):
    check({"process": ["image_tagging_vlm_mapper", "image_tagging_vlm_mapper"]})
    said = capsys.readouterr().out
    assert said.count("(to be given to recipe_task_group())") == 2
    assert "{{" not in said
    check({"process": ["image_tagging_vlm_mapper"], "export_path": "s3://b/out"}, "-o", "json")
    found = json.loads(capsys.readouterr().out)
    assert (found["source"], found["steps"][0]["source"]) == (None, None)
    assert found["steps"][0]["destination"] == "s3://b/out"


WRONG: dict[str, Any] = {
    "nq": 3,
    "process": [
        {"image_tagging_vlm_mapper": {"try_num": 0}},
        {"image_captioning_from_gpt4v_mapper": {"api_key": SECRET}},
        "image_blur_mapper",
    ],
}


def test_all_that_is_wrong_ends_in_an_error(check, capsys):
    with pytest.raises(SystemExit) as caught:
        check(WRONG)
    # Python prints such a message and exits with 1.
    said = str(caught.value.code)
    for words in (
        "- nq: ",
        "- process[0].image_tagging_vlm_mapper: try_num is 0",
        "- process[1].image_captioning_from_gpt4v_mapper.api_key: it belongs in the Airflow connection",
        "- process[2].image_blur_mapper: this operator is not supported",
    ):
        assert words in said, words
    assert SECRET not in said
    assert capsys.readouterr().out == ""


def test_all_that_is_wrong_is_said_for_machines_too(check, capsys):
    with pytest.raises(SystemExit) as caught:
        check(WRONG, "-o", "json")
    assert caught.value.code == 1
    said = capsys.readouterr().out
    assert SECRET not in said
    assert [each["place"] for each in json.loads(said)["errors"]] == [
        "nq",
        "process[1].image_captioning_from_gpt4v_mapper.api_key",
        "process[2].image_blur_mapper",
        "process",
        "process[0].image_tagging_vlm_mapper",
    ]


def test_a_file_that_is_not_there(tmp_path, capsys):
    args = get_parser().parse_args(["vlm", "recipe", "check", str(tmp_path / "no.yaml"), "-o", "json"])
    with pytest.raises(SystemExit):
        args.func(args)
    (error,) = json.loads(capsys.readouterr().out)["errors"]
    assert error["place"] == ""
    assert "No such file" in error["message"]
