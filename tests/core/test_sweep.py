"""Sweeps: every mistake is one line that names the mend, and an arm's settings are those of --set."""

import subprocess
import sys
from pathlib import Path

import pytest

from graft.core import recipe, sweep
from graft.core.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
TEXT = """
name = "study"
recipe = "r.toml"
seeds = [1, 2]
[[arms]]
name = "small"
[[arms]]
name = "large"
[arms.set]
sft.epochs = 2
sft.corpora = ["a", "茶"]
corpora.a = { path = "a \\"b\\".jsonl", documents = 10_000 }
model.precision = "fp32"
sft.pack = false
[[arms]]
name = "again"
match_tokens = "large"
"""


def written(tmp_path, text=TEXT):
    (tmp_path / "study.toml").write_text(text)
    return tmp_path / "study.toml"


def test_an_arm_is_what_set_would_make(tmp_path):
    small, large, again = sweep.load(written(tmp_path)).arms
    assert (small.overrides, again.overrides, again.match_tokens) == ((), (), "large")
    tree = {}
    for item in large.overrides:
        recipe._override(tree, item)
    assert tree == {
        "sft": {"epochs": 2, "corpora": ["a", "茶"], "pack": False},
        "corpora": {"a": {"path": 'a "b".jsonl', "documents": 10_000}},
        "model": {"precision": "fp32"},
    }


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("match_tokens =", "match_token =", "unknown key 'arms.2.match_token': did you mean 'arms.match_tokens'?"),
        ("seeds =", "seed =", "unknown key 'seed': did you mean 'seeds'?"),
        ('name = "large"', 'name = "small"', "arms has 'small' twice"),
        ("[1, 2]", "[1, 1]", "seeds has 1 twice"),
        ("[1, 2]", "[]", "seeds"),
        ("[1, 2]", "['a']", "seeds.0"),
        ("sft.epochs = 2", "seed = 2", "arm 'large' sets 'seed', which is the sweep's"),
        ("sft.epochs = 2", "name = 'x'", "arm 'large' sets 'name'"),
        ('match_tokens = "large"', 'match_tokens = "larg"', "did you mean 'large'?"),
        ('match_tokens = "large"', 'match_tokens = "again"', "no other arm"),
        ('match_tokens = "large"', 'match_tokens = "large"\nset = { sft.max_steps = 3 }', "'sft.max_steps' and match_tokens"),
        ('name = "small"', 'name = "small"\nmatch_tokens = "again"', "which matches another itself: name 'large'"),
        ('name = "study"', 'name = "../study"', "name"),
        ('recipe = "r.toml"', "", "missing key 'recipe'"),
        ('recipe = "r.toml"', "recipe = ", "not a TOML file"),
    ],
)
def test_bad_input_is_one_line(tmp_path, old, new, said):
    assert old in TEXT
    with pytest.raises(ConfigError) as e:
        sweep.load(written(tmp_path, TEXT.replace(old, new, 1)))
    assert said in str(e.value) and "\n" not in str(e.value) and "study.toml" in str(e.value)


def test_what_is_no_sweep(tmp_path):
    written(tmp_path)
    with pytest.raises(ConfigError, match=r"no sweep at .*gone.toml: that folder has study.toml"):
        sweep.load(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match="is a recipe"):
        sweep.load(CONFIGS / "recipes/image-intent-tiny.toml")


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_sweeps_validate(path):
    told = sweep.load(path)
    assert told.name == path.stem
    base = path.parent / told.recipe
    if not base.is_file():
        pytest.skip(f"{base.name} is not there yet")
    for arm in told.arms:
        made = recipe.load(base, arm.overrides)
        assert made.evaluate.tasks and made.sft


def test_a_sweep_validates_without_torch_or_ray(tmp_path):
    code = f"import sys; from graft.core import sweep; sweep.load({str(written(tmp_path))!r}); print({{'torch', 'ray', 'transformers'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
