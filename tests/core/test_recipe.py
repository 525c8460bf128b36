"""Recipes: the keys are frozen, and every mistake is one line that names the mend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graft.core.errors import ConfigError
from graft.core.recipe import keys, load, pick
from graft.core.stage_list import stages

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"
TINY = RECIPES / "image-intent-tiny.toml"


def test_the_set_of_keys_is_frozen():
    known = (Path(__file__).parent / "recipe_keys.txt").read_text().split()
    assert keys() == known, "the recipe's keys changed: say so in CHANGELOG.md and update tests/core/recipe_keys.txt"


SHIPPED = sorted(RECIPES.glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_validate(path):
    assert load(path).name == path.stem


def test_shipped_recipes_pass_the_check_on_the_tree_as_it_is(tmp_path):
    """Where no hub can be reached: keys, numbers and all files that they name."""
    code = "import sys; from graft.cli import main; sys.exit(any([main(['check', path]) for path in sys.argv[1:]]))"
    nowhere = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, *map(str, SHIPPED)], env=nowhere, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(", stages ") == len(SHIPPED), done.stderr


@pytest.mark.parametrize("system", ["interviewer", "finetome", "taigi", "image-intent"])
def test_a_twin_has_the_stages_of_its_recipe(system):
    full, twin = (next(RECIPES.glob(f"{system}-{size}.toml")) for size in ("[0-9]*b", "tiny"))
    of_full, of_twin = ({s.name for s in stages(load(path))} for path in (full, twin))
    extra = {"init", "shard-base", "base"} | ({"shard-cpt", "cpt", "merge"} if system == "image-intent" else set())
    assert of_twin - of_full == extra and of_full <= of_twin
    assert load(full).evaluate.tasks == load(twin).evaluate.tasks and load(full).model.template_file == load(twin).model.template_file


def test_full_size_recipe_is_the_seed_system():
    r = load(RECIPES / "image-intent-8b.toml")
    lora = r.sft.lora
    assert (r.model.base, r.model.precision, r.shard.seq_len) == ("meta-llama/Llama-3.1-8B", "nf4", 1536)
    assert (lora.r, lora.alpha, lora.dropout, lora.targets) == (32, 16, 0.05, ("q_proj", "k_proj", "v_proj", "o_proj"))
    assert (r.sft.lr, r.sft.epochs, r.sft.micro_batch, r.sft.global_batch, r.augment.rows_per_class) == (2e-4, 1, 2, 8, 1500)


SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_full_size_interviewer():
    r = load(RECIPES / "interviewer-1b.toml")
    t = r.sft
    assert (r.model.base, r.shard.seq_len) == ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 512)
    assert (t.lora.r, t.lora.alpha, t.lora.dropout) == (16, 32, 0.05)
    assert (t.lr, t.epochs, t.max_steps, t.warmup, t.global_batch, t.micro_batch, t.pack) == (2e-4, 3, None, 50, 2, 1, False)
    assert (t.activation_checkpointing, t.max_grad_norm, t.weight_decay, t.save_every) == ("full", 0.3, 0.001, 100)


def test_full_size_finetome():
    r = load(RECIPES / "finetome-3b.toml")
    assert (r.model.base, r.model.precision) == ("meta-llama/Llama-3.2-3B-Instruct", "nf4")
    assert (r.corpora["finetome"].path, r.sft.corpora) == ("hub:mlabonne/FineTome-100k:train", ("finetome",))
    assert (r.sft.lora.r, r.sft.lora.alpha, r.sft.lr, r.sft.epochs, r.sft.max_steps) == (16, 16, 2e-4, 1, None)
    assert [task.kind for task in r.evaluate.tasks.values()] == ["generation"] * 4


def test_full_size_taigi():
    r = load(RECIPES / "taigi-13b.toml")
    clean = r.corpora["articles"].clean
    assert (r.model.base, r.shard.seq_len, r.seed, r.tracking.wandb) == ("Bohanlu/Taigi-Llama-2-13B", 2048, 9527, "offline")
    assert (clean.merge_by, clean.min_chars, clean.max_chars) == ("title", 100, 2048) and {"urls", "page_numbers", "punctuation"} <= set(clean.steps)
    assert (r.cpt.lora.r, r.cpt.lora.alpha, r.cpt.lora.dropout, r.cpt.lora.targets) == (64, 128, 0.05, SEVEN)
    assert (r.cpt.lr, r.cpt.max_steps, r.cpt.micro_batch, r.cpt.global_batch) == (2e-4, 1000, 4, 16)
    assert (r.sft.lora.r, r.sft.lora.alpha, r.sft.lora.dropout, r.sft.lr, r.sft.max_steps) == (16, 32, 0.1, 1e-5, 100)
    assert [task.kind for task in r.evaluate.tasks.values()] == ["choice"]


def test_warm_up_is_a_share_or_steps():
    assert [load(TINY, [f"sft.warmup={w}"]).sft.warmup for w in ("0", "0.03", "1", "50")] == [0, 0.03, 1, 50]
    for wrong in ("-1", "1.5"):
        with pytest.raises(ConfigError, match=r"sft\.warmup"):
            load(TINY, [f"sft.warmup={wrong}"])


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
        ("model.chat_template='chatlm'", "'chatlm' is none of 'tokenizer', 'chatml', 'llama-3', 'alpaca', and names no .jinja file"),
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
        ("name='base'", "name = 'base' is what servers call the untrained model: choose another"),
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
    code = "import sys, time; t = time.process_time(); from graft.cli import main; rc = main(['check', sys.argv[1]]); s = time.process_time() - t; " \
        "heavy = [m for m in ('torch', 'ray', 'transformers') if m in sys.modules]; sys.exit(rc or (f'{heavy} {s:.2f} s' if heavy or s > 1 else 0))"  # fmt: skip
    away = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the processor's seconds, without the network's
    for name in ("image-intent-tiny.toml", "image-intent-8b.toml"):
        done = subprocess.run([sys.executable, "-c", code, str(RECIPES / name)], env=away, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_recipes_of_images_are_evaluated_and_served():
    full, twin = (load(RECIPES / f"ui-vqa-{size}.toml") for size in ("7b", "tiny"))
    assert [s.name for s in stages(full)] == ["augment", "prepare", "questions", "shard-sft", "sft", "evaluate", "serve"]
    assert [s.name for s in stages(twin)] == ["prepare", "questions", "init", "shard-base", "shard-sft", "base", "sft", "evaluate", "serve"]
    by_name = {s.name: s for s in stages(full)}
    assert by_name["questions"].parents == {"prepare": "rows/test.jsonl"} and "prepare" not in by_name["evaluate"].parents
    assert {n: (t.kind, t.answer_schema) for n, t in full.tasks.items()} == {"test": ("json", full.augment.images.answer_schema)}
    assert not full.learns_calls and load(TINY).learns_calls and load(TINY).tasks == {}
    text_alone = ["sft.corpora=['self']", "base.train.corpora=['other-self']"]
    with pytest.raises(ConfigError, match=r"add a \[base.vision\] section"):
        load(RECIPES / "ui-vqa-tiny.toml", [*text_alone, "base={hidden_size=8, heads=2, kv_heads=2, train={corpora=['other-self'], lora=false}}"])


def test_images_need_a_base_that_sees():
    seeing = load(RECIPES / "ui-vqa-tiny.toml")
    assert seeing.shows_images and seeing.stage_shows_images("base") and seeing.stage_shows_images("sft")
    assert not load(TINY).shows_images
    with pytest.raises(ConfigError, match=r"add a \[base.vision\] section"):
        load(RECIPES / "ui-vqa-tiny.toml", ["base={hidden_size=8, heads=2, kv_heads=2, train={corpora=['drawn'], lora=false}}"])
    assert load(RECIPES / "ui-vqa-tiny.toml", ["sft.corpora=['self']", "base.train.corpora=['other-self']"]).shows_images is False
