from __future__ import annotations

import jinja2
import pytest
from jinja2.nativetypes import NativeEnvironment

from airflow_vlm_provider.operators.destination import check_destination
from airflow_vlm_provider.operators.parameters import is_known
from airflow_vlm_provider.recipes.chain import chain
from airflow_vlm_provider.recipes.recipe import RecipeStep
from airflow_vlm_provider.shards.stores import is_hidden

STEPS = [
    RecipeStep(0, "image_tagging_vlm_mapper", "image_tagging", {}),
    RecipeStep(1, "image_captioning_mapper", "image_captioning", {}),
    RecipeStep(2, "image_captioning_mapper", "image_captioning_2", {}),
]


def test_each_step_reads_what_the_one_before_it_wrote():
    one, two, three = (
        dict(parameters) for _, parameters in chain(STEPS, source="s3://b/in", destination="s3://b/out/")
    )
    assert one == {
        "source": "s3://b/in",
        "destination": "s3://b/out/_steps/image_tagging",
        "media_roots": None,
        "reuse_from": ["s3://b/out/"],
        "output": "full",
    }
    assert two == {
        "source": "s3://b/out/_steps/image_tagging/",
        "destination": "s3://b/out/_steps/image_captioning",
        "media_roots": ["s3://b/in"],
        "reuse_from": ["s3://b/out/"],
        "output": "full",
    }
    assert three == {
        "source": "s3://b/out/_steps/image_captioning/",
        "destination": "s3://b/out/",
        "media_roots": ["s3://b/in"],
        "reuse_from": ["s3://b/out/_steps/image_captioning_2"],
        "output": None,
    }


def test_no_steps_destination_is_in_its_source_and_results_alone_are_data():
    for _, parameters in chain(STEPS, source="/data/in", destination="/data/out"):
        check_destination(parameters["source"], parameters["destination"])
        below = parameters["destination"].removeprefix("/data/out").strip("/")
        assert is_hidden(below) == bool(below)


def test_a_single_step_writes_to_the_destination():
    ((step, parameters),) = chain(STEPS[:1], source="/in", destination="/out", output="sidecar")
    assert step == STEPS[0]
    assert (parameters["source"], parameters["destination"]) == ("/in", "/out")
    assert (parameters["media_roots"], parameters["output"]) == (None, "sidecar")


def test_only_the_last_step_may_write_beside_its_shards():
    chained = chain(STEPS, source="/in", destination="/out", output="sidecar")
    assert [parameters["output"] for _, parameters in chained] == ["full", "full", "sidecar"]


@pytest.mark.parametrize(
    ("source", "root"),
    [
        ("/data/in", "/data/in"),
        ("/data/in/part.jsonl", "/data/in/"),
        ("s3://b/in/part.tar.gz", "s3://b/in/"),
        ("/data/in.parquet/", "/data/in.parquet/"),
        ("{{ params.source }}", "{{ params.source }}"),
        ("{{ params.folder }}/part.jsonl", "{{ params.folder }}/"),
        ("{{ params.folder }}/{{ ds }}.jsonl", "{{ params.folder }}/{{ ds }}.jsonl"),
    ],
)
def test_media_stay_where_the_first_shards_are(source, root):
    _, two, three = (parameters for _, parameters in chain(STEPS, source=source, destination="/out"))
    assert two["media_roots"] == three["media_roots"] == [root]


def test_media_roots_that_are_given_are_every_steps():
    chained = chain(STEPS, source="/in", destination="/out", media_roots=("/pictures",))
    assert [parameters["media_roots"] for _, parameters in chained] == [["/pictures"]] * 3


def test_answers_of_another_chain_count_wherever_its_step_stood():
    one, _, three = (
        parameters
        for _, parameters in chain(STEPS, source="/in", destination="/out/b", reuse_from=["/out/a"])
    )
    assert one["reuse_from"] == ["/out/b", "/out/a", "/out/a/_steps/image_tagging"]
    assert three["reuse_from"] == [
        "/out/b/_steps/image_captioning_2",
        "/out/a",
        "/out/a/_steps/image_captioning_2",
    ]


@pytest.mark.parametrize("place", ["s3://b/out", "s3://b/out/"])
def test_what_a_template_becomes_may_end_with_a_slash(place):
    one, two, _ = (
        parameters for _, parameters in chain(STEPS, source="/in", destination="{{ place_of_the_run }}")
    )
    render = jinja2.Environment().from_string
    assert render(one["destination"]).render(place_of_the_run=place) == "s3://b/out/_steps/image_tagging"
    assert render(two["source"]).render(place_of_the_run=place) == "s3://b/out/_steps/image_tagging/"
    for native in (one["destination"], two["source"]):
        rendered = NativeEnvironment().from_string(native).render(place_of_the_run=place)
        assert rendered.rstrip("/") == "s3://b/out/_steps/image_tagging"
    assert not is_known(one["destination"])
