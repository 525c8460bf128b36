import gzip
import json
import shutil
from collections import Counter
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graft.core.errors import DataError
from graft.core.rows import read_jsonl
from graft.core.shards import Image, ShardSet
from graft.core.stages import Plan
from graft.data import init, prepare, shard
from graft.model.chat import load_tokenizer, render, tokenizer_digest


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
    texts = {f"{name}/{i}": text for name in names for i, text in enumerate(prepare.documents(prepared.artifact("prepare").path, name))}
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
    shards = sets["train"].index["shards"]
    assert [s["file"] for s in shards[:2]] == ["00000-000.arrow", "00000-001.arrow"] and max(s["bins"] for s in shards) == 8
    assert sum(counts["train"]["shares"].values()) == pytest.approx(1, abs=1e-5) and set(counts["train"]["shares"]) == set(names)


def test_rows_keep_their_mask_and_probes_say_how_they_render(prepared):
    artifact = made(prepared, "shard-sft")
    tokenizer = load_tokenizer(str(prepared.artifact("init").path))
    for name in ("train", "validation"):
        held = ShardSet.open(artifact.path / name)
        rows = list(read_jsonl(prepared.artifact("prepare").path / "rows" / f"{name}.jsonl"))
        wanted = {r["id"]: render(tokenizer, r["messages"]) for r in rows}
        assert unpack(held) == {f"rows/{i}": [(r.ids, r.loss_mask)] for i, r in enumerate(wanted.values())}
        assert held.index["supervised_tokens"] == sum(sum(r.loss_mask[1:]) for r in wanted.values())
        assert held.index["tokenizer"] == tokenizer_digest(tokenizer)
    probes = json.loads((artifact.path / "probes.json").read_text(encoding="utf-8"))
    assert len(probes) == 3
    for probe in probes:
        done = render(tokenizer, probe["messages"])
        assert (probe["ids"], probe["loss_mask"]) == (done.ids, done.loss_mask)
    assert len({p["messages"][1]["content"].startswith("call(") for p in probes}) == 2, "both classes are probed"


def test_parts_are_made_once_and_shards_are_the_same_on_every_run(prepared, tmp_path, workspace, monkeypatch):
    for stage in ("shard-base", "shard-sft"):
        before = made(prepared, stage)
        store = prepared.root / "data_shards/small/parts" / stage
        parts = {p.name: p.stat().st_ino for p in store.iterdir()}
        shutil.rmtree(before.path)
        assert made(prepared, stage).digest == before.digest and {p.name: p.stat().st_ino for p in store.iterdir()} == parts
        shutil.rmtree(before.path)
        shutil.rmtree(store)
        assert made(prepared, stage).digest == before.digest


@settings(deadline=None)
@given(st.lists(st.sets(st.integers(0, 40), max_size=3), min_size=20, max_size=40), st.sampled_from([0.001, 0.1, 0.5]))
def test_rows_that_share_an_image_with_others_are_on_one_side(rows, share):
    by = shard.by_image([tuple(Image(f"{n}.png", (1, 2, 2)) for n in row) for row in rows], [f"row {n}" for n in range(len(rows))])
    groups: list[set[int]] = []  # of images that rows have in common, slowly
    for row in filter(None, rows):
        groups = [g for g in groups if not g & row] + [row.union(*(g for g in groups if g & row))]
    alone = sum(not row for row in rows)
    assert len(set(by)) == len(groups) + alone, "and nobody else is with them"
    held_out, _ = shard.split_of(by, None, share, 1.0)
    train, validation = ({n for row, held in zip(rows, held_out, strict=True) if held == side for n in row} for side in (False, True))
    assert not train & validation and held_out.any() == (len(groups) + alone > 1) and not held_out.all()


def test_weights_repeat_and_thin_out(prepared):
    whole = made(prepared, "shard-base")
    weighed = made(again(prepared, "base.train.weights={made=2.5, notes=0.25}"), "shard-base")
    before, after = (Counter(s.split("/")[0] for s in sources(a)) for a in (whole, weighed))
    assert 2.2 < after["made"] / before["made"] < 2.8 and 0.05 < after["notes"] / before["notes"] < 0.5
    assert weighed.counts["validation"] == whole.counts["validation"], "what is held out is weighed by nothing"
    assert weighed.counts["train"]["shares"]["made"] > whole.counts["train"]["shares"]["made"]


def sources(artifact):
    held = ShardSet.open(artifact.path / "train")
    return [s for i in range(len(held)) for s in held.sources(i)]


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
    too_long = sum(n > limit for n in lengths.values())
    assert (
        too_long == len(rejected) and {r["source"] for r in rejected} == {"rows"} and {r["reason"] for r in rejected} == {"longer than shard.seq_len"}
    )
    assert artifact.counts["in"] == len(rows) == artifact.counts["kept"] + len(rejected)
    assert artifact.counts["kept"] == sum(len(unpack(ShardSet.open(artifact.path / n))) for n in ("train", "validation"))

    plan = Plan(recipe, ("shard.seq_len=8",), prepared.root)
    with pytest.raises(DataError, match="shard-sft: none of 60 inputs can be used") as e:
        shard.run(plan.resolve("shard-sft"))
    assert "\n" not in str(e.value) and plan.resolve("shard-sft").artifact is None


def test_a_compressed_file_gives_the_rows_of_its_pieces_in_parts_of_their_size(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "TEXT", 3 << 19)  # these chats, which are much alike, compress to a few kB
    chats = [
        [{"role": "user", "content": f"{i}: " + "好" * (i % 90)}, {"role": "assistant", "content": f"{i} " + "so " * (i % 60)}] for i in range(9000)
    ]
    lines = "".join(json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats).encode()
    found = {}
    for name, data in (("a.jsonl", lines), ("a.jsonl.gz", gzip.compress(lines, 1))):
        (tmp_path / name).write_bytes(data)
        (tmp_path / "r.toml").write_text(
            f'name = "r"\n[corpora.c]\npath = "{name}"\n[dedup]\nnear = 1.0\n[shard]\nseq_len = 512\npart_mib = 1\n'
            f'[model]\nbase = "{prepared.artifact("init").path}"\n[sft]\ncorpora = ["c"]\n'
        )
        plan = Plan(tmp_path / "r.toml", (), tmp_path)
        prepare.run(plan.resolve("prepare"))
        artifact = made(plan, "shard-sft")
        assert len(list((tmp_path / "data_shards/r/parts/shard-sft").iterdir())) == round(len(lines) / 2**20) == 3
        sides = {split: unpack(ShardSet.open(artifact.path / split)) for split in ("train", "validation")}
        found[name] = {split: Counter(map(str, chain.from_iterable(of.values()))) for split, of in sides.items()}
    assert found["a.jsonl.gz"] == found["a.jsonl"] and sum(side.total() for side in found["a.jsonl"].values()) == 9000


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_part_is_tokenized_a_little_at_a_time_to_the_same_ids(prepared, monkeypatch, kind):
    texts = [f"note {i} " + "of the sea " * (i % 7) for i in range(60)] + ["\ud800", ""]
    if kind == "chat":
        texts = [json.dumps([{"role": "user", "content": text}, {"role": "assistant", "content": "so"}]) for text in texts]
    spec = {"source": [str(prepared.artifact("init").path), None, prepared.chat_template], "seq_len": 128}
    whole, _ = shard._tokenized(texts, kind, spec)
    monkeypatch.setattr(shard, "AT_ONCE", 200)
    again, images = shard._tokenized(texts, kind, spec)
    assert all((a == b).all() for a, b in zip(again[:3], whole[:3], strict=True)) and again.ids.dtype == whole.ids.dtype and images is None
    assert again.reasons == whole.reasons and sum(map(bool, again.reasons)) == 2
