"""vLLM behind the engine's protocol, on a GPU: `pytest tests/engine/test_vllm.py` where vLLM is installed; some two minutes, most of it vLLM's start."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from tiny_model import MAX_LENGTH, build

pytest.importorskip("vllm")
if not torch.cuda.is_available():
    pytest.skip("vLLM needs a GPU", allow_module_level=True)

from graft.core.errors import ArtifactError, ConfigError, DataError, ServeError
from graft.engine.hf import HFEngine
from graft.engine.protocol import Request, Scored, SlotsBusy
from graft.engine.vllm import VLLMEngine
from graft.model.chat import load_tokenizer, render_prompt

WIDE = {"hidden_size": 256, "intermediate_size": 512, "heads": 4}  # vLLM's kernels want heads of 32 or more
NEAR_NATS = 0.15  # two tokens whose logprobs are this close are a tie in bf16
KV_TOKENS = 64 * MAX_LENGTH
PROMPTS = ["Draw", "What is the weather like today?", "幫我畫一隻在海邊散步的柴犬", "a" * 60, "sea", "今天", "me", "walking by the sea"]
CHILD = """
import sys, time
from graft.engine.vllm import VLLMEngine
from graft.model.chat import load_tokenizer
import multiprocessing
if __name__ == "__main__":
    VLLMEngine(sys.argv[1], None, "bf16", load_tokenizer(sys.argv[1]), max_batch=2, max_adapters=0, kv_tokens=4096)
    print("@", *[c.pid for c in multiprocessing.active_children()], flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wide"), **WIDE)


@pytest.fixture(scope="module")
def peer(wide):
    base, adapters = wide
    return HFEngine(str(base), None, "bf16", adapters, load_tokenizer(str(base)))


@pytest.fixture(scope="module")
def engine(wide):
    base, adapters = wide
    found = VLLMEngine(str(base), None, "bf16", load_tokenizer(str(base)), max_batch=13, max_adapters=3, max_rank=16, kv_tokens=KV_TOKENS)
    for name, folder in adapters.items():
        assert found.load(name, folder) is None
    yield found
    found.close()


def prompt_of(engine, text):
    return render_prompt(engine.tokenizer, [{"role": "user", "content": text}])


@pytest.fixture(scope="module")
def mixed(engine):
    """Base and both adapters, greedy and sampled: more rows than one batch holds."""
    return [
        Request(prompt_of(engine, text), 6 + 3 * i, temperature=t, top_p=0.95, seed=i, adapter=a)
        for i, text in enumerate(PROMPTS)
        for a, t in ((None, 0.0), ("one", 0.0), ("two", 0.0), ("two", 1.3))
    ]


def parting(peer, request, ours, theirs):
    """How much likelier, in nats, one answer's first other token is than the other's."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        return 0.0
    gap = [peer.score([*request.prompt_ids, *ours[:at], token], len(request.prompt_ids) + at, request.adapter)[0] for token in (ours[at], theirs[at])]
    return abs(gap[0] - gap[1])


@pytest.mark.parametrize("name", [None, "one", "two"])
def test_scores_are_those_of_the_other_engine(engine, peer, name):
    for text in PROMPTS:
        ids = [*prompt_of(engine, text), *engine.tokenizer("walking by the sea today", add_special_tokens=False)["input_ids"]]
        ours, theirs = (e.score(ids, 4, name) for e in (engine, peer))
        assert len(ours) == len(ids) - 4 and max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < NEAR_NATS


def test_scores_of_many_are_those_of_each_alone(engine):
    asked = [Scored(prompt_of(engine, text), 1 + n) for n, text in enumerate(PROMPTS)]
    for (ids, first, _), own in zip(asked, engine.scores(asked, "two"), strict=True):
        assert max(abs(a - b) for a, b in zip(own, engine.score(ids, first, "two"), strict=True)) < NEAR_NATS


def test_an_adapter_is_applied(engine):
    ids = prompt_of(engine, "sea")
    base, one, two = (engine.score(ids, 4, name) for name in (None, "one", "two"))
    assert all(max(abs(a - b) for a, b in zip(base, own, strict=True)) > 0.3 for own in (one, two))


def test_greedy_rows_part_from_the_other_engines_at_near_ties_alone(engine, peer, mixed):
    greedy = [replace(r, ends=()) for r in mixed if not r.temperature]
    ours, theirs = engine.generate(greedy), peer.generate(greedy)
    assert max(parting(peer, r, a.token_ids, b.token_ids) for r, a, b in zip(greedy, ours, theirs, strict=True)) < NEAR_NATS


def test_a_mixed_batch_parts_from_each_row_alone_at_near_ties_alone(engine, peer, mixed):
    greedy = [r for r in mixed if not r.temperature]
    together = engine.generate(greedy)
    for request, own in zip(greedy, together, strict=True):
        alone = engine.generate([request])[0]
        assert parting(peer, request, own.token_ids, alone.token_ids) < NEAR_NATS
    assert {c.finish_reason for c in together} == {"stop", "length"}


def test_sampling_follows_the_seed(engine):
    request = Request([5, 6, 7, 8, 9], 20, temperature=1.5)  # shorter than a block: vLLM computes a prompt that it has seen otherwise than a new one
    first, again, other = (engine.generate([replace(request, seed=s)])[0].token_ids for s in (1, 1, -2))
    assert first == again != other
    assert engine.generate([replace(request, top_p=1e-6)])[0].token_ids == engine.generate([replace(request, temperature=0.0)])[0].token_ids


def test_what_is_read_whole_is_what_is_streamed(engine, mixed):
    for request in mixed:
        streamed, whole = engine.generate([request])[0], engine.generate([replace(request, whole=True)])[0]
        assert streamed == whole
        assert whole.text == engine.tokenizer.decode(whole.token_ids, skip_special_tokens=True).rstrip("\ufffd")


def test_the_turn_ends_at_an_end_token_and_at_a_stop_text(engine):
    request = Request(prompt_of(engine, "sea"), 30, temperature=1.0, seed=4, ends=())
    for whole in (False, True):
        told = engine.generate([replace(request, whole=whole)])[0]
        end = told.token_ids[7]
        cut = engine.generate([replace(request, whole=whole, ends=(end,))])[0]
        assert (cut.token_ids, cut.finish_reason) == (told.token_ids[: told.token_ids.index(end)], "stop")
        stop = told.text[5:7]
        stopped = engine.generate([replace(request, whole=whole, stop=("never there", stop))])[0]
        assert (stopped.text, stopped.finish_reason) == (told.text[: told.text.index(stop)], "stop")
        assert stopped.completion_tokens < told.completion_tokens


def test_logprobs_are_those_of_the_model(engine, peer):
    request = Request(prompt_of(engine, "today"), 8, ends=(), adapter="two", logprobs=3)
    for whole in (False, True):
        chunks = [c for burst in engine.stream([replace(request, whole=whole)]) for c in burst]
        tokens, told = [t for c in chunks for t in c.tokens], [t for c in chunks for t in c.told]
        wanted = peer.score([*request.prompt_ids, *tokens], len(request.prompt_ids), "two")
        for token, of, logprob in zip(tokens, told, wanted, strict=True):
            assert abs(of.logprob - logprob) < NEAR_NATS
            assert len(of.top) == 3 and of.top[0] == (token, of.logprob) and of.top[0][1] >= of.top[1][1] >= of.top[2][1]


def test_adapters_come_and_go_while_rows_run(engine, wide):
    _, adapters = wide
    prompt, found = prompt_of(engine, "sea"), {}
    wanted = {name: engine.generate([Request(prompt, 40, adapter=name, ends=())])[0].token_ids for name in (None, "one", "two")}

    def add(key, adapter):
        found[engine.add(Request(prompt, 40, adapter=adapter, ends=()))] = (key, [])

    def step():
        for chunk in engine.step():
            found[chunk.row][1].extend(chunk.tokens)

    assert engine.load("a", adapters["one"]) is None
    for name in (None, "one", "two", "a"):
        add(name, name)
    step()
    with pytest.raises(SlotsBusy, match="all 3 adapters"):
        engine.load("c", adapters["one"])
    engine.unload("a")  # goes on to its end
    with pytest.raises(DataError, match="'a'"):
        engine.add(Request(prompt, 4, adapter="a"))
    with pytest.raises(SlotsBusy):
        engine.load("c", adapters["one"])
    while engine.busy:
        step()
    assert [len(tokens) for _, tokens in found.values()] == [40] * 4
    assert engine.load("c", adapters["two"]) is None and engine.load("d", adapters["one"]) == "one"
    assert engine.adapters == ["two", "c", "d"]
    assert engine.generate([Request(prompt, 40, adapter="d", ends=())])[0].token_ids == wanted["one"], "nothing of the one before is left"
    assert engine.load("one", adapters["one"]) == "two" and engine.load("two", adapters["two"]) == "c"
    engine.unload("d")


def test_a_dropped_row_leaves_and_the_others_do_not_notice(engine):
    requests = [Request(prompt_of(engine, "sea"), 30, ends=()), Request(prompt_of(engine, "sea"), 30, adapter="two", ends=())]
    seen = [[], []]
    for chunks in engine.stream(requests, dropped=lambda row: row == 0 and len(seen[0]) >= 3):
        for chunk in chunks:
            seen[chunk.row].extend(chunk.tokens)
    assert 3 <= len(seen[0]) < 30 and len(seen[1]) == 30


def test_rows_under_way_go_on_while_a_prompt_is_scored(engine):
    number, tokens = engine.add(Request(prompt_of(engine, "sea"), 40, ends=())), []
    assert len(engine.score(prompt_of(engine, "Draw"), 2, "one")) == len(prompt_of(engine, "Draw")) - 2
    while engine.busy:
        tokens += [t for c in engine.step() if c.row == number for t in c.tokens]
    assert len(tokens) == 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter": "three"}, "'three'"),
        ({"prompt_ids": []}, "0 prompt tokens"),
        ({"max_new_tokens": MAX_LENGTH}, f"the model holds {MAX_LENGTH}"),
    ],
)
def test_a_request_that_cannot_run_is_named(engine, change, words):
    with pytest.raises(DataError, match=words):
        engine.generate([Request([1], 4), replace(Request([1], 4), **change)])


def test_what_vllm_itself_refuses_is_named_and_leaves_nothing_behind(engine):
    with pytest.raises(DataError, match="not taken by vLLM"):
        engine.add(Request([5, 6], 4, adapter="two", logprobs=10_000))
    assert not engine.busy and engine.load("c", engine._adapters["two"].folder) is None
    engine.unload("c")


def test_an_adapter_that_does_not_fit_is_refused(engine, wide, tmp_path):
    _, adapters = wide
    before = engine.adapters
    for name, change in (("rank", {"r": 32}), ("dora", {"use_dora": True})):
        shutil.copytree(adapters["one"], tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(ArtifactError):
            engine.load(name, tmp_path / name)
    from safetensors.torch import load_file, save_file

    shutil.copytree(adapters["one"], tmp_path / "names")
    file = tmp_path / "names" / "adapter_model.safetensors"
    save_file({key.replace("q_proj", "w_proj"): tensor for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ArtifactError, match="w_proj"):
        engine.load("names", tmp_path / "names")
    assert engine.adapters == before


def test_a_base_in_nf4_is_left_to_the_other_engine(wide):
    with pytest.raises(ConfigError, match="nf4"):
        VLLMEngine(str(wide[0]), None, "nf4", load_tokenizer(str(wide[0])))


def test_its_process_goes_with_the_one_that_started_it(wide, tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    log = tmp_path / "child.log"
    with log.open("w") as out, subprocess.Popen([sys.executable, str(tmp_path / "child.py"), str(wide[0])], stdout=out, stderr=out) as child:
        deadline = time.monotonic() + 120
        while not (told := re.search(r"^@(.*)\n", log.read_text(), re.MULTILINE)) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        pids = list(map(int, told[1].split())) if told else []
        lived = bool(pids) and all(map(alive, pids))
        child.kill()
    assert lived, log.read_text()[-3000:]
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, pids))


def test_a_core_that_dies_is_said(wide):
    import multiprocessing

    base = str(wide[0])
    before = set(multiprocessing.active_children())
    engine = VLLMEngine(base, None, "bf16", load_tokenizer(base), max_batch=2, max_adapters=0, kv_tokens=4096)
    (core,) = set(multiprocessing.active_children()) - before
    engine.add(Request([5, 6, 7], MAX_LENGTH - 3, ends=()))
    os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(ServeError, match="vLLM's process has ended"):
        while True:
            engine.step()
    engine.close()


def test_a_core_that_dies_while_nothing_runs_is_said_too(wide):
    import multiprocessing

    base = str(wide[0])
    before = set(multiprocessing.active_children())
    engine = VLLMEngine(base, None, "bf16", load_tokenizer(base), max_batch=2, max_adapters=0, kv_tokens=4096)
    (core,) = set(multiprocessing.active_children()) - before
    assert engine.step() == []
    os.kill(core.pid, signal.SIGKILL)
    with pytest.raises(ServeError, match="vLLM's process has ended"):
        for _ in range(600):
            engine.step()
            time.sleep(0.05)
    engine.close()


def alive(pid):
    try:
        return "Z" not in open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
