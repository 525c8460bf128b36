import json
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from graft.core.errors import DataError
from graft.core.rows import read_jsonl
from graft.core.shards import ShardSet
from graft.core.stages import Plan
from graft.data import init, prepare, shard
from graft.model.chat import load_tokenizer, render


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, workspace, ray_local):
    plan = workspace(tmp_path_factory.mktemp("shard"))
    prepare.run(plan.resolve("prepare"))
    init.run(plan.resolve("init"))
    return plan


def again(plan: Plan, *overrides: str) -> Plan:
    return Plan(plan.path, overrides, plan.root)


def made(plan: Plan, stage: str):
    if plan.resolve(stage).artifact is None:
        shard.run(plan.resolve(stage))
    return plan.artifact(stage)


def unpack(held: ShardSet) -> dict[str, list[tuple[list[int], list[int]]]]:
    """(ids, mask) of every packed document by its source, in bin order."""
    found: dict[str, list] = {}
    for i in range(len(held)):
        b, at = held.bin(i), 0
        for length, source in zip(b.doc_lens.tolist(), held.sources(i), strict=True):
            found.setdefault(source, []).append((b.input_ids[at : at + length].tolist(), b.loss_mask[at : at + length].tolist()))
            at += length
        assert (b.input_ids[at:] == held.index["pad_id"]).all() and not b.loss_mask[at:].any()
    return found


@pytest.mark.parametrize("stage", ["shard-base", "shard-cpt"])
def test_every_document_is_in_the_bins_whole(prepared, stage):
    artifact = made(prepared, stage)
    tokenizer = load_tokenizer(str(prepared.artifact("init").path))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    names = ("made", "notes") if stage == "shard-base" else ("notes",)
    texts = {f"{name}/{d['index']}": d["text"] for name in names for d in read_jsonl(prepared.artifact("prepare").path / "corpora" / f"{name}.jsonl")}
    sets = {name: ShardSet.open(artifact.path / name) for name in ("train", "validation")}
    sides = {name: unpack(held) for name, held in sets.items()}
    assert not sides["train"].keys() & sides["validation"].keys() and sides["train"].keys() | sides["validation"].keys() == texts.keys()
    longer = 0
    for found in sides.values():
        for source, pieces in found.items():
            wanted = [*tokenizer(texts[source], add_special_tokens=False)["input_ids"], end]
            chunks = [wanted[i : i + 128] for i in range(0, len(wanted), 128)]
            assert Counter(tuple(ids) for ids, _ in pieces) == Counter(map(tuple, chunks))
            assert all(all(mask) for _, mask in pieces)
            longer += len(chunks) > 1
    assert longer, "some document was split"
    counts = artifact.counts
    assert counts["in"] == len(texts) == counts["kept"] and counts["rejected"] == {}
    for name, held in sets.items():
        lens = [n for i in range(len(held)) for n in held.bin(i).doc_lens.tolist()]
        assert held.index["documents"] == len(lens) and held.index["tokens"] == sum(lens) and held.index["supervised_tokens"] == sum(lens) - len(lens)
        assert counts[name]["bins"] == len(held) == held.index["bins"]
    assert next(s["file"] for s in sets["train"].index["shards"]) == "part-000-000.arrow"
    assert {s["file"][:8] for s in sets["train"].index["shards"]} == {"part-000", "part-001"} and max(
        s["bins"] for s in sets["train"].index["shards"]
    ) == 8


def test_rows_keep_their_mask_and_probes_say_how_they_render(prepared):
    artifact = made(prepared, "shard-sft")
    tokenizer = load_tokenizer(str(prepared.artifact("init").path))
    for name in ("train", "validation"):
        held = ShardSet.open(artifact.path / name)
        rows = list(read_jsonl(prepared.artifact("prepare").path / "rows" / f"{name}.jsonl"))
        wanted = {r["id"]: render(tokenizer, r["messages"]) for r in rows}
        assert unpack(held) == {source: [(r.ids, r.loss_mask)] for source, r in wanted.items()}
        assert held.index["supervised_tokens"] == sum(sum(r.loss_mask[1:]) for r in wanted.values())
        assert held.index["tokenizer"] == shard.tokenizer_digest(tokenizer)
    probes = json.loads((artifact.path / "probes.json").read_text(encoding="utf-8"))
    assert len(probes) == 3
    for probe in probes:
        done = render(tokenizer, probe["messages"])
        assert (probe["ids"], probe["loss_mask"]) == (done.ids, done.loss_mask)
    assert len({p["messages"][1]["content"].startswith("call(") for p in probes}) == 2, "both classes are probed"


def test_shards_do_not_depend_on_how_the_work_was_cut(prepared, monkeypatch):
    for stage in ("shard-base", "shard-sft"):
        before = made(prepared, stage)
        first = before.manifest["digest"]
        shutil.rmtree(before.path)
        monkeypatch.setattr(shard, "BLOCK", 9)
        assert made(prepared, stage).manifest["digest"] == first
        monkeypatch.undo()


def test_unpacked_rows_have_a_bin_each(prepared):
    held = ShardSet.open(made(again(prepared, "sft.pack=false"), "shard-sft").path / "train")
    assert all(len(held.bin(i).doc_lens) == 1 for i in range(len(held))) and len(held) == held.index["documents"]


def test_rows_longer_than_a_bin_are_rejected_and_never_cut(prepared):
    tokenizer = load_tokenizer(str(prepared.artifact("init").path))
    rows = [r for name in ("train", "validation") for r in read_jsonl(prepared.artifact("prepare").path / "rows" / f"{name}.jsonl")]
    lengths = {r["id"]: len(render(tokenizer, r["messages"]).ids) for r in rows}
    limit = max(lengths.values()) - 1
    # shard.seq_len is a key of init too, so the same base is named as an external one
    recipe, folder = prepared.path.with_name("external.toml"), prepared.artifact("init").path
    recipe.write_text(prepared.path.read_text().split("[base]")[0] + f'base = "{folder}"\n[sft]\n')
    plan = Plan(recipe, (f"shard.seq_len={limit}",), prepared.root)
    artifact = made(plan, "shard-sft")
    rejected = list(read_jsonl(artifact.path / "rejected.jsonl"))
    too_long = {i for i, n in lengths.items() if n > limit}
    assert too_long and {r["source"] for r in rejected} == too_long and {r["reason"] for r in rejected} == {"longer than shard.seq_len"}
    assert artifact.counts["in"] == len(rows) == artifact.counts["kept"] + len(rejected)
    assert artifact.counts["kept"] == sum(len(unpack(ShardSet.open(artifact.path / n))) for n in ("train", "validation"))

    plan = Plan(recipe, ("shard.seq_len=8",), prepared.root)
    with pytest.raises(DataError, match="shard-sft: none of 60 inputs can be used") as e:
        shard.run(plan.resolve("shard-sft"))
    assert "\n" not in str(e.value) and plan.resolve("shard-sft").artifact is None


def test_a_partition_is_packed_in_index_order_whatever_order_it_comes_in(tmp_path):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 50, n).tolist() for n in rng.integers(1, 30, 40)]
    rows = [("train", 0, i, f"c/{i}", "", x, [1] * len(x)) for i, x in enumerate(ids)]
    from graft.core.recipe import Shard

    digests = []
    for k, order in enumerate((range(40), rng.permutation(40))):
        (tmp_path / str(k) / "train").mkdir(parents=True)
        group = pa.table(dict(zip(shard.TOKENIZED.names, zip(*(rows[i] for i in order), strict=True), strict=True)), schema=shard.TOKENIZED)
        report = shard.write_partition(group, tmp_path / str(k), Shard(seq_len=32, bins_per_shard=5), True, 0)
        digests.append([s["sha256"] for s in json.loads(report["report"][0].as_py())["shards"]])
    assert digests[0] == digests[1] and len(digests[0]) > 1
