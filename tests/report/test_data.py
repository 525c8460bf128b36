"""The images of the data section."""

import json

import pytest

from graft.report.data import SAMPLES
from graft.report.gather import gather

from .made import make, plan_in
from .made_images import drawing, run_in


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("data"), until="shard-sft")


def test_images_are_counted_by_stage_and_by_what_became_of_them(plan):
    images = next(t for t in gather(plan).data if t.title == "Images")
    assert images.rows == (
        ("augment", "listed", "30"), ("augment", "kept", "27"), ("augment", "rejected: corrupt", "2"), ("augment", "rejected: duplicate", "1"),
        ("prepare", "kept, different ones", "22"), ("prepare", "changed: RGBA image to RGB", "2"), ("prepare", "rows rejected: corrupt", "2"),
        ("prepare", "rows rejected: not found", "1"), ("questions", "kept, different ones", "30"), ("questions", "look, changed: image turned upright", "3"),
        ("shard-sft", "shown in train", "1,020"), ("shard-sft", "shown in validation", "12"),
    )  # fmt: skip


def test_samples_are_of_each_source_in_turn_and_no_image_twice(plan):
    samples = gather(plan).samples
    assert [s.source for s in samples] == ["augmented rows", "drawn", "augmented rows", "augmented rows", "drawn"] + ["augmented rows"] * 7
    assert len({s.picture.data for s in samples}) == SAMPLES and all(s.picture.data for s in samples)
    assert (samples[1].question, samples[1].answer) == ("<200>?", drawing(200)[1]["colour"]) and json.loads(samples[0].answer) == drawing(100)[1]


def test_a_source_that_cannot_be_read_has_no_samples(tmp_path):
    plan = run_in(tmp_path, until="prepare")
    file = plan.resolve("prepare").directory / "corpora" / "drawn" / "00000.parquet"
    file.write_bytes(b"x" * file.stat().st_size)
    samples = gather(plan).samples
    assert len(samples) == SAMPLES and {s.source for s in samples} == {"augmented rows"}


def test_a_run_without_images_has_none(tmp_path):
    report = gather(make(plan_in(tmp_path), "shard-sft"))
    assert report.samples == () and "Images" not in {t.title for t in report.data}
