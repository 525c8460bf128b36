"""Recipes: the keys are frozen, and every mistake is one line that names the mend."""

import subprocess
import sys
from pathlib import Path

import pytest

from graft.core.errors import ConfigError
from graft.core.recipe import keys, load, pick

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
TINY = RECIPES / "image-intent-tiny.toml"


def test_the_set_of_keys_is_frozen():
    known = (Path(__file__).parent / "recipe_keys.txt").read_text().split()
    assert keys() == known, "the recipe's keys changed: say so in CHANGELOG.md and update tests/core/recipe_keys.txt"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipes_validate(path):
    assert load(path).name == path.stem


def test_full_size_recipe_is_the_seed_system():
    r = load(RECIPES / "image-intent-8b.toml")
    lora = r.sft.lora
    assert (r.model.base, r.model.precision, r.shard.seq_len) == ("meta-llama/Llama-3.1-8B", "nf4", 1536)
    assert (lora.r, lora.alpha, lora.dropout, lora.targets) == (32, 16, 0.05, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert (r.sft.lr, r.sft.epochs, r.sft.micro_batch, r.sft.global_batch, r.augment.rows_per_class) == (2e-4, 1, 2, 8, 1500)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.learning_rate=1", "unknown key 'sft.learning_rate'"),
        ("sft.epoch=1", "did you mean 'sft.epochs'"),
        ("lr=1", "did you mean"),
        ("sft.lr='fast'", "sft.lr"),
        ("sft.lr=-1", "greater than 0"),
        ("sft.epochs=true_", "sft.epochs"),
        ("model.precision='int3'", "model.precision"),
        ("model.base='x/y'", "[base]"),
        ("cpt.corpora=['nope']", "'nope'"),
        ("base.heads=5", "base.hidden_size"),
        ("base.train.lora={r=4}", "lora = false"),
        ("name='../evil'", "name"),
        ("api.budget_usd=1", "api.prices"),
        ("augment.images={folder='x', prompts=['?']}", "either seeds"),
        ("augment.images={folder='x'}", "asks nothing"),
        ("augment.images={folder='x', prompts=[' ']}", "prompts"),
        ("augment.images={prompts=['?']}", "folder"),
        ("name='served'", "'served' is where the adapters of all recipes are"),
        ("sft.lora={r=128}", "sft.lora.r = 128 and serve.max_rank = 64: what is trained could not be served"),
        ("sft.lora={r=8, use_dora=true}", "unknown key 'sft.lora.use_dora'"),
        ("sft.lora={r=8, modules_to_save=['lm_head']}", "unknown key 'sft.lora.modules_to_save'"),
        ("corpora.a={kind='identity', name='x'}", "needs both"),
        ("corpora.a={path='x', author='y'}", "name and author are of kind = 'identity'"),
        ("corpora.a={kind='drawings'}", "needs documents = N"),
        ("corpora.a={path='hub:o/n', images='x'}", "local files"),
        ("corpora.a={kind='grammar', documents=1, images='x'}", "local files"),
        ("shard.image_pixels=100", "shard.image_pixels"),
        ("base.vision={heads=5}", "no multiple of 4 x base.vision.heads = 5"),
        ("sft", "key=value"),
        ("name.x=1", "is a value"),
    ],
)
def test_mistakes_are_one_line(override, said):
    with pytest.raises(ConfigError) as e:
        load(TINY, [override])
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
@pytest.mark.parametrize("section", ["cpt", "sft"])
def test_quantised_weights_are_not_trained_whole(precision, section):
    overrides = [f"model.precision={precision}", f"{section}.lora=false"]
    with pytest.raises(ConfigError, match=f"{section}.lora = false and model.precision = '{precision}': .* use bf16"):
        load(TINY, overrides)
    assert load(TINY, overrides[:1]).model.precision == precision


def test_a_missing_recipe_names_its_neighbours(tmp_path):
    with pytest.raises(ConfigError, match=r"image-intent-tiny\.toml"):
        load(RECIPES / "image-intent-tinny.toml")
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match="not a TOML file"):
        load(tmp_path / "bad.toml")


def test_overrides_and_pick():
    r = load(TINY, ["sft.lr=1e-4", "tracking.project=abc"])
    assert r.sft.lr == 1e-4 and r.tracking.project == "abc"
    assert pick(r, ("sft.lr", "seed")) == {"sft.lr": 1e-4, "seed": 0}


def test_a_recipe_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        load(TINY).seed = 3


def test_check_is_fast_and_light():
    code = "import sys, time; t = time.perf_counter(); from graft.cli import main; rc = main(['check', sys.argv[1]]); s = time.perf_counter() - t; " \
        "heavy = [m for m in ('torch', 'ray', 'transformers') if m in sys.modules]; sys.exit(rc or (f'{heavy} {s:.2f} s' if heavy or s > 1 else 0))"  # fmt: skip
    for name in ("image-intent-tiny.toml", "image-intent-8b.toml"):
        done = subprocess.run([sys.executable, "-c", code, str(RECIPES / name)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_images_need_a_base_that_sees_and_no_merge():
    drawn = ["corpora.drawn={kind='drawings', documents=9}", "sft.corpora=['drawn']"]
    with pytest.raises(ConfigError, match=r"\[cpt\] and images in one recipe"):
        load(TINY, drawn)
    seeing = load(RECIPES / "ui-vqa-tiny.toml")
    assert seeing.shows_images and seeing.stage_shows_images("base") and seeing.stage_shows_images("sft")
    assert not load(TINY).shows_images
    with pytest.raises(ConfigError, match=r"add a \[base.vision\] section"):
        load(RECIPES / "ui-vqa-tiny.toml", ["base={hidden_size=8, heads=2, kv_heads=2, train={corpora=['drawn'], lora=false}}"])
    assert load(RECIPES / "ui-vqa-tiny.toml", ["sft.corpora=['self']", "base.train.corpora=['other-self']"]).shows_images is False
