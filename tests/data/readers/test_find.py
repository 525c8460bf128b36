"""Which files a corpus has, what format their names tell, and datasets as folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from graft.core.errors import ConfigError, DataError
from graft.core.sections import Corpus
from graft.data.readers.files import find, format_of, pieces, records, sample


def names(root: Path, path: str, **keys: Any) -> list[str]:
    return [str(file.relative_to(root)) for file in find(Corpus(path=path, **keys), root.joinpath)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a/z.txt", "a/b/c.csv.gz", "a.parquet", ".hidden.jsonl", ".git/x.jsonl", "a/.x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_a_file_a_folder_and_patterns(folder: Path) -> None:
    assert names(folder, "b.jsonl") == ["b.jsonl"]
    assert names(folder, ".") == ["a/b/c.csv.gz", "a/z.txt", "a.parquet", "b.jsonl"]
    assert names(folder, "*.jsonl") == ["b.jsonl"]
    assert names(folder, "a*") == ["a/b/c.csv.gz", "a/z.txt", "a.parquet"]
    assert names(folder, "**/*.t?t") == ["a/z.txt"]


def test_what_is_not_there_or_of_no_known_format_is_one_line(folder: Path) -> None:
    (folder / "a/README").touch()
    (folder / "empty").mkdir()
    for path, says in (("gone.jsonl", "no file at"), ("x*.csv", "no file at"), ("empty", "no file at"), (".", r"a/README: the name tells no format")):
        with pytest.raises(ConfigError, match=says) as e:
            names(folder, path)
        assert "\n" not in str(e.value)
    assert "a/README" in names(folder, ".", format="text")
    with pytest.raises(ConfigError, match="save_to_disk"):
        names(folder, "a", format="dataset")


@pytest.mark.parametrize(
    ("name", "format"), [("A.JSONL", "jsonl"), ("a.b.tsv", "csv"), ("a.json.zst", "json"), ("a.pq", "parquet"), ("a.txt.gz", "text")]
)
def test_formats_by_name(name: str, format: str) -> None:
    assert format_of(Path(name)) == format
    assert format_of(Path(name), "text") == "text"


@pytest.mark.parametrize("name", ["a", "a.xlsx", "a.gz", "a.parquet.gz", "jsonl"])
def test_names_that_tell_no_format(name: str) -> None:
    with pytest.raises(ConfigError, match=r"known are \.txt.*\.parquet"):
        format_of(Path(name))


def test_the_sample_goes_on_to_the_next_file_and_ends(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("no JSON\n" * 3)
    (tmp_path / "b.jsonl").write_text("".join(f'{{"n": {i}}}\n' for i in range(10)))
    (tmp_path / "c.jsonl").write_text("no JSON\n" * 1000)
    found = [piece for name in "abc" for piece in pieces(tmp_path / f"{name}.jsonl")]
    assert sample(found, 4) == [{"n": i} for i in range(4)]
    assert sample(found[2:], 4) == []


# ---- datasets --------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def read(root: Path, path: str, **keys: Any) -> list[Any]:
    return [r.value for file in find(Corpus(path=path, **keys), root.joinpath) for piece in pieces(file) for r in records(piece)]


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"第{i}"}], "n": i} for i in range(2500)]
    train, test = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:7])
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both", num_shards={"train": 3, "test": 1})
    train.select(range(5, 9)).save_to_disk(tmp_path / "one")
    assert read(tmp_path, "both") == rows[:7] + rows
    assert read(tmp_path, "both/train", format="dataset") == rows
    assert read(tmp_path, "one") == rows[5:9]
    assert len(names(tmp_path, ".")) == 5
    train.to_parquet(tmp_path / "parquet" / "train.parquet")
    assert read(tmp_path, "parquet") == rows
    (tmp_path / "one" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow is missing"):
        names(tmp_path, "one")
