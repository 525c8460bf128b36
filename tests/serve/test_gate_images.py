"""Injected skew of an adapter over a base that sees: other pixels, other images, a tower that is not as in training; each is refused by what it is."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from graft.core.store import IMAGE, AdapterStore
from graft.model.chat import image_parts, load_tokenizer
from graft.model.images import CONFIG, ImageProcessor
from graft.serve.api import build
from graft.serve.gate import Refused, examined
from graft.serve.runner import Runner
from graft.serve.spec import ServeSpec

from ..train.small_vision import as_trained, vision_plan

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return vision_plan(tmp_path_factory.mktemp("seen"))


@pytest.fixture(scope="module")
def trained(plan, tmp_path_factory):
    return as_trained(plan, tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture(scope="module")
def spec(plan, trained, tmp_path_factory):
    store = AdapterStore(tmp_path_factory.mktemp("store"))
    store.add("seen", trained, {})
    base, pixels = str(plan.beside("base")), plan.recipe.shard.image_pixels
    return ServeSpec(base, None, "fp32", plan.base_identity(), str(trained), str(store.root), ("seen",), max_batch=2, image_pixels=pixels)


@pytest.fixture(scope="module")
def server(spec):
    with TestClient(build(Runner(spec)), base_url="http://localhost") as client:
        while client.get("/ready").json()["status"] == "loading":
            time.sleep(0.02)
        yield client


def edited(folder, name, change):
    found = json.loads((folder / name).read_text())
    change(found)
    (folder / name).write_text(json.dumps(found))


def in_parity(change):
    return lambda folder: edited(folder, "parity.json", change)


def of_images(parity):
    return [c for c in parity["canaries"] if "images" in c]


def images_of(folder):
    return [f for f in folder.iterdir() if IMAGE.fullmatch(f.name)]


def without(part):
    """As if what is adapted of the layers whose names hold this were never applied."""

    def spoil(folder):
        tensors = {k: torch.zeros_like(v) if part in k and "lora_B" in k else v for k, v in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def swapped(parity):
    """Two canaries have the same grid: each shows the other's image."""
    some = of_images(parity)
    one, other = next((a, b) for a in some for b in some if a["images"] != b["images"] and a["images"][0]["grid"] == b["images"][0]["grid"])
    one["images"], other["images"] = other["images"], one["images"]


SKEWS = {
    "the tower is not applied": (without(".visual."), r"canary tokens of images by .* in training .* so it is not applied as it was trained"),
    "the language part is not applied": (without(".language_model."), "canary tokens of .* not applied"),
    "nothing is applied": (without(""), "as if it were not applied"),
    "other images": (in_parity(swapped), r"canary tokens of images by .* in training"),
    "no image": (lambda f: [i.unlink() for i in images_of(f)], r"lacks the image [0-9a-f]{64}\.png of its canaries"),
    "an image outside": (in_parity(lambda p: of_images(p)[0]["images"][0].update(file="../../x.png")), r"lacks the image \.\./\.\./x\.png"),
    "another grid": (
        in_parity(lambda p: of_images(p)[0]["images"][0].update(grid=[1, 2, 2])),
        r"was trained on [0-9a-f]{64}\.png as \[1, 2, 2\] patches, here it becomes \[1, 8, 8\]",
    ),
    "other sizes": (
        lambda f: edited(f, "probes.json", lambda p: image_parts(p[0]["messages"])[0].update(width=40)),
        "its conversation 0 renders to other tokens here",
    ),
    "fewer pixels in training": (
        in_parity(lambda p: p["image_processor"].update(most_pixels=50_000)),
        "became patches otherwise: most_pixels was 50000 and is 1003520 here",
    ),
    "another configuration beside it": (
        lambda f: edited(f, CONFIG, lambda c: c.update(image_mean=[0.5, 0.5, 0.5])),
        r"was trained with another preprocessor_config\.json than the one it comes with: image_mean was \[0\.48.*\] and is \[0\.5, 0\.5, 0\.5\]",
    ),
    "no configuration": (lambda f: (f / CONFIG).unlink(), r"comes with no preprocessor_config\.json"),
    "no settings": (in_parity(lambda p: p.pop("image_processor")), "nothing says how training saw them"),
    "canaries of text alone": (
        in_parity(lambda p: p.update(canaries=[c for c in p["canaries"] if "images" not in c])),
        "was trained on images and has no canaries with any",
    ),
    "another base": (in_parity(lambda p: p.update(base="hub:other/base@1")), "was trained on the base hub:other/base@1"),
}


@pytest.mark.parametrize("skew", SKEWS)
def test_skew_is_refused_by_what_it_is(server, spec, trained, tmp_path, skew):
    spoil, line = SKEWS[skew]
    shutil.copytree(trained, tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    refused(server, AdapterStore(spec.store).add("skew-" + skew.replace(" ", "-"), tmp_path / "adapter", {}), line)


def refused(server, version, line):
    reply = server.post("/v1/chat/completions", json={"model": version.id, "messages": [{"role": "user", "content": "What?"}], "max_tokens": 2})
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "adapter_refused"), reply.text
    assert re.search(line, reply.json()["error"]["message"]), reply.json()["error"]["message"]


@pytest.mark.parametrize(("how", "line"), [("altered", "was altered: its SHA-256 is not that of"), ("lost", "is missing")])
def test_an_image_that_is_not_as_published_is_named(server, spec, trained, tmp_path, how, line):
    shutil.copytree(trained, tmp_path / "adapter")
    edited(tmp_path / "adapter", "adapter_config.json", lambda c: c.update(made=how))  # a version of its own
    version = AdapterStore(spec.store).add(how, tmp_path / "adapter", {})
    image = images_of(version.folder)[0]
    data = image.read_bytes()
    image.unlink()
    if how == "altered":
        image.write_bytes(data[:-1] + b"\0")
    refused(server, version, f"{image.name} {line}")


def test_what_is_as_in_training_answers(server):
    card = server.get("/v1/models/seen").json()
    assert card["verified"] and card["gate"]["difference_nats"] < 1e-4 < 0.1 < card["gate"]["effect_nats"]
    ask = {"messages": [{"role": "user", "content": "What is drawn?"}], "max_tokens": 8, "temperature": 0}
    seen, base = (server.post("/v1/chat/completions", json=ask | {"model": m}).json()["choices"][0]["message"]["content"] for m in ("seen", "base"))
    assert seen != base


def test_other_pixels_on_the_server_are_refused(spec, plan, trained, tmp_path):
    store, tokenizer = AdapterStore(spec.store), load_tokenizer(str(trained))
    shutil.copy(plan.beside("base") / CONFIG, tmp_path)
    edited(tmp_path, CONFIG, lambda c: c.update(merge_size=1, image_std=[1, 1, 1]))
    for processor, line in (
        (ImageProcessor(spec.base, None, 50_000), r"became patches otherwise: most_pixels was 1003520 and is 50000 here \(.*shard\.image_pixels\)"),
        (ImageProcessor(str(tmp_path), None, spec.image_pixels), r"merge_size was 2 and is 1 here \(the base's preprocessor_config\.json"),
        (None, "was trained on images, and this server shows its model none"),
    ):
        with pytest.raises(Refused, match=f"seen@[0-9a-f]{{12}} .*{line}"):
            examined(store, "seen", spec, tokenizer, processor)
