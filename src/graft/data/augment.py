"""Stage `augment`: a few seeds become many rows by self-instruct (Wang et al. 2022, https://arxiv.org/abs/2212.10560).

Rounds: every class that is not full sends requests, each for a few rewrites of one row; accepted rewrites join the rows
that later rounds rewrite, until each class holds `rows_per_class`. A round's answers are read in request order, never in
arrival order, so the result does not depend on timing. Answers are in the ledger before they are parsed.
1,200 rows through the embedded endpoint cost about 15 s, most of it Ray starting actors.
"""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from typing import Any

from rich import get_console
from rich.progress import track

from graft.core.calls import parse_answer
from graft.core.errors import CredentialError, DataError
from graft.core.recipe import Recipe
from graft.core.rows import read_seeds, write_jsonl
from graft.core.stages import Job
from graft.data.api import Caller, check_credentials
from graft.data.cluster import ray_cluster
from graft.data.endpoint import embedded_endpoint
from graft.data.ledger import Ledger, request_key

ACTORS = 2
SYSTEM = "你是訓練資料的撰寫人，使用台灣的繁體中文。只輸出 JSON，不要解釋。"
INSTRUCTION = (
    "請把最後一行的對話改寫成 {n} 則新的對話：意圖要相同，說法、主題和語氣要不同。"
    "回答如果是 call(...)，改寫後也要是同一種呼叫，參數配合新的句子；回答如果是文字，改寫後也要是文字。\n"
    '輸出格式：{{"rewrites": [{{"user": "…", "assistant": "…"}}]}}\n{seed}'
)
Row = dict[str, Any]


def run(job: Job) -> None:
    """Write rows.jsonl (seeds and accepted rewrites), rejected.jsonl and requests.jsonl."""
    recipe, plan, console = job.recipe, job.plan, get_console()
    seeds = read_seeds(plan.beside(recipe.augment.seeds), recipe.task)
    base_url = plan.endpoint
    if base_url:
        check_credentials(base_url)
        console.print(f"augment: {recipe.augment.model} at {base_url}")
    else:
        console.print("augment: no OPENAI_BASE_URL or OPENAI_API_KEY: the embedded endpoint rewrites by grammar, it is no language model")
    with job.writing() as draft, nullcontext(base_url) if base_url else embedded_endpoint() as url, ray_cluster():
        ledger = Ledger(plan.home("data_shards") / "ledger.sqlite")
        try:
            loop = SelfInstruct(recipe, seeds)
            sent = 0
            while requests := loop.requests():
                new = [r for r in requests if ledger.get(r["key"]) is None]
                _ask(new, url, recipe, ledger, f"augment round {loop.round}")
                sent += len(new)
                loop.accept(requests, ledger)
                console.print(
                    f"augment: round {loop.round}: "
                    + ", ".join(f"{n}/{recipe.augment.rows_per_class} {c}" for c, n in loop.sizes().items())
                    + f", {sent} requests sent, {len(loop.rejected)} rewrites rejected"
                )
        finally:
            ledger.close()
        rows = loop.taken()
        write_jsonl(draft.path / "rows.jsonl", rows)
        write_jsonl(draft.path / "rejected.jsonl", loop.rejected)
        write_jsonl(draft.path / "requests.jsonl", loop.log)
        draft.counts.update(
            rows=loop.sizes(),
            seeds=len(seeds),
            rounds=loop.round,
            requests=len(loop.log),
            rejected=len(loop.rejected),
            endpoint=job.head["inputs"]["endpoint"],
        )
        draft.cost.update(prompt_tokens=loop.usage["prompt_tokens"], completion_tokens=loop.usage["completion_tokens"])


class SelfInstruct:
    """The loop's state: rows by class, which of them to rewrite next, what was refused."""

    def __init__(self, recipe: Recipe, seeds: list[Row]):
        self.recipe, self.round = recipe, 0
        self.rows: dict[str, list[Row]] = {"call": [], "text": []}
        self.rejected: list[Row] = []
        self.log: list[Row] = []
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0}
        self._seen: set[str] = set()
        self._asked: dict[str, int] = {}  # requests made of each row
        for seed in seeds:
            self.rows[seed["label"]].append(seed)
            self._seen.add(_normal(seed["messages"][-2]["content"]))

    def sizes(self) -> dict[str, int]:
        return {label: min(len(rows), self.recipe.augment.rows_per_class) for label, rows in self.rows.items()}

    def taken(self) -> list[Row]:
        return [row for rows in self.rows.values() for row in rows[: self.recipe.augment.rows_per_class]]

    def requests(self) -> list[Row]:
        """The next round's requests, empty when every class is full; DataError when the rounds are used up."""
        a = self.recipe.augment
        missing = {label: a.rows_per_class - len(rows) for label, rows in self.rows.items() if len(rows) < a.rows_per_class}
        if not missing:
            return []
        if self.round == a.max_rounds:
            raise DataError(
                f"augment: {missing} rows are still missing after {a.max_rounds} rounds, the rewrites repeat themselves: add seeds, lower augment.rows_per_class or raise augment.max_rounds"
            )
        self.round += 1
        requests = []
        for label, n in missing.items():
            calls = min(a.calls_per_round // len(missing) or 1, math.ceil(n / a.rewrites_per_call))
            requests += [self._request(row, sample) for row, sample in self._parents(label, calls)]
        return requests

    def _parents(self, label: str, calls: int) -> list[tuple[Row, int]]:
        """(row to rewrite, how often it was asked before): families in turn, the smallest first, in a family the least asked row."""
        families: dict[str, list[Row]] = {}
        for row in self.rows[label]:
            families.setdefault(row["family"], []).append(row)
        weight = {f: len(rows) for f, rows in families.items()}
        chosen = []
        for _ in range(calls):
            family = min(weight, key=lambda f: (weight[f], f))
            row = min(families[family], key=lambda r: self._asked.get(r["id"], 0))
            sample = self._asked.get(row["id"], 0)
            self._asked[row["id"]] = sample + 1
            weight[family] += self.recipe.augment.rewrites_per_call
            chosen.append((row, sample))
        return chosen

    def _request(self, row: Row, sample: int) -> Row:
        a = self.recipe.augment
        seed = json.dumps({"user": row["messages"][-2]["content"], "assistant": row["messages"][-1]["content"]}, ensure_ascii=False)
        body = {
            "model": a.model,
            "temperature": a.temperature,
            "seed": self.recipe.seed * 1_000_000 + sample,  # another answer to the same words
            "response_format": {"type": "json_object"},
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": INSTRUCTION.format(n=a.rewrites_per_call, seed=seed)}],
        }
        return {"key": request_key(body), "body": json.dumps(body, ensure_ascii=False), "parent": row}

    def accept(self, requests: list[Row], ledger: Ledger) -> None:
        """Read the round's answers in request order; every rewrite is accepted or rejected with a reason."""
        for request in requests:
            answer = ledger.get(request["key"])
            assert answer is not None, "every request of the round was answered"
            for k in self.usage:
                self.usage[k] += (answer.get("usage") or {}).get(k) or 0
            rewrites, reason = _rewrites(answer)
            before = len(self.rows[request["parent"]["label"]])
            for n, rewrite in enumerate(rewrites):
                self._judge(rewrite, f"{request['key'][:12]}-{n}", request)
            if reason:
                self.rejected.append({"request": request["key"], "reason": reason})
            accepted = len(self.rows[request["parent"]["label"]]) - before
            self.log.append({"request": request["key"], "parent": request["parent"]["id"], "round": self.round, "accepted": accepted})

    def _judge(self, rewrite: Any, row_id: str, request: Row) -> None:
        parent = request["parent"]
        user, assistant = (rewrite.get(k) if isinstance(rewrite, dict) else None for k in ("user", "assistant"))
        reason = None
        if not (isinstance(user, str) and user.strip() and isinstance(assistant, str) and assistant.strip()):
            reason = "user or assistant is missing or empty"
        else:
            user, assistant = user.strip(), assistant.strip()
            task, limits = self.recipe.task, self.recipe.prepare
            kind = parse_answer(assistant, task.function, task.argument).kind
            if kind != parent["label"]:
                reason = f"the answer is {kind}, its seed's is {parent['label']}"
            elif not limits.min_chars <= len(user) + len(assistant) <= limits.max_chars:
                reason = "too short or too long"
            elif _normal(user) in self._seen:
                reason = "repeats an accepted row"
        if reason:
            self.rejected.append({"id": row_id, "request": request["key"], "reason": reason, "user": user, "assistant": assistant})
            return
        assert isinstance(user, str)
        self._seen.add(_normal(user))
        messages = [*parent["messages"][:-2], {"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        self.rows[parent["label"]].append(
            {
                "id": row_id,
                "messages": messages,
                "label": parent["label"],
                "family": parent["family"],
                "parent": parent["id"],
                "request": request["key"],
            }
        )


def _ask(requests: list[Row], url: str, recipe: Recipe, ledger: Ledger, title: str) -> None:
    """Send the requests through Ray Data and journal each answer as it comes; CredentialError or DataError ends the stage."""
    if not requests:
        return
    import ray

    a = recipe.augment
    unique = {r["key"]: {"key": r["key"], "body": r["body"]} for r in requests}
    answers = ray.data.from_items(list(unique.values()), override_num_blocks=min(ACTORS, len(unique))).map_batches(
        Caller, fn_constructor_args=(url, a.timeout_s), batch_size=a.in_flight, concurrency=min(ACTORS, len(unique)), num_cpus=0.5
    )
    failed = None
    for row in track(answers.iter_rows(), title, total=len(unique), transient=True):
        if row["error"]:
            failed = failed or row["error"]
        else:
            ledger.put(row["key"], row["body"], row["response"])
    if failed:
        kind = CredentialError if failed.startswith(("401", "403")) else DataError
        raise kind(f"augment: the API refused: {failed}; answers received so far are kept in {recipe.name}'s ledger, run again to go on")


def _rewrites(answer: dict[str, Any]) -> tuple[list[Any], str | None]:
    """(rewrites, None) of a raw response, or ([], why there are none)."""
    try:
        choice = answer["choices"][0]
        if choice.get("finish_reason") not in ("stop", None):
            return [], f"the answer ended by {choice['finish_reason']}"
        found = json.loads(choice["message"]["content"])["rewrites"]
    except (KeyError, IndexError, TypeError, ValueError) as e:
        return [], f"the answer cannot be read: {e!r}"[:200]
    return (found, None) if isinstance(found, list) else ([], "rewrites is no list")


def _normal(text: str) -> str:
    return "".join(text.split()).casefold()
