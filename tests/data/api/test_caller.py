"""What the caller makes of a server's refusal, and of a server that repeats the key."""

import pytest

from graft.data.api.caller import _is_completion, _redacted, _refusal


@pytest.mark.parametrize(
    ("status", "code", "outcome", "state", "kind"),
    [
        (429, "rate_limit_exceeded", "throttled", "free", None),
        (429, "insufficient_quota", "fatal", "free", "credential"),
        (401, "invalid_api_key", "fatal", "free", "credential"),
        (403, "", "fatal", "free", "credential"),
        (404, "model_not_found", "fatal", "free", "data"),
        (400, "400", "refused", "free", None),  # some servers repeat the status as a number
        (500, "", "server", "free", None),
        (504, "", "server", "lost", None),
    ],
)
def test_a_refusal_says_what_comes_next_and_whether_it_may_be_billed(status, code, outcome, state, kind):
    found = _refusal(status, code, "made\nto fail")
    assert (found["outcome"], found["state"], found.get("kind")) == (outcome, state, kind)
    assert "made to fail" in found["reason"] and str(status) in found["reason"] and "\n" not in found["reason"]


@pytest.mark.parametrize(
    ("body", "is_one"),
    [
        ('{"choices": []}', True),
        (' \n{"id": 1, "choices": [{"mess', True),  # cut off: it was made, and paid
        ("<html><body>choices</body></html>", False),
        ('{"error": {"code": 502, "message": "upstream"}}', False),
        ('["choices"]', False),
        ("", False),
    ],
)
def test_a_gateways_page_is_no_completion(body, is_one):
    assert _is_completion(body) == is_one


def test_a_key_is_cut_out_before_the_message_is_cut_short(monkeypatch):
    key = "sk-proj-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    for at in range(150, 230):
        reason = _refusal(401, key, "x" * at + key + " is wrong")["reason"]
        assert "sk-proj" not in reason and len(reason) <= 300


def test_a_stand_in_for_a_key_is_no_secret(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    assert _redacted("none of these") == "none of these"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert _redacted("any") == "any"
