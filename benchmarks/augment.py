"""How fast requests go out: AsyncOpenAI as people write it, Ray's own HTTP stage and graft, side by side against one slow local server.

    python benchmarks/augment.py                          (about 8 minutes on two cores)
    python benchmarks/augment.py --memory --requests 100000

The server is the tests' fault-injecting endpoint without faults, a process of its own, 0.5 s an answer. Every client is
timed by one clock (CLOCK_MONOTONIC, the same in every process): from the first request that the server sees to the moment
the client has all answers parsed; `whole` adds the start of actors and connections. Best of --repeat, interleaved. Ray's
stage sends a batch's requests one after another, so it gets few requests and more actors would not change its kind.
Prints a Markdown table, writes JSON. `--memory` samples the driver and its actors twice a second over one long run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/data/api"))

from faulty import FaultyEndpoint  # noqa: E402

PACKAGES = ("openai", "aiohttp", "httpx2", "ray")
WORDS = "改寫這個句子，讓意思不變，說法要自然，每一則都不同。"


@dataclass(frozen=True)
class Result:
    client: str
    in_flight: int
    requests: int
    seconds: float  # first request seen to last answer parsed
    whole_s: float
    max_in_flight: int  # by the server's count

    @property
    def per_s(self) -> float:
        return self.requests / self.seconds


def bodies(count: int) -> Iterator[dict[str, Any]]:
    """Requests of the size that self-instruct sends, about 1.6 kB."""
    messages = [{"role": "system", "content": WORDS * 6}, {"role": "user", "content": WORDS * 14}]
    for n in range(count):
        yield {"model": "gpt-4o-mini", "messages": messages, "temperature": 1.0, "max_tokens": 1024, "seed": n}


@contextmanager
def timed(client: str, in_flight: int, requests: int, latency_s: float, found: list[Result]) -> Iterator[str]:
    """Time the block, which is given the base URL of a fresh server and must have all its answers when it ends."""
    with (
        tempfile.TemporaryDirectory() as folder,
        FaultyEndpoint(answers="canned", latency_s=latency_s, log=Path(folder, "log.jsonl")) as server,
    ):
        began_s = time.monotonic()
        yield server.base_url
        ended_s = time.monotonic()
        first, report = server.requests()[0], server.report(by_key=False)
    assert report["billed"] == requests, f"{client}: the server answered {report['billed']} of {requests} requests"
    found.append(Result(client, in_flight, requests, ended_s - first["monotonic_s"], ended_s - began_s, report["max_in_flight"]))


async def plain(base_url: str, in_flight: int, requests: int) -> None:
    """What people write: one client, a semaphore, gather."""
    from openai import AsyncOpenAI

    client, slots = AsyncOpenAI(base_url=base_url, api_key="none", timeout=600), asyncio.Semaphore(in_flight)

    async def one(body: dict[str, Any]) -> str:
        async with slots:
            return (await client.chat.completions.create(**body)).choices[0].message.content

    answers = await asyncio.gather(*(one(body) for body in bodies(requests)))
    assert len(answers) == requests and all(answers)


def run_plain(base_url: str, in_flight: int, requests: int) -> None:
    """In a fresh process: nothing of ours is loaded there."""
    subprocess.run([sys.executable, __file__, "--plain", base_url, str(in_flight), str(requests)], check=True)


def run_ray_stage(base_url: str, in_flight: int, requests: int) -> None:
    """Ray's own stage, one actor: it has no setting for requests in flight; a batch goes in sequence, four batches of a block at once."""
    import ray
    from ray.data.llm import HttpRequestProcessorConfig, build_processor

    config = HttpRequestProcessorConfig(url=f"{base_url}/chat/completions", batch_size=max(1, requests // 8), concurrency=1)
    process = build_processor(
        config,
        preprocess=lambda row: {"payload": json.loads(row["body"])},
        postprocess=lambda row: {"content": row["http_response"]["choices"][0]["message"]["content"]},
    )
    rows = process(ray.data.from_items([{"body": json.dumps(body)} for body in bodies(requests)], override_num_blocks=1)).take_all()
    assert len(rows) == requests and all(row["content"] for row in rows)


def run_graft(base_url: str, in_flight: int, requests: int, actors: int, ledger: bool) -> None:
    """Through a session, as `graft augment` asks; without a ledger the same actors send at once, and answers pass through Ray."""
    from graft.data.api.request import Request
    from graft.data.api.session import LEDGER, Session

    with tempfile.TemporaryDirectory() as folder, Session(_recipe(in_flight, actors), Path(folder, LEDGER), base_url) as session:
        if ledger:
            answers = [answer.response for answer in session.ask(Request(body) for body in bodies(requests))]
        else:
            answers = _without_ledger(session, requests)
        assert len(answers) == requests and all(a and a["choices"][0]["message"]["content"] for a in answers)


def _recipe(in_flight: int, actors: int) -> Any:
    from graft.core.recipe import Recipe

    api = {"in_flight": in_flight, "actors": actors, "timeout_s": 600.0}
    return Recipe.model_validate({"name": "benchmark", "api": api, "augment": {"seeds": "none.jsonl"}})


def _without_ledger(session: Any, requests: int) -> list[dict[str, Any]]:
    """The session's pipeline around its own actor class, with no claim before a request and nothing kept after it."""
    import math

    import ray

    from graft.data.api.caller import Caller, _content
    from graft.data.api.session import BLOCK

    class Unkept(Caller):
        async def _ask(self, broker: Any, row: dict[str, Any]) -> dict[str, Any]:
            if not hasattr(self, "slots"):
                self.slots = asyncio.Semaphore(math.ceil(self.api.in_flight / self.api.actors))
            content = _content(row["body"], json.loads(row["body"]), {})
            async with self.slots:
                return {"status": "answered", "error": (await self._send(content))["response"]}

    api = session.recipe.api
    calls = math.ceil(api.in_flight / api.actors / BLOCK) + 4
    ray.data.DataContext.get_current().wait_for_min_actors_s = 120
    rows = [{"key": str(n), "body": json.dumps(body, ensure_ascii=False), "files": "{}"} for n, body in enumerate(bodies(requests))]
    done = ray.data.from_items(rows, override_num_blocks=math.ceil(requests / BLOCK)).map_batches(
        Unkept,
        fn_constructor_args=(str(session.ledger), session.base_url, session.hello, api.model_dump(mode="json")),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=api.actors, max_concurrent_calls_per_actor=calls, max_tasks_in_flight_per_actor=2 * calls),
        num_cpus=0.5,
    )
    return [json.loads(row["error"]) for row in done.iter_rows()]


# client: what runs it, given the base URL, requests in flight and requests
CLIENTS: dict[str, Callable[[str, int, int], None]] = {
    "AsyncOpenAI, semaphore": run_plain,
    "Ray's HTTP stage": run_ray_stage,
    "graft, 1 actor": lambda url, c, n: run_graft(url, c, n, actors=1, ledger=True),
    "graft, 1 actor, no ledger": lambda url, c, n: run_graft(url, c, n, actors=1, ledger=False),
    "graft, 4 actors": lambda url, c, n: run_graft(url, c, n, actors=4, ledger=True),
    "graft, 4 actors, no ledger": lambda url, c, n: run_graft(url, c, n, actors=4, ledger=False),
}


@contextmanager
def cluster() -> Iterator[None]:
    """A Ray cluster with a home of its own; its folder has a short name, sockets' paths have a limit."""
    from graft.data.cluster import ray_cluster

    with tempfile.TemporaryDirectory(prefix="graft-", ignore_cleanup_errors=True) as home:
        os.environ["HOME"] = home
        with ray_cluster(temp_dir=f"{home}/ray", include_dashboard=False):
            yield


def compare(args: argparse.Namespace) -> dict[str, Any]:
    best: dict[tuple[str, int], Result] = {}
    with cluster():
        for _ in range(args.repeat):
            for in_flight in args.in_flight:
                for client in args.clients:
                    if client == "Ray's HTTP stage" and (client, in_flight) in best:
                        continue  # slow, and the same each time
                    requests = args.ray_requests if client == "Ray's HTTP stage" else args.requests
                    found: list[Result] = []
                    with timed(client, in_flight, requests, args.latency_s, found) as base_url:
                        CLIENTS[client](base_url, in_flight, requests)
                    print(f"{client:28s} {in_flight:5d} in flight {found[0].per_s:7.0f} requests/s", file=sys.stderr, flush=True)
                    best[client, in_flight] = max(found[0], best.get((client, in_flight), found[0]), key=lambda r: r.per_s)
    print(f"| client | in flight | requests/s | x AsyncOpenAI | of the ideal | ledger costs | whole, s |\n|{'---|' * 7}")
    for (client, in_flight), r in sorted(best.items(), key=lambda kv: kv[0][1]):
        base, bare = best.get(("AsyncOpenAI, semaphore", in_flight)), best.get((f"{client}, no ledger", in_flight))
        times = f"{r.per_s / base.per_s:.2f}" if base else ""
        cost = f"{1 - r.per_s / bare.per_s:.1%}" if bare else ""
        print(f"| {client} | {in_flight} | {r.per_s:,.0f} | {times} | {r.per_s * args.latency_s / in_flight:.0%} | {cost} | {r.whole_s:.1f} |")
    return {"results": [{**asdict(r), "per_s": r.per_s} for r in best.values()]}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """RSS of the driver (session and broker in it) and of its actors over one long run against a server that answers at once."""
    from graft.data.api.request import Request
    from graft.data.api.session import LEDGER, Session

    samples: list[dict[str, float]] = []
    answered, over = 0, threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            samples.append({"s": time.monotonic(), "answered": answered, **_rss_mib()})

    sampler = threading.Thread(target=watch, daemon=True)
    with cluster(), tempfile.TemporaryDirectory() as folder, FaultyEndpoint(answers="canned") as server:
        with Session(_recipe(args.in_flight[0], args.actors), Path(folder, LEDGER), server.base_url) as session:
            sampler.start()
            began_s = time.monotonic()
            for answer in session.ask(Request(body) for body in bodies(args.requests)):
                assert answer.response, answer.error
                answered += 1
            wall_s = time.monotonic() - began_s
        over.set()
        sampler.join()
        seen = server.report(by_key=False)["requests"]
    assert seen == answered == args.requests
    print(
        f"{answered:,} requests in {wall_s:.0f} s, {args.actors} actors, {args.in_flight[0]} in flight; MiB, slope over the second half of the run\n"
    )
    print(f"| process | max RSS | max private | slope of private, MiB/10,000 requests |\n|{'---|' * 4}")
    figures = {}
    for who in ("driver", "actors"):
        late = [s for s in samples[len(samples) // 2 :] if s[f"{who} private"]]
        slope = _slope([s["s"] for s in late], [s[f"{who} private"] for s in late]) * wall_s / args.requests * 10_000
        figures[who] = {"max_rss_mib": max(s[who] for s in samples), "max_private_mib": max(s[f"{who} private"] for s in samples), "slope": slope}
        print(f"| {who} | {figures[who]['max_rss_mib']:.0f} | {figures[who]['max_private_mib']:.0f} | {slope:+.2f} |")
    return {"memory": figures, "wall_s": wall_s, "samples": samples}


def _rss_mib() -> dict[str, float]:
    """Of this process, and of all actors of the caller together; private: without Ray's shared object store."""
    found = {"driver": 0.0, "driver private": 0.0, "actors": 0.0, "actors private": 0.0}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            ours = f"HOME={os.environ['HOME']}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()  # another cluster may run beside
            actor = ours and b"MapBatches(Caller)" in Path(f"/proc/{pid}/cmdline").read_bytes()
            who = "driver" if int(pid) == os.getpid() else "actors" if actor else None
            if who:
                lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
                found[who] += int(lines["VmRSS"].split()[0]) / 1024
                found[f"{who} private"] += int(lines["RssAnon"].split()[0]) / 1024
        except (FileNotFoundError, ProcessLookupError, PermissionError, KeyError):
            continue  # ended meanwhile
    return found


def _slope(x: list[float], y: list[float]) -> float:
    """Least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, nargs="+", default=[512, 2000])
    parser.add_argument("--requests", type=int, default=6000)
    parser.add_argument("--ray-requests", type=int, default=64, help="for Ray's own stage")
    parser.add_argument("--latency-s", type=float, default=0.5)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS), metavar="CLIENT", help="; ".join(CLIENTS))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--actors", type=int, default=1, help="of --memory")
    parser.add_argument("--out", type=Path, default=Path("augment.json"))
    parser.add_argument("--plain", nargs=3, metavar=("URL", "IN_FLIGHT", "REQUESTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        return asyncio.run(plain(args.plain[0], int(args.plain[1]), int(args.plain[2])))
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    about = {"commit": commit, "cores": os.cpu_count(), "latency_s": args.latency_s, "repeat": args.repeat, "versions": versions}
    found = memory(args) if args.memory else compare(args)
    print("\n" + ", ".join(f"{k} {v}" for k, v in versions.items()) + f"; commit {commit}; {os.cpu_count()} cores")
    args.out.write_text(json.dumps({**about, **found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
