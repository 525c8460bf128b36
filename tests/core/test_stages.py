"""Plans: what a stage depends on, and nothing else, changes its fingerprint."""

import json
import shutil
from pathlib import Path

import pytest

from graft.core import stages
from graft.core.artifact import sha256_file
from graft.core.errors import ArtifactError, ConfigError
from graft.core.stages import Plan, lineage

RECIPES = Path(__file__).parents[2] / "configs" / "recipes"


@pytest.fixture
def recipes(tmp_path):
    shutil.copytree(RECIPES.parent, tmp_path / "configs")
    return tmp_path / "configs" / "recipes"


def plan(recipes, *overrides):
    return Plan(recipes / "image-intent-tiny.toml", overrides, recipes.parents[1] / "ws")


def make(p, stage, **files):
    job = p.resolve(stage)
    with job.writing() as draft:
        for name, text in files.items():
            path = draft.path / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".jsonl").write_text(text)
    return job


def test_order_and_parents(recipes):
    assert list(plan(recipes).stages) == [
        "augment",
        "prepare",
        "init",
        "shard-base",
        "shard-cpt",
        "shard-sft",
        "base",
        "cpt",
        "merge",
        "sft",
        "evaluate",
        "serve",
    ]
    assert list(Plan(recipes / "image-intent-8b.toml").stages) == ["augment", "prepare", "shard-sft", "sft", "evaluate", "serve"]


def test_only_what_matters_changes_the_fingerprint(recipes):
    first = plan(recipes).resolve("augment").fingerprint
    for same in ("api.in_flight=3", "api.timeout_s=5", "api.requests_per_minute=60", "sft.lr=1e-5", "serve.port=9000"):
        assert plan(recipes, same).resolve("augment").fingerprint == first, same
    for other in ("seed=1", "augment.rows_per_class=10", "api.model='x'", "task.function='draw'"):
        assert plan(recipes, other).resolve("augment").fingerprint != first, other
    seeds = recipes / "image-intent" / "seeds.jsonl"
    seeds.write_text(seeds.read_text() + seeds.read_text().splitlines()[0] + "\n")
    assert plan(recipes).resolve("augment").fingerprint != first


def test_the_share_that_is_held_out_is_a_key_of_the_stage_that_holds_it_out(recipes):
    def of(share):
        p = Plan(recipes / "finetome-tiny.toml", (f"prepare.validation={share}",), recipes.parents[1] / "ws")
        for stage in ("prepare", "init"):
            if p.resolve(stage).artifact is None:
                with p.resolve(stage).writing() as draft:  # of corpora alone: the same documents, however many are held out
                    (draft.path / "corpora").mkdir()
                    (draft.path / ("corpora/x" if stage == "prepare" else "tokenizer.json")).write_text("same")
        return {stage: p.resolve(stage).fingerprint for stage in ("shard-base", "shard-sft")}

    few, many = of(0.1), of(0.4)
    assert few["shard-sft"] != many["shard-sft"] and few["shard-base"] == many["shard-base"]


def test_an_edited_strategy_file_is_never_skipped_over(recipes):
    p = plan(recipes)
    before = p.external_input("deepspeed")
    assert {"base", "cpt", "sft"} == {s.name for s in p.stages.values() if "deepspeed" in s.inputs}
    path = recipes.parent / "deepspeed" / "zero2.json"
    path.write_text(path.read_text().replace("50000000", "60000000"))
    assert p.external_input("deepspeed") != before
    path.unlink()
    with pytest.raises(ConfigError, match=r"zero2\.json"):
        p.external_input("deepspeed")


def test_an_edited_template_is_never_skipped_over(recipes):
    of_file = Plan(recipes / "taigi-tiny.toml", ("model.chat_template='interviewer/interview.jinja'",), recipes)
    assert [s.name for s in of_file.stages.values() if "template" in s.inputs] == [
        *("init", "shard-base", "shard-cpt", "shard-sft", "base", "cpt", "merge", "sft", "evaluate", "serve")
    ]
    assert not any("template" in s.inputs for s in Plan(recipes / "taigi-tiny.toml").stages.values())
    before, path = of_file.external_input("template"), recipes / "interviewer/interview.jinja"
    assert of_file.chat_template == path.read_text() and plan(recipes, "model.chat_template=chatml").chat_template == "chatml"
    path.write_text(path.read_text() + " ")
    assert of_file.external_input("template") != before
    path.write_bytes("面試官".encode("utf-16"))
    with pytest.raises(ConfigError, match=r"interview\.jinja, which is no UTF-8"):
        _ = of_file.chat_template
    path.unlink()
    with pytest.raises(ConfigError, match=r"model\.chat_template names .*interview\.jinja, which is no file"):
        _ = of_file.chat_template


def test_a_discarded_artifact_is_gone_under_its_name(recipes):
    p = plan(recipes)
    job = make(p, "augment", rows="one")
    job.run_directory.mkdir(parents=True)
    job.discard()
    assert job.artifact is None and not job.run_directory.exists() and [f.name for f in job.directory.parent.iterdir()] == ["current"]


def test_a_persons_decisions_are_part_of_augment(recipes):
    p = plan(recipes)
    first = p.resolve("augment").fingerprint
    p.review_file.parent.mkdir(parents=True, exist_ok=True)
    p.review_file.write_text('{"id": "a-0", "decision": "reject"}\n')
    assert p.resolve("augment").fingerprint != first


def test_images_are_digested_by_content(tmp_path):
    (tmp_path / "images/deep").mkdir(parents=True)
    (tmp_path / "images/deep/a.png").write_bytes(b"a")
    (tmp_path / "list.jsonl").write_text('{"image": "images/deep/a.png"}\n{"image": "https://example.com/b.png"}\nno json\n')
    (tmp_path / "folder.toml").write_text('name = "f"\n[augment.images]\nfolder = "images"\nprompts = ["?"]\n')
    (tmp_path / "listed.toml").write_text('name = "l"\n[augment.images]\nfile = "list.jsonl"\nprompts = ["?"]\n')
    plans = [Plan(tmp_path / f"{n}.toml", root=tmp_path) for n in ("folder", "listed")]
    before = [p.external_input("images") for p in plans]
    assert [list(p.stages) for p in plans] == [["augment"], ["augment"]] and [b["images"] for b in before] == [1, 1]
    (tmp_path / "images/deep/a.png").write_bytes(b"b")
    assert all(p.external_input("images") != b for p, b in zip(plans, before, strict=True))
    (tmp_path / "folder.toml").write_text('name = "f"\n[augment.images]\nfolder = "gone"\nprompts = ["?"]\n')
    with pytest.raises(ConfigError, match="gone"):
        Plan(tmp_path / "folder.toml", root=tmp_path).external_input("images")


def test_the_endpoint_is_part_of_augment_and_its_key_is_not(recipes, monkeypatch):
    first = plan(recipes).resolve("augment").fingerprint
    monkeypatch.setenv("OPENAI_BASE_URL", "https://user:secret@api.example.com/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    job = plan(recipes).resolve("augment")
    assert job.fingerprint != first
    assert job.head["inputs"]["endpoint"] == "api.example.com" and "secret" not in json.dumps(job.head) and "planted" not in json.dumps(job.head)


@pytest.mark.parametrize("address", ["api.example.com/v1", "http://[bad", "ftp://host/v1", "https://", "http://host:port/v1", "https:/host/v1"])
def test_an_address_that_is_none_is_refused_before_anything_is_sent(recipes, monkeypatch, address):
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL is no address"):
        plan(recipes).external_input("endpoint")


def test_a_workspace_that_is_a_file_is_refused(recipes, tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match="is no folder"):
            Plan(recipes / "image-intent-tiny.toml", (), root)
    with pytest.raises(ConfigError, match="file/below"):
        Plan(tmp_path / "file/below.toml", (), tmp_path)


def test_lines_that_name_no_image_change_nothing_and_stop_nothing(tmp_path):
    lines = ['{"image": "%s"}' % ("iVBORw0KGgo" * 60), '{"image": ' + "[" * 100_000, '{"image": "a\\u0000b"}', "no JSON"]
    (tmp_path / "photos.jsonl").write_text("\n".join(lines))
    (tmp_path / "eyes.toml").write_text('name = "f"\n[augment.images]\nfile = "photos.jsonl"\nprompts = ["?"]\n')
    assert Plan(tmp_path / "eyes.toml", root=tmp_path).external_input("images")["images"] == 0


def test_a_parent_must_be_complete_and_its_content_counts(recipes):
    p = plan(recipes)
    with pytest.raises(ArtifactError, match="needs 'augment'"):
        p.resolve("prepare")
    make(p, "augment", rows="one", other="x")
    first = p.resolve("prepare").fingerprint
    shutil.rmtree(p.resolve("augment").directory)
    make(p, "augment", rows="one", other="y")
    assert p.resolve("prepare").fingerprint == first, "prepare reads rows.jsonl alone"
    shutil.rmtree(p.resolve("augment").directory)
    make(p, "augment", rows="two")
    assert p.resolve("prepare").fingerprint != first


def test_lineage_and_current(recipes):
    p = plan(recipes)
    augment = make(p, "augment", rows="one")
    prepare = make(p, "prepare", rows__train="t", corpora__zh="z")
    found = lineage(prepare.directory / "rows" / "train.jsonl")
    assert [(d, a.manifest["kind"]) for d, a in found] == [(0, "prepare"), (1, "augment")]
    assert (augment.directory.parent / "current").resolve() == augment.directory.resolve()
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        lineage(recipes)


def test_a_recipe_without_training_ends_with_its_rows_or_its_documents(tmp_path):
    augment, corpus = '[augment]\nseeds = "s.jsonl"\n', '[corpora.c]\npath = "c.txt"\n'
    for text, wanted in ((augment, ["augment"]), (augment + corpus, ["augment"]), (corpus, ["prepare"])):
        (tmp_path / "r.toml").write_text('name = "r"\n' + text)
        assert list(Plan(tmp_path / "r.toml").stages) == wanted


def test_one_writer_a_recipe(recipes):
    with plan(recipes).lock(), pytest.raises(ConfigError, match="another"), plan(recipes).lock():
        pass
    with plan(recipes).lock():
        pass


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("augment.seeds='gone.jsonl'", "gone.jsonl"),
        ("corpora.own={path='no.txt'}", "no.txt"),
    ],
)
def test_missing_files_are_named(recipes, override, said):
    p = plan(recipes, override)
    with pytest.raises(ConfigError, match=said):
        for spec in p.stages.values():
            for name in spec.inputs:
                p.external_input(name)


def test_a_base_folder_must_be_a_model(recipes):
    p = Plan(recipes / "image-intent-8b.toml", ("model.base='image-intent'",))
    with pytest.raises(ConfigError, match=r"config\.json"):
        p.external_input("model")
    with pytest.raises(ConfigError, match="neither a folder"):
        Plan(recipes / "image-intent-8b.toml", ("model.base='./gone'",)).external_input("model")


def test_file_digests_are_remembered_until_the_file_changes(recipes):
    p = plan(recipes)
    seeds = recipes / "image-intent" / "seeds.jsonl"
    assert p.external_input("seeds") == p.external_input("seeds") == sha256_file(seeds)
    seeds.write_text("changed")
    assert p.external_input("seeds") == sha256_file(seeds)


def test_an_encoder_is_an_input_of_the_evaluation_alone(recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "commit_of", lambda kind, name, revision, key: f"commit of {key} {revision}")  # tests/core/test_hub.py asks a hub

    (recipes / "chat.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    tasks = 'evaluate.tasks={chat = {kind = "generation", path = "chat.jsonl"}}'

    def of(name):
        return Plan(recipes / "image-intent-tiny.toml", (tasks, f"evaluate.semantic={name}"), tmp_path / "ws")

    for name, revision in (("owner/encoder@v1", "v1"), ("owner/encoder", None)):
        assert of(name).semantic_encoder() == ("owner/encoder", f"commit of evaluate.semantic {revision}")
        assert of(name).external_input("semantic") == f"hub:owner/encoder@commit of evaluate.semantic {revision}"
    assert [name for name, stage in of("owner/encoder").stages.items() if "semantic" in stage.inputs] == ["evaluate"]
    with pytest.raises(ConfigError, match=r"evaluate\.semantic = './none' is neither a folder beside the recipe nor a hub id"):
        of("./none").external_input("semantic")
    (recipes / "encoder").mkdir()
    with pytest.raises(ConfigError, match=r"evaluate\.semantic = .* has no config\.json"):
        of("encoder").external_input("semantic")
