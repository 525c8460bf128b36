"""The files that a path stands for: what counts for the fingerprint is what is read."""

import pytest

from graft.core.errors import ConfigError
from graft.core.files import files_at
from graft.core.stages import Plan


@pytest.fixture
def names(tmp_path):
    """names(path): what lies there, after files, a hidden folder and links were made in c/."""
    for name in ("c/a1/x.txt", "c/a1/.hidden.txt", "c/a1/.git/x.txt", "c/top.txt", "c/.h/deep.txt", "elsewhere/y.txt", "elsewhere/.z.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "c/a0").symlink_to(tmp_path / "elsewhere")
    return lambda path: [str(file.relative_to(tmp_path)) for file in files_at(tmp_path / path)]


def test_folders_that_a_pattern_matches_are_read_like_folders(names):
    assert names("c/a1*") == ["c/a1/x.txt"] and names("c/*") == ["c/a0/y.txt", "c/a1/x.txt", "c/top.txt"] == names("c/**")
    assert names("c/.h") == names("c/.h*") == ["c/.h/deep.txt"], "what is named is read, hidden or not"
    assert names("c/t*") == names("c/top.txt") == ["c/top.txt"] and names("gone") == names("c/g*") == []


def test_a_linked_folder_is_read_once_and_a_link_to_nothing_is_told(names, tmp_path):
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "c")
    (tmp_path / "c/a0b").symlink_to(tmp_path / "c/a1")
    assert names("c") == ["c/a0/y.txt", "c/a1/x.txt", "c/top.txt"]
    (tmp_path / "c/lost.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"c/lost.txt is a link to nothing"):
        names("c")


@pytest.mark.parametrize("path", ["c", "c/a*", "c/*"])
def test_an_edit_of_what_is_read_is_never_skipped_over(names, tmp_path, path):
    (tmp_path / "r.toml").write_text(f'name = "r"\n[corpora.c]\npath = "{path}"\n')
    before = Plan(tmp_path / "r.toml", (), tmp_path).resolve("prepare").fingerprint
    (tmp_path / "elsewhere/y.txt").write_text("another")
    assert Plan(tmp_path / "r.toml", (), tmp_path).resolve("prepare").fingerprint != before
