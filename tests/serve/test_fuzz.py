"""The API, asked by its own OpenAPI document with what fits it and what does not: no 500, and every error in OpenAI's shape."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from graft.serve.openapi import document

EXAMPLES, MANY = 100, 1500  # of each route and mode; in the campaign
OPERATIONS = {found.ok().label: found.ok() for found in schemathesis.openapi.from_dict(document()).get_all_operations()}
MODES = {"fits": GenerationMode.POSITIVE, "does not fit": GenerationMode.NEGATIVE}


@pytest.fixture(scope="module")
def url(listening):
    with listening(max_batch=8, deadline_s=20.0) as url:
        yield url


def meet(case, url, seen):
    """A model that exists, half of the time: else little would come behind the first check."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str) and len(case.body["model"]) % 2:
        case.body["model"] = f"a{len(case.body['model']) % 8}"
    reply = case.call(base_url=url)
    seen[reply.status_code] += 1
    assert reply.status_code < 500 or reply.status_code == 503, reply.text
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    if reply.status_code in (429, 503):
        assert "retry-after" in reply.headers


@pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(MANY, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_request_is_an_error_of_the_server(url, operation, mode, examples):
    seen = Counter()

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(OPERATIONS[operation].as_strategy(generation_mode=MODES[mode]))
    def ask(case):
        meet(case, url, seen)

    try:
        ask()
    except Unsatisfiable:
        pytest.skip("the route takes nothing that could be wrong")
    print(f"{operation}, {mode}: {dict(seen)}")
    assert seen
