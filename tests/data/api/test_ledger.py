"""The file itself: groups are whole or not at all, an old writer is fenced off, a network's file system gets no WAL."""

import sqlite3

import pytest

from graft.core.errors import ArtifactError
from graft.data.api import ledger as ledger_module
from graft.data.api.ledger import Attempt, LeaseLost, Ledger, Settled, on_network


def attempt(ledger, key, usd=0.5):
    return Attempt(ledger.next_id(), key, "recipe", "host:1:2", usd, 100)


def test_answers_and_spending_survive_a_reopening(tmp_path):
    ledger = Ledger(tmp_path / "deep/ledger.sqlite")
    a, b, c, d = (attempt(ledger, k) for k in "abcd")
    ledger.commit([a, b, c, d], [])
    ledger.commit([], [Settled(a.id, "a", "paid", 0.1, 40, "{}", '{"x": 1}'), Settled(b.id, "b", "free", 0, 0), Settled(c.id, "c", "lost", 0.5, 100)])
    ledger.close()
    again = Ledger(tmp_path / "deep/ledger.sqlite")
    assert again.answers(["a", "b"]) == {"a": '{"x": 1}'} and again.known(["a", "z"]) == {"a"} and len(again) == 1
    spend = again.spend()["recipe"]
    assert (spend.usd, spend.tokens, spend.lost_usd, spend.lost, spend.paid) == (0.6, 140, 0.5, 1, 1)
    assert again.open_attempts() == [d] and again.next_id() > d.id
    assert again.usage("recipe") == [("{}", '{"x": 1}')]


def test_an_older_writer_cannot_commit(tmp_path):
    old = Ledger(tmp_path / "ledger.sqlite")
    new = Ledger(tmp_path / "ledger.sqlite")
    with pytest.raises(LeaseLost):
        old.commit([attempt(old, "a")], [])
    new.commit([attempt(new, "b")], [])
    assert [a.key for a in new.open_attempts()] == ["b"]


def test_a_group_is_whole_or_not_at_all(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    twice = attempt(ledger, "a")
    with pytest.raises(sqlite3.IntegrityError):
        ledger.commit([twice, twice], [])
    assert ledger.open_attempts() == []


def test_thousands_of_keys_in_one_question(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    made = [attempt(ledger, f"k{i}") for i in range(1200)]
    ledger.commit(made, [Settled(a.id, a.key, "paid", 0, 0, "{}", "{}") for a in made])
    assert len(ledger.answers([a.key for a in made])) == 1200


def test_a_file_that_is_no_ledger_is_one_line(tmp_path):
    (tmp_path / "ledger.sqlite").write_text("no database" * 100)
    with pytest.raises(ArtifactError, match=r"ledger\.sqlite"):
        Ledger(tmp_path / "ledger.sqlite")


def test_no_wal_on_a_network(tmp_path, monkeypatch):
    assert not on_network(tmp_path)
    assert on_network(tmp_path / "missing") is False
    monkeypatch.setattr(ledger_module, "on_network", lambda path: True)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert ledger.db.execute("PRAGMA journal_mode").fetchone() == ("truncate",)
    ledger.commit([attempt(ledger, "a")], [])
    assert not (tmp_path / "ledger.sqlite-wal").exists() and len(ledger.open_attempts()) == 1
