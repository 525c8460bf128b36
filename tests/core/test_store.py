"""The store takes adapters in whole, reads them as they were published or not at all, and lets no name out of its root."""

import errno
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graft.core import store as stored
from graft.core.errors import ArtifactError, GraftError, Unreadable
from graft.core.store import AdapterStore, UnknownAdapter


def make(folder, value=1.0, **files):
    folder.mkdir()
    save_file({"a": torch.full((4, 4), value)}, folder / "adapter_model.safetensors")
    for name, text in {"adapter_config.json": "{}", "metrics.jsonl": "{}", **files}.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "served")


def test_a_version_is_its_content_and_its_name_follows_the_newest(store, tmp_path):
    one = store.add("chat", make(tmp_path / "one"), {"recipe": "chat"})
    again = store.add("chat", tmp_path / "one", {})
    two = store.add("chat", make(tmp_path / "two", 2.0), {})
    assert (one.id, one.about["lineage"]) == (again.id, {"recipe": "chat"}) and one.id != two.id
    assert store.get("chat").id == two.id and store.names() == {"chat": two.id} and store.versions() == [one.id, two.id]
    assert sorted(f.name for f in one.folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors", "version.json"]
    store.alias("prod", one.id)
    store.alias("chat", one.id)
    assert store.get("prod") == store.get("chat") == store.verified(one.id)
    with pytest.raises(UnknownAdapter):
        store.alias("prod", "chat@" + "0" * 12)


def test_notes_change_and_versions_do_not(store, tmp_path):
    one = store.add("chat", make(tmp_path / "one"), {})
    assert store.note("chat", evaluation={"f1": 0.9}).notes == {"evaluation": {"f1": 0.9}}
    assert store.note(one.id, evaluation=None, withdrawn=True).notes == {"withdrawn": True}
    assert store.verified("chat").about == one.about


def test_what_cannot_be_read_is_one_line_and_hides_nothing_else(store, tmp_path, monkeypatch):
    one, two = store.add("chat", make(tmp_path / "one"), {}), store.add("bad", make(tmp_path / "two", 2.0), {})
    (store.root / "bad/alias").write_bytes(b"\xff\xfe")
    assert store.names() == {"chat": one.id}
    with pytest.raises(ArtifactError, match="bad/alias names no version"):
        store.get("bad")
    for file in (two.folder / "version.json", two.folder.with_suffix(".json")):
        file.unlink(missing_ok=True)
        file.write_text("[]")
        with pytest.raises(ArtifactError, match=f"{file.name} cannot be read"):
            store.get(two.id)
        file.unlink()
        file.write_text("{}")
    (two.folder / "version.json").unlink()
    (two.folder / "version.json").mkdir()  # an OSError of whoever reads it
    with pytest.raises(Unreadable, match=r"the store cannot be read now: .*version\.json"):
        store.verified(two.id)
    monkeypatch.setattr(Path, "is_symlink", stale)
    for look in (store.names, lambda: store.get(one.id)):
        with pytest.raises(Unreadable, match="Stale file handle"):
            look()


def stale(path):
    raise OSError(errno.ESTALE, "Stale file handle", str(path))


def test_modes_are_right_whatever_the_umask(store, tmp_path):
    before = os.umask(0o077)
    try:
        found = store.add("chat", make(tmp_path / "one"), {})
        store.note("chat", withdrawn=True)
    finally:
        os.umask(before)
    modes = {p.relative_to(store.root).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in [store.root, *store.root.rglob("*")]}
    assert modes.pop("chat/alias") == modes.pop(f"chat/{found.version}.json") == 0o644
    assert {m for p, m in modes.items() if "adapter" in p or "version.json" in p} == {0o444}
    assert {m for p, m in modes.items() if "adapter" not in p and "version.json" not in p} == {0o755}


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "A", "x" * 65, "a\n", "@", "chat@../../etc", "chat@" + "0" * 11, ".hidden"])
def test_no_name_leaves_the_root(store, tmp_path, name):
    make(tmp_path / "one")
    with pytest.raises(UnknownAdapter):
        store.get(name)
    if "@" not in name or name == "@":
        with pytest.raises(UnknownAdapter):
            store.add(name, tmp_path / "one", {})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("where", ["name", "version", "file", "alias"])
def test_symbolic_links_are_refused(store, tmp_path, where):
    found = store.add("chat", make(tmp_path / "one"), {})
    at = {"name": store.root / "chat", "version": found.folder, "file": found.folder / "adapter_config.json", "alias": store.root / "chat/alias"}[
        where
    ]
    moved = tmp_path / "moved"
    at.rename(moved)
    at.symlink_to(moved)
    if where == "alias":
        assert store.names() == {}
        return
    with pytest.raises(ArtifactError, match="symbolic link"):
        store.verified(found.id)


def damage(found, how):
    file = found.folder / "adapter_model.safetensors"
    file.chmod(0o644)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "altered":
        file.write_bytes(file.read_bytes()[:-1] + b"\1")
    elif how == "gone":
        file.unlink()
    elif how == "pickle":
        (found.folder / "adapter_model.bin").write_bytes(b"\x80\x04.")
    elif how == "relisted":  # another content under the name of this version
        about = json.loads((found.folder / "version.json").read_text())
        about["files"]["adapter_config.json"]["sha256"] = "0" * 64
        (found.folder / "version.json").chmod(0o644)
        (found.folder / "version.json").write_text(json.dumps(about))


@pytest.mark.parametrize("how", ["truncated", "altered", "gone", "pickle", "relisted"])
def test_what_is_not_as_published_is_refused_by_file(store, tmp_path, how):
    found = store.add("chat", make(tmp_path / "one"), {})
    damage(found, how)
    with pytest.raises(ArtifactError, match=r"version\.json" if how == "relisted" else r"adapter_model\."):
        store.verified("chat")


def test_another_version_under_the_same_name_is_refused(store, tmp_path):
    one, two = store.add("chat", make(tmp_path / "one"), {}), store.add("chat", make(tmp_path / "two", 2.0), {})
    shutil.rmtree(one.folder)
    shutil.copytree(two.folder, one.folder)
    with pytest.raises(ArtifactError, match="lists other files"):
        store.verified(one.id)


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 4, b"\xff" * 16, (10**9).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", b"\x80\x04K\x01."]
)
def test_what_is_no_safetensors_file_is_never_published(store, tmp_path, content):
    (make(tmp_path / "one") / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(GraftError, match="no safetensors file"):
        store.add("chat", tmp_path / "one", {})
    assert store.versions() == [] and not list(store.root.glob("chat/.draft*"))


def picture(folder, data=b"a picture", suffix="png", name=None):
    file = folder / f"{name or hashlib.sha256(data).hexdigest()}.{suffix}"
    file.write_bytes(data)
    return file.name


def test_the_images_of_canaries_are_published_under_their_sha256_alone(store, tmp_path):
    folder = make(tmp_path / "one", preprocessor_config__json="{}")
    names = {picture(folder, b"one", suffix) for suffix in ("png", "jpg", "webp")}
    for name in ("0" * 63, "A" * 64, "photo"):
        picture(folder, name=name)
    picture(folder, suffix="svg")
    found = store.verified(store.add("chat", folder, {}).id)
    assert set(found.about["files"]) == {"adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json", *names}
    image = found.folder / min(names)
    image.chmod(0o644)
    image.write_bytes(b"eno")
    with pytest.raises(ArtifactError, match=f"{image.name} was altered"):
        store.verified(found.id)
    image.unlink()
    with pytest.raises(ArtifactError, match=f"{image.name} is missing"):
        store.verified(found.id)


def test_images_under_another_name_or_too_many_of_them_are_never_published(store, tmp_path, monkeypatch):
    folder = make(tmp_path / "one")
    name = picture(folder, name="0" * 64)
    with pytest.raises(ArtifactError, match=f"{name} was altered: its SHA-256 is not its name"):
        store.add("chat", folder, {})
    (folder / name).unlink()
    for n in range(3):
        picture(folder, b"%d" % n)
    for limit in ("MAX_IMAGES", "MAX_IMAGE_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(stored, limit, 2)
            with pytest.raises(ArtifactError, match="holds 3 images in 3 bytes: at most"):
                store.add("chat", folder, {})
    assert store.versions() == [] and store.add("chat", folder, {})
