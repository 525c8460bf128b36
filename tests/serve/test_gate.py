"""Injected skew: whatever is not as it was in training is refused, by what it is; and an override is explicit and shows."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.testclient import TestClient

from graft.core.artifact import digest_of
from graft.core.store import AdapterStore
from graft.model.chat import TEMPLATES, load_tokenizer, tokenizer_digest
from graft.serve.api import build
from graft.serve.runner import Runner

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def server(spec):
    with TestClient(build(Runner(spec)), base_url="http://localhost") as client:
        while client.get("/ready").json()["status"] == "loading":
            time.sleep(0.02)
        yield client


def tokenizer_with(folder, change):
    tokenizer = load_tokenizer(str(folder))
    change(tokenizer)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def parity(folder, **changes):
    file = folder / "parity.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def tensors(folder, change):
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def probes(folder, change):
    found = json.loads((folder / "probes.json").read_text())
    change(found)
    (folder / "probes.json").write_text(json.dumps(found))


def in_parity(folder):
    """As if training had seen this tokenizer: the fault is left to what it renders."""
    tokenizer = load_tokenizer(str(folder))
    parity(folder, tokenizer=tokenizer_digest(tokenizer), chat_template=digest_of(tokenizer.chat_template))


def other_template(folder):
    tokenizer_with(folder, lambda t: setattr(t, "chat_template", TEMPLATES["chatml"].replace("\n", " ")))


def rendered_otherwise(folder):
    other_template(folder)
    in_parity(folder)


def double_bos(folder):
    tokenizer_with(folder, lambda t: setattr(t, "chat_template", "{{ '<|im_start|>' }}" + TEMPLATES["chatml"]))
    in_parity(folder)


def other_special_token(folder):
    parity(folder, special_tokens={"0": "<|im_start|>", "1": "<|eot|>"})


def other_vocabulary(folder):
    tokenizer_with(folder, lambda t: t.add_tokens(["<extra>"]))


SKEWS = {
    "another base": (lambda f: parity(f, base="hub:other/base@1"), "was trained on the base hub:other/base@1, this server has hub:tiny/base@0"),
    "another template": (other_template, "was trained with another chat template"),
    "rendered otherwise": (rendered_otherwise, r"its conversation 0 renders to other tokens here, from token \d+ on"),
    "a double BOS": (double_bos, r"its conversation 0 renders to other tokens here, from token 1 on"),
    "other special tokens": (other_special_token, "was trained with other special tokens: token 1 was '<|eot|>' and is '<|im_end|>'"),
    "another vocabulary": (other_vocabulary, "another tokenizer than the base has here"),
    "renamed tensors": (lambda f: tensors(f, lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}), "layers.7.*no linear layer"),
    "swapped layers": (
        lambda f: tensors(
            f, lambda t: {k.replace("layers.1", "layers.x").replace("layers.0", "layers.1").replace("layers.x", "layers.0"): v for k, v in t.items()}
        ),
        r"nats here and by .* in training .* apart",
    ),
    "never applied": (
        lambda f: tensors(f, lambda t: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in t.items()}),
        "as if it were not applied",
    ),
    "half as strong": (
        lambda f: (f / "adapter_config.json").write_text(json.dumps({**json.loads((f / "adapter_config.json").read_text()), "lora_alpha": 4})),
        "not applied as it was trained",
    ),
    "learned nothing": (
        lambda f: (
            tensors(f, lambda t: {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in t.items()}),
            parity(f, canaries=[{**c, "adapter": c["base"]} for c in json.loads((f / "parity.json").read_text())["canaries"]]),
        ),
        "it learned next to nothing",
    ),
    "no record": (lambda f: (f / "parity.json").unlink(), "has no parity.json that can be read"),
    "no canaries": (lambda f: parity(f, canaries=[]), "has no canaries"),
    "canaries that are none": (lambda f: parity(f, canaries=[{"ids": [1]}]), r"its canaries cannot be asked here \(KeyError: 'at'\)"),
    "probes that are none": (lambda f: probes(f, lambda p: p[0].pop("ids")), r"is not as training writes it \(KeyError: 'ids'\)"),
    "NaN": (lambda f: tensors(f, lambda t: {k: v * float("nan") for k, v in t.items()}), "not applied as it was trained|as if it were not applied"),
}


@pytest.mark.parametrize("skew", SKEWS)
def test_skew_is_refused_by_what_it_is(server, spec, tiny, tmp_path, skew):
    spoil, line = SKEWS[skew]
    folder = tmp_path / "adapter"
    shutil.copytree(tiny[1]["two"], folder)
    spoil(folder)
    name = "skew-" + skew.replace(" ", "-").lower()
    version = AdapterStore(spec.store).add(name, folder, {})
    ask = {"model": version.id, "messages": [{"role": "user", "content": "sea"}], "max_tokens": 2}
    reply = server.post("/v1/chat/completions", json=ask)
    assert (reply.status_code, reply.json()["error"]["code"]) == (409, "adapter_refused"), reply.text
    assert re.search(line, reply.json()["error"]["message"]), reply.json()["error"]["message"]
    assert server.post("/admin/alias", json={"alias": "prod", "model": version.id}).status_code == 409
    listed = {a["id"]: a for a in server.get("/admin/adapters").json()["data"]}
    assert listed[version.id]["state"] == "refused" and listed[version.id]["reason"]
    assert name not in [m["id"] for m in server.get("/v1/models").json()["data"]]


def damaged(version, how):
    file = version.folder / WEIGHTS
    if how == "stale":  # another adapter's files under this version's name
        shutil.rmtree(version.folder)
        shutil.copytree(version.folder.parent.parent / "one" / AdapterStore(version.folder.parent.parent).get("one").version, version.folder)
    elif how == "pickle":
        version.folder.chmod(0o755)
        (version.folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/graft-pwned'\ntR.")
    else:
        file.chmod(0o644)
        file.write_bytes(file.read_bytes()[:-9])


@pytest.mark.parametrize("how, line", [("stale", "lists other files"), ("pickle", "adapter_model.bin is no part of"), ("truncated", "bytes")])
def test_files_that_are_not_as_published_are_refused(server, spec, tiny, tmp_path, how, line):
    folder = tmp_path / "adapter"
    shutil.copytree(tiny[1]["two"], folder)
    (folder / "adapter_config.json").write_text((folder / "adapter_config.json").read_text() + " " * (1 + len(how)))  # a version of its own
    version = AdapterStore(spec.store).add(f"damaged-{how}", folder, {})
    damaged(version, how)
    reply = server.post("/v1/chat/completions", json={"model": version.id, "messages": [{"role": "user", "content": "sea"}]})
    assert reply.status_code == 409 and line in reply.json()["error"]["message"]


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "a/../b", "one@../../x", "one@" + "0" * 12, "x" * 200, "one\x00", "/etc", "%2e%2e%2f"])
def test_names_that_are_none_are_unknown(server, name):
    ask = {"model": name, "messages": [{"role": "user", "content": "sea"}]}
    assert server.post("/v1/chat/completions", json=ask).status_code == 404
    for route in ("load", "unload", "reload"):
        assert server.post(f"/admin/{route}", json={"model": name}).status_code in (400, 404)
    assert server.post("/admin/alias", json={"alias": name, "model": "one"}).status_code in (400, 404)


def test_an_override_is_explicit_and_shows(server, spec, tiny, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(tiny[1]["two"], folder)
    (folder / "parity.json").unlink()
    version = AdapterStore(spec.store).add("foreign", folder, {})
    assert server.post("/admin/load", json={"model": "foreign"}).status_code == 409
    loaded = server.post("/admin/load", json={"model": "foreign", "override": "trained elsewhere, checked by hand"})
    assert loaded.status_code == 200 and loaded.json()["state"] == "ready" and "no parity.json" in loaded.json()["gate"]["reason"]
    card = server.get("/v1/models/foreign").json()
    assert (card["verified"], card["override"], card["version"]) == (False, "trained elsewhere, checked by hand", version.id)
    ask = {"messages": [{"role": "user", "content": "sea"}], "max_tokens": 8, "temperature": 0}
    one, two = (server.post("/v1/chat/completions", json={**ask, "model": m}).json()["choices"] for m in ("foreign", "two"))
    assert one == two
    assert server.post("/admin/unload", json={"model": "foreign"}).status_code == 200
    assert server.post("/v1/chat/completions", json={**ask, "model": "foreign"}).status_code == 404
