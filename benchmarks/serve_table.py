"""The tables of benchmarks/serve.py: runs of one part after another, to Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

ENGINE, PEFT, BARE = "HFEngine", "PEFT adapter_names", "engine"
APP, VLLM = "graft serve over VLLMEngine", "vllm serve"
GOALS = {"from disk": 150, "from RAM": 20}  # ms, of a load into the engine


def mixed(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Tokens/s are generated ones over the whole run, prompts included; a ratio is to PEFT's median."""
    found = [["mixed batch", "tokens/s", "min–max", "runs", "to PEFT", "rows that agree with PEFT's", "tokens before a row's first other one"]]
    pace = {of: [r["tokens_per_s"] for r in its] for of, its in _by(runs, "of").items()}
    for of, its in _by(runs, "of").items():
        ratio = f"{median(pace[of]) / median(pace[PEFT]):.2f}" if PEFT in pace else ""
        alike = [f"{median(r[key] for r in its):.1%}" if key in its[0] else "" for key in ("rows_alike", "tokens_alike")]
        found.append([of, f"{median(pace[of]):,.1f}", f"{min(pace[of]):,.1f}–{max(pace[of]):,.1f}", f"{len(its)}", ratio, *alike])
    return found


def ttft(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Medians over runs of each run's p50 and p95; what is added is the difference of the medians."""
    found = [["time to first text", "concurrent", "p50", "p95", "added to p50", "of it", "tokens/s", "requests", "runs"]]
    for concurrent, of_all in _by(runs, "concurrent").items():
        base = median(r["p50_ms"] for r in of_all if r["of"] == BARE) if any(r["of"] == BARE for r in of_all) else None
        for of, its in _by(of_all, "of").items():
            p50, p95, pace = (median(r[key] for r in its) for key in ("p50_ms", "p95_ms", "tokens_per_s"))
            added = [f"{p50 - base:+.1f} ms", f"{p50 / base - 1:+.1%}"] if base and of != BARE else ["", ""]
            requests = str(sum(r["requests"] for r in its))
            found.append([of, str(concurrent), f"{p50:,.1f} ms", f"{p95:,.1f} ms", *added, f"{pace:,.1f}", requests, str(len(its))])
    return found


def hotload(runs: list[dict[str, Any]]) -> list[list[str]]:
    found = [["adapter load", "from", "median", "min–max", "runs", "goal", "longest pause between a row's tokens", "usual"]]
    for (of, source), its in _by(runs, "of", "source").items():
        took = [r["load_ms"] for r in its]
        goal = f"{GOALS[source]} ms" if of == "engine.load" else ""
        pauses = [f"{median(r[key] for r in its):,.1f} ms" if key in its[0] else "" for key in ("pause_ms", "step_ms")]
        found.append(
            [of, source.removeprefix("from "), f"{median(took):,.1f} ms", f"{min(took):,.1f}–{max(took):,.1f}", str(len(its)), goal, *pauses]
        )
    return found


def gate(runs: list[dict[str, Any]]) -> list[list[str]]:
    found = [["trained in", "served in", "effect in training", "here", "difference", "allowed", "gate"]]
    for r in runs:
        nats = [f"{r[key]:.4f}" for key in ("recorded_nats", "effect_nats", "difference_nats", "tolerance_nats")]
        found.append([r["trained_in"], f"{r['served_in']}, {r['of']}", *nats, "passed" if r["passed"] else "refused"])
    return found


def vllm(runs: list[dict[str, Any]]) -> list[list[str]]:
    """Output tokens/s from the first request sent to the last answer's end; a ratio is to vllm serve's median."""
    found = [["all at once", "answers", "output tokens/s", "min–max", "runs", "to vllm serve", "goal", "first byte", "its p50"]]
    pace = {key: [r["tokens_per_s"] for r in its] for key, its in _by(runs, "of", "stream").items()}
    for (of, stream), its in _by(runs, "of", "stream").items():
        own, peer = pace[of, stream], pace.get((VLLM, stream))
        ratio = [f"{median(own) / median(peer):.3f}", "0.9" if stream else "0.98"] if peer and of != VLLM else ["", ""]
        first = [f"{median(r[key] for r in its):,.0f} ms" for key in ("first_ms", "first_p50_ms")]
        how = "streamed" if stream else "whole"
        found.append([of, how, f"{median(own):,.0f}", f"{min(own):,.0f}–{max(own):,.0f}", str(len(own)), *ratio, *first])
    return found


def solo(runs: list[dict[str, Any]]) -> list[list[str]]:
    found = [
        [
            "each row alone against all mixed",
            "rows",
            "equal to the token",
            "tokens compared",
            "largest difference of a logprob",
            "largest gap where two texts part",
        ]
    ]
    for r in runs:
        gap = f"{r['gap_nats']:.4f} nats" if r["parted"] else "none parted"
        found.append([r["of"], str(r["rows"]), str(r["rows"] - r["parted"]), str(r["tokens"]), f"{r['difference_nats']:.4f} nats", gap])
    return found


PARTS = {"mixed": mixed, "solo": solo, "ttft": ttft, "hotload": hotload, "vllm": vllm, "gate": gate}
LEGEND = {
    "mixed": "Both greedy, the same prompts, adapters, batch size and number of new tokens; no answer ends before its length. PEFT's batches are sorted by prompt, as the engine does.",
    "solo": "Greedy. Tokens of a row are compared up to the first other one; there, the gap is between the logprobs of the two tokens, by the row alone.",
    "gate": "Adapters of the ordinary training path: of a random base by a few steps on random tokens, of one that has learned (--trained) by its whole task. Nats, root mean square over the canaries' targets.",
    "vllm": "The same adapters, rank, rows under way, bytes of keys and values and sampling; each server's process holds its own model on the one GPU, and idles while the other\n"
    "answers. Prompts of token ids to /v1/completions, none twice; one process of clients. The first burst of each kind is not counted.",
    "ttft": "From before a request is written, or handed to the engine's runner, to its first text. Clients of one process ask again after a random pause, connections kept; the first request of each\n"
    "is not counted. Clients share the machine's cores with the server, and the engine alone has its clients in its own process.",
    "hotload": "From disk: the adapter's pages were dropped from the page cache before, which is looked after. The gate: files hashed, conversations rendered, canaries scored twice.\n"
    "Beside a row: one row of the base generates meanwhile; its longest pause counts the unloading before, too, and its usual one is the median.",
}


def _by(runs: Iterable[dict[str, Any]], *keys: str) -> dict[Any, list[dict[str, Any]]]:
    found: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(tuple(run[k] for k in keys) if len(keys) > 1 else run[keys[0]], []).append(run)
    return found


def alike(calls: Iterable[dict[str, Any]]) -> None:
    """ValueError where calls are of other machines or shapes: no median goes over those."""
    if len(kinds := {f"{call['what']} on {call['device']}" for call in calls}) > 1:
        raise ValueError(f"no table joins {' and '.join(sorted(kinds))}")


def report(calls: list[dict[str, Any]]) -> str:
    """Markdown: an entry of RESULTS.md over all calls, a table for each part that ran."""
    alike(calls)
    runs = _by([run for call in calls for run in call["runs"]], "part")
    parts = []
    for part, its in runs.items():
        if done := [run for run in its if "failed" not in run]:
            head, *rows = (f"| {' | '.join(cells)} |" for cells in PARTS[part](done))
            parts.append("\n".join([head, "|---" * (head.count(" | ") + 1) + "|", *rows, "", LEGEND[part]]))
        failed = dict.fromkeys(f"{run['of']}: {run['failed']}" for run in its if "failed" in run)
        parts += [f"No figure of {part}, {why}" for why in failed]
    first = calls[0]
    about = (
        f"{first['device']}, {', '.join(f'{name} {version}' for name, version in first['versions'].items())}; the tree of commit `{first['commit']}`."
    )
    commands = "\n".join(f"    {call['command']}" for call in calls)
    return "\n\n".join([f"## Serving: {first['what']} ({first['date']})", about, commands, *parts]) + "\n"
