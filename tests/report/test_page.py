import json
import re
from html.parser import HTMLParser

import pytest

from graft.cli import main
from graft.core.errors import ConfigError
from graft.report.gather import gather
from graft.report.page import page, write
from graft.report.scrub import clean, cut, secrets_of

from .made import SHIBA, make, metrics, plan_in, predictions

VOID = {"meta", "link", "br", "img", "rect", "path", "circle"}  # the SVG ones close themselves
HOSTILE = "</script><img onerror=alert(1) src=x>\"'&<b>"


class Strict(HTMLParser):
    """Every element is closed by its own end tag, ids are there once, and the text is kept."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.links, self.text, self.tags, self.attributes, self.images = [], [], [], "", set(), set(), []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        found = dict(attrs)
        assert len(found) == len(attrs), f"an attribute twice in {tag}"
        self.ids += [found["id"]] if "id" in found else []
        self.images += [found] if tag == "img" else []
        self.links += [found[name] for name in ("href", "src") if name in found]
        if tag not in VOID or (tag in ("rect", "path", "circle") and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.text += data


def parsed(text):
    found = Strict(text)
    assert len(set(found.ids)) == len(found.ids)
    assert not {"script", "iframe", "object", "form"} & found.tags and not any(name.startswith("on") or name == "style" for name in found.attributes)
    assert all(link.startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,")) or link == "data:," for link in found.links), (
        "nothing from elsewhere"
    )
    assert all(set(image) == {"src", "alt", "width", "height"} and image["alt"] for image in found.images)
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    return found


def test_the_page_is_whole_well_formed_and_alone(tmp_path):
    text = page(gather(make(plan_in(tmp_path))))
    found = parsed(text)
    assert {"head", "lineage", "data", "training", "cost", "evaluation"} == set(found.ids)
    for said in (
        "F1 0.725 on 23 held-out rows",
        "API ledger",
        "98,765",
        "contaminated",
        "Learning rate",
        "MFU",
        "10.50 GPU hours",
        "Confusion matrix",
        SHIBA,
        "wanted of 12",
    ):
        assert said in found.text, said
    assert "default-src 'none'" in text and "url(" not in text and "@import" not in text


@pytest.mark.parametrize("until", ["augment", "prepare", "shard-sft", "base", "merge", "sft", "evaluate"])
def test_the_page_of_an_incomplete_run_says_so(tmp_path, until):
    plan = make(plan_in(tmp_path), until)
    found = parsed(page(gather(plan)))
    order = list(plan.stages)
    assert f"{order.index(until) + 1} of {len(order)} stages are complete" in found.text and ("waits" in found.text or until == "evaluate")
    assert ("Not complete" in found.text) == (until != "evaluate")


def test_an_evaluation_of_tasks_alone_speaks_of_no_rows(tmp_path):
    plan = make(plan_in(tmp_path), "sft")
    with plan.resolve("evaluate").writing() as draft:
        (draft.path / "metrics.json").write_text(json.dumps({"tasks": {"exam": {"systems": {"adapter": {"rougeL": {"mean": 0.25}}}}}}))
    found = parsed(page(gather(plan)))
    assert "Task exam" in found.text and "0.250" in found.text and "Worst predictions" not in found.text and "answered wrong" not in found.text


def test_what_comes_from_data_is_text(tmp_path):
    rows = [{**p, "user": HOSTILE, "answer": HOSTILE, "reason": HOSTILE, "family": HOSTILE, "id": HOSTILE + p["id"]} for p in predictions()]
    lines = [{**m, "skipped": HOSTILE} if m["step"] == 3 else m for m in metrics(20)]
    plan = make(plan_in(tmp_path), predictions=rows, metrics=lines)
    text = page(gather(plan))
    found = parsed(text)  # has no script
    assert found.text.count(HOSTILE) > 40 and "<img" not in text


@pytest.mark.parametrize("bad", ["lone \ud800 surrogate", "null \x00 and \x1b[31m", "‮gpj.exe", "\ufeff", "\x85\x9b"])
def test_text_that_is_no_text_is_written_nonetheless(tmp_path, bad):
    rows = [{**p, "user": bad, "answer": bad} for p in predictions()]
    path = write(make(plan_in(tmp_path), predictions=rows))
    found = parsed(path.read_text(encoding="utf-8"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", found.text)


def test_no_secret_of_the_environment_or_of_a_url_is_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "planted-key-<&>-1")
    monkeypatch.setenv("GRAFT_ADMIN_KEY", "planted-admin-2,planted-admin-3")
    monkeypatch.setenv("OPENAI_BASE_URL", "https://someone:planted-password-4@api.example.com/v1")
    leaks = [
        "planted-key-<&>-1", "planted-admin-2", "planted-admin-3", "planted-password-4", "postgres://u:planted-5@db/x",
        "sk-proj-planted6planted6planted6", "hf_planted7planted7planted7", "Authorization: Bearer planted8.planted8",
    ]  # fmt: skip
    rows = [{**p, "user": "; ".join(leaks), "answer": leaks[0] * 9, "reason": leaks[1]} for p in predictions()]
    plan = make(plan_in(tmp_path), predictions=rows)
    artifact = plan.resolve("augment").artifact
    manifest = artifact.manifest | {"inputs": {"endpoint": "https://someone:planted-password-4@api.example.com/v1"}}
    manifest["keys"] = {"api": {"base_url": "https://u:planted-9@api.example.com/v1"}}
    manifest["counts"] |= {"endpoint": "https://u:planted-9@api.example.com/v1"}
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))
    text = write(plan).read_text(encoding="utf-8")
    assert "planted" not in text and "[hidden]@api.example.com" in text
    assert "someone" not in text and "api.example.com/v1" in text


def test_innocent_words_are_not_hidden():
    secrets = secrets_of(
        {"TOKENIZERS_PARALLELISM": "parallel", "KEYBOARD": "layout", "HOME": "/home/someone", "API_KEY": "none", "X_TOKEN": "s3cr3t"}
    )
    assert secrets == ["s3cr3t"]
    assert (
        clean("ask someone at a@b.example, http://host/path?x=a@b and sk-1", secrets) == "ask someone at a@b.example, http://host/path?x=a@b and sk-1"
    )


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("柴犬在海邊", "柴犬在…"), ("abc", "abc"), ("cafe\u0301s", "caf…"), ("ab\U0001f469\u200d\U0001f467x", "ab…"), ("a\U0001f44d\U0001f3fdbcd", "a\U0001f44d\U0001f3fd…"),
        ("ab\U0001f1f9\U0001f1fc", "ab…"), ("a\U0001f1f9\U0001f1fcb", "a\U0001f1f9\U0001f1fc…"), ("ab葛\U000e0100飾", "ab…"), ("ab\u1100\u1161\u11a8", "ab…"),
    ],
)  # fmt: skip
def test_no_character_is_cut(text, kept):
    assert cut(text, 3) == kept


def test_a_long_prompt_is_cut_and_stays_chinese(tmp_path):
    rows = [{**p, "user": "畫柴犬🇹🇼" * 5000} for p in predictions()]
    text = page(gather(make(plan_in(tmp_path), predictions=rows)))
    assert "\ufffd" not in text and "🇹🇼…" in text and len(text.encode()) < 1_000_000


def test_100_000_steps_are_less_than_half_a_megabyte(tmp_path):  # so are those of three stages, which share the rest of the page
    path = write(make(plan_in(tmp_path), metrics={"sft": list(metrics(100_000, resumed_at=50_000, left_out=70_001))}))
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 500_000 and "step 70001 was left out" in text
    parsed(text)


# ---- the command ------------------------------------------------------------------------------------------------------
def test_the_command_writes_beside_the_checkpoints_or_where_it_is_told(tmp_path, capsys, monkeypatch):
    make(plan_in(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["report", "made.toml"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "checkpoints/made/report.html")
    (tmp_path / "there.html").write_text("old")
    assert main(["report", str(tmp_path / "made.toml"), "--workspace", str(tmp_path), "--out", "there.html"]) == 0
    assert "F1 0.725" in (tmp_path / "there.html").read_text() and not list(tmp_path.glob(".there*"))
    assert main(["report", "made.toml", "--set", "sft.lr=1e-3"]) == 0
    assert "Not complete: sft is missing" in (tmp_path / "checkpoints/made/report.html").read_text()


def test_refusals_are_one_line(tmp_path, capsys, monkeypatch):
    plan = plan_in(tmp_path)
    monkeypatch.chdir(tmp_path)

    def refused(*arguments):
        assert main(["report", "made.toml", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("graft: ") and err.count("\n") == 1
        return err

    assert "'made' was never run" in refused() and not (tmp_path / "checkpoints").exists()
    make(plan, "augment")
    assert "is a folder" in refused("--out", str(tmp_path))
    assert "cannot be written" in refused("--out", "no/such/folder/report.html")
    assert "sft.lr" in refused("--set", "sft.lrr=1")


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    plan = make(plan_in(tmp_path), "augment")
    path = write(plan)
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ConfigError, match="cannot be written"):
        write(plan)
    assert path.read_text() == before and [p.name for p in path.parent.glob("*report*")] == ["report.html"]
