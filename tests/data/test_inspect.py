"""`graft inspect` on real artifacts: what it says is what the files hold, and nothing in them can steer terminal or page."""

import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from graft.core.artifact import writing
from graft.core.errors import ArtifactError, ConfigError, GraftError
from graft.core.rows import write_jsonl
from graft.core.shards import Columns, ShardSet, write_index, write_shard
from graft.data.inspect import bar, inspect
from graft.data.inspect_bin import runs
from graft.data.pack import fill, pack
from graft.model.chat import load_tokenizer

SEQ = 96
ASKED = ["請畫一隻在海邊散步的柴犬", "<script>alert(1)</script> & <b>", "dial \x1b[31mred\u202etfel", "emoji 👩‍👩‍👧 نص"]
ANSWERED = ["好的，馬上畫", "no & never", "plain", "好 👍"]
REJECTED = [
    {"source": "chat", "number": 3, "reason": "longer than shard.seq_len", "text": "<i>long</i> text"},
    {"source": "chat", "number": 5, "reason": "longer than shard.seq_len", "text": "another"},
    {"source": "notes", "number": 0, "reason": "empty", "text": ""},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level tokenizer with few merges, so that most Han characters are several tokens; as loaded from its folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    t.train_from_iterator(ASKED + ANSWERED, trainer)
    folder = tmp_path_factory.mktemp("tokenizer") / "base"
    PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|pad|>").save_pretrained(folder)
    return load_tokenizer(str(folder), None, "chatml")


def publish(root, kind, tokenizer, filled, inputs=None, template="chatml"):
    """An artifact under `root` whose recipe names `root`/base; `filled` puts the files into its folder."""
    if not (root / "base").exists():
        tokenizer.save_pretrained(root / "base", save_jinja_files=False)
    recipe = {"model": {"base": "base", "revision": None, "chat_template": template}}
    final = root / "data_shards" / "small" / kind / "abc"
    with writing(
        final, kind=kind, fingerprint="abc", head={"recipe": recipe, "parents": {}, "inputs": {"model": inputs or {"config.json": "0"}}}
    ) as d:
        d.counts.update(filled(d.path) or {})
    return final


def shards_in(folder, tokenizer, digest=None):
    from graft.model.chat import tokenizer_digest

    ids, mask, lens = [], [], []
    for user, answer in zip(ASKED, ANSWERED, strict=True):
        for text, supervised in ((f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n", 0), (f"{answer}<|im_end|>", 1), ("\n", 0)):
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += found
            mask += [supervised] * len(found)
        lens.append(len(ids) - sum(lens))
    lens = np.array(lens)
    for split, documents in (("train", np.arange(4)), ("validation", np.arange(1))):
        (folder / split).mkdir()
        bins = pack(lens[documents], SEQ)
        filled = fill(np.array(ids, np.int32), np.array(mask, np.uint8), (np.cumsum(lens) - lens)[documents], lens[documents], bins, SEQ, 2)
        columns = Columns(*filled, lens[bins.order], bins.ends, bins.order % 2, bins.order)
        entry = write_shard(folder / split / "0.arrow", columns, ["chat", "<x>&"])
        write_index(folder / split, seq_len=SEQ, pad_id=2, tokenizer=digest or tokenizer_digest(tokenizer), shards=[entry])
    write_jsonl(folder / "rejected.jsonl", REJECTED)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tokenizer):
    return publish(tmp_path_factory.mktemp("w"), "shard-sft", tokenizer, lambda folder: shards_in(folder, tokenizer))


def shown(path, bin=None, html=None, colour=False):
    out = io.StringIO()
    inspect(path, bin, html, Console(file=out, width=160, force_terminal=colour, color_system="standard" if colour else None))
    return out.getvalue()


class Page(HTMLParser):
    """Tags and the text by class of a page; fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.by_class = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open:
            self.by_class.append((self.open[-1][1], data))

    def text(self, name):
        return "".join(data for c, data in self.by_class if c == name)


def test_a_bin_is_rendered_with_mask_borders_and_padding(artifact):
    held = ShardSet.open(artifact / "train")
    plain, coloured = "", ""
    for i in range(len(held)):
        plain += shown(artifact, i)
        coloured += shown(artifact, i, colour=True)
        assert f"── padding · {SEQ - held.used()[i]} tokens" in plain
        for source, length in zip(held.sources(i), held.bin(i).doc_lens, strict=True):
            assert f"── {source} · {length} tokens" in plain
    assert "請畫一隻在海邊散步的柴犬<|im_end|>" in plain and "�" not in plain
    supervised = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", coloured))
    for answer in ANSWERED:
        assert answer.replace("\u200d", "<U+200D>") + "<|im_end|>" in supervised
    assert "柴" not in supervised and "user" not in supervised


def test_the_sections_say_what_the_files_hold(artifact):
    held, text = ShardSet.open(artifact / "train"), shown(artifact)
    index = held.index
    row = re.search(r"^train +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +([\d.]+)%", text, re.MULTILINE)
    assert [int(row[k]) for k in range(1, 6)] == [1, *(index[k] for k in ("bins", "documents", "tokens", "supervised_tokens"))]
    assert float(row[6]) == pytest.approx(100 * index["utilisation"], abs=1e-3)
    assert re.search(r"^validation +1 +1 +1 ", text, re.MULTILINE)
    assert re.search(r"^chat +longer than shard.seq_len +2 +<i>long</i> text", text, re.MULTILINE) and re.search(
        r"^notes +empty +1", text, re.MULTILINE
    )
    assert re.search(rf"^<x>& +2 +{index['sources'][1]['tokens']} ", text, re.MULTILINE)
    lengths = text.split("Documents by length")[1].split("\nBins by tokens")[0]
    found = {(int(a), int(b)): int(n) for a, b, n in re.findall(r"^ *(\d+)–(\d+) +(\d+)", lengths, re.MULTILINE)}
    assert sum(found.values()) == 4 and all(n == sum(a <= x <= b for x in held.doc_lens()) for (a, b), n in found.items())
    assert f"smallest {held.costs().min():,}, mean {held.costs().mean():,.0f}, largest {held.costs().max():,}\n" in text


def test_a_folder_of_shards_shows_without_its_artifact_too(artifact, tmp_path):
    import shutil

    assert "請畫一隻" in shown(artifact / "validation"), "the folder's artifact names the tokenizer"
    shutil.copytree(artifact / "train", tmp_path / "bare")
    text = shown(tmp_path / "bare")
    ids = ShardSet.open(tmp_path / "bare").bin(0).input_ids[:5]
    assert "ids, not text: these shards lie in no artifact" in text and " ".join(map(str, ids)) in text and "Rejected" not in text


def test_another_tokenizer_is_not_believed(tmp_path, tokenizer):
    path = publish(tmp_path, "shard-sft", tokenizer, lambda folder: shards_in(folder, tokenizer, "0" * 64))
    text = shown(path)
    assert "ids, not text: the tokenizer of 'base' is not the one these shards were made with" in text and "柴" not in text
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    assert "model.base = 'base' is not found from" in shown(path)


def test_a_template_file_is_looked_for_as_the_base_is(tmp_path, tokenizer):
    path = publish(tmp_path, "shard-sft", tokenizer, lambda folder: shards_in(folder, tokenizer), template="own/chat.jinja")
    assert "model.chat_template = 'own/chat.jinja' is not found from" in shown(path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/chat.jinja").write_text(tokenizer.chat_template)
    assert "請畫一隻" in shown(path)


def test_the_page_holds_the_same_and_runs_nothing(artifact, tmp_path):
    assert "page: " in shown(artifact, html=tmp_path / "p.html")
    raw = (tmp_path / "p.html").read_text(encoding="utf-8")
    page = Page(raw)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "b", "i", "x"}
    assert not any(name.startswith("on") or name in ("src", "href") for _, attrs in page.tags for name in attrs)
    assert "\x1b" not in raw and "\u202e" not in raw
    held = ShardSet.open(artifact / "train")
    assert [data for c, data in page.by_class if c == "border" and "padding" not in data] == [
        f"{s} · {n} tokens" for i in range(min(3, len(held))) for s, n in zip(held.sources(i), held.bin(i).doc_lens, strict=True)
    ]
    assert all(answer.replace("\u200d", "<U+200D>") + "<|im_end|>" in page.text("s") for answer in ANSWERED)
    assert "請畫一隻在海邊散步的柴犬" in page.text("u") and "<script>alert(1)</script> & <b>" in page.text("u")
    assert sum(tag == "svg" for tag, _ in page.tags) == 5, "sources, lengths, tokens used, cost, rejected"
    widths = [float(attrs["width"]) for tag, attrs in page.tags if tag == "rect"]
    assert max(widths) == 420 and all(w >= 0 for w in widths)
    assert shown(artifact, html=tmp_path / "q.html") and (tmp_path / "q.html").read_text(encoding="utf-8") == raw


COUNTS = {
    "corpora": {
        "notes": {"layout": "text", "files": 2, "records": 9, "documents": 1234, "characters": 300, "rejected": {"empty": 1}, "changed": {"nfc": 2}},
        "chat": {"layout": "messages", "files": 1, "records": 5, "documents": 5, "characters": 100, "rejected": {}, "changed": {}},
    },
    "rows": {"in": 10, "kept": 8, "train": {"call": 4}},
}


def prepared(folder):
    write_jsonl(folder / "rejected.jsonl", REJECTED)
    rows = [(0, 3, 0, 3, 0, 0, 1.0, "exact"), (0, 7, 1, 2, 0, 0, 0.91, "near"), (5, 9, 1, 4, 1, 0, 0.83, "near")]
    names = ("cluster", "document", "file", "row", "of_file", "of_row", "similarity", "kind")
    pq.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), folder / "clusters.parquet")
    return COUNTS


def test_what_prepare_made(tmp_path, tokenizer):
    text = shown(publish(tmp_path, "prepare", tokenizer, prepared), html=tmp_path / "p.html")
    assert re.search(r"^notes +text +2 +9 +1,234 +300 ", text, re.MULTILINE)
    assert re.search(r"^notes +nfc +2", text, re.MULTILINE) and re.search(r"^rows\.train\.call +4", text, re.MULTILINE)
    assert re.search(r"^chat +longer than shard.seq_len +2", text, re.MULTILINE)
    assert re.search(r"^near +2 +0\.870", text, re.MULTILINE) and re.search(r"^exact +1 +1\.000", text, re.MULTILINE)
    assert re.search(r"^0:0 +2 +0:3 \(1\.00\), 1:2 \(0\.91\)$", text, re.MULTILINE) and re.search(r"^1:0 +1 +1:4 ", text, re.MULTILINE)
    assert "1,234" in Page((tmp_path / "p.html").read_text()).text("n")


def test_errors_are_one_line(artifact, tmp_path, tokenizer):
    last = len(ShardSet.open(artifact / "train")) - 1
    other = publish(tmp_path / "a", "augment", tokenizer, lambda folder: None)
    made = publish(tmp_path / "b", "prepare", tokenizer, prepared)
    (tmp_path / "empty").mkdir()
    for path, bin, html, kind, says in (
        (tmp_path / "nothing", None, None, ArtifactError, "nothing is no folder"),
        (tmp_path / "empty", None, None, ArtifactError, "holds no manifest.json"),
        (other, None, None, ArtifactError, "is a 'augment' artifact"),
        (artifact, last + 1, None, ConfigError, f"has {last + 1} bins, 0 to {last}"),
        (artifact, -1, None, ConfigError, "--bin -1"),
        (made, 0, None, ConfigError, "which has no bins"),
        (artifact, None, tmp_path / "no" / "p.html", ConfigError, "cannot be written"),
    ):
        with pytest.raises(GraftError, match=re.escape(says)) as e:
            shown(path, bin, html)
        assert type(e.value) is kind and "\n" not in str(e.value)


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer in SentencePiece's manner: words that begin with ▁, and a token for each byte of what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    known = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "柴"]
    t = Tokenizer(models.BPE({w: i for i, w in enumerate(known)}, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>")


@given(st.text(max_size=60) | st.text("柴犬海👩‍👧 \n\ufffdaß", max_size=60), st.data())
@settings(deadline=None)
def test_runs_lose_and_split_no_character(tokenizer, byte_fallback, text, data):
    tokenizer = data.draw(st.sampled_from([tokenizer, byte_fallback]))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = data.draw(st.lists(st.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    found = list(runs(tokenizer, ids, mask))
    assert [i for run in found for i in run.ids] == ids
    assert "".join(run.text for run in found) == tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in run.text for run in found) and all(run.text for run in found[1:])  # a first ▁ gives none
    at = 0
    for run in found:
        assert run.supervised == any(mask[at : at + len(run.ids)])
        at += len(run.ids)


def test_bars():
    assert [bar(s, 2) for s in (0, 1 / 16, 0.5, 0.75, 1)] == ["", "▏", "█", "█▌", "██"]


def test_it_needs_no_ray(artifact):
    code = "import sys, pathlib, rich; from graft.data.inspect import inspect; inspect(pathlib.Path(sys.argv[1]), None, None, rich.get_console())"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('ray' in sys.modules)", artifact], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ids, not text" not in done.stdout and "柴" in done.stdout and done.stdout.splitlines()[-1] == "False"
