"""A chat completions server that fails on purpose and knows what it billed: a program, and a context manager around it.

    python tests/data/api/faulty.py --faults '{"429": 0.05, "reset": 0.05}' --latency-s 0.5 --log requests.jsonl

    with FaultyEndpoint(faults={"429": 0.05}, prices={"*": {"input": 1, "output": 4}}) as server:
        ...; server.report()["billed_usd"]

It is a process of its own, with its own clock: clients may be killed as one likes, and it ends with the one who started it.
POST /control changes any option while it runs (and {"outage_s": 2} refuses all connections for so long), GET /report
tells what it saw. On one core it answers 12,000 canned or 4,000 grammar requests a second, logged. The faults are
`FAULTS` in `faulty_server.py`; one more record, `limit`, is a 429 by `limits`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

# option: (how the command line reads it, help); defaults are those of faulty_server.Options
OPTIONS: dict[str, tuple[Any, str]] = {
    "faults": (json.loads, "JSON: fault -> probability"),
    "seed": (int, "of the faults"),
    "answers": (str, "grammar, canned or vqa"),
    "latency_s": (float, "of an answer; errors come at once"),
    "jitter_s": (float, "up to so much more, by the request"),
    "retry_after_s": (float, "what 429 and 503 ask for"),
    "late_s": (float, "latency of the fault `late`"),
    "drip_s": (float, "a byte of the fault `drip`"),
    "quota_after": (int, "requests, then insufficient_quota for ever"),
    "limits": (json.loads, "JSON: requests_per_minute, tokens_per_minute, burst_s, in_flight"),
    "api_key": (str, "refuse any other with 401"),
}


class FaultyEndpoint:
    """Starts the program on entering and ends it on leaving. options: those of `OPTIONS`.

    log: JSONL, a line a request; started again on the same file, the server goes on counting.
    prices: {model or "*": {"input", "output", "cached_input"?, "batch"?}}, US dollars a million tokens.
    """

    base_url: str  # ends with /v1

    def __init__(
        self, *, host: str = "127.0.0.1", port: int = 0, log: Path | None = None, prices: dict[str, dict[str, float]] | None = None, **options: Any
    ):
        if unknown := set(options) - set(OPTIONS):
            raise TypeError(f"no such options: {sorted(unknown)}; there are {sorted(OPTIONS)}")
        self.log, self.host, self.port = log, host, port
        self._options = {"prices": prices or {}, "log": log, **options}

    def __enter__(self) -> Self:
        said = [f"--{name.replace('_', '-')}={_word(value)}" for name, value in self._options.items() if value is not None]
        command = [sys.executable, __file__, f"--host={self.host}", f"--port={self.port}", "--until-stdin-closes", *said]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the faulty endpoint did not start: exit code {self.process.wait()}")
        self.base_url = json.loads(line)["base_url"]
        self.port = int(self.base_url.split(":")[2].removesuffix("/v1"))
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def control(self, **changes: Any) -> None:
        """Change options; `outage_s` refuses connections for so long, `quota` turns the quota code on or off."""
        self._http("/control", json.dumps(changes).encode())

    def report(self, by_key: bool = True) -> dict[str, Any]:
        """What the server saw and billed; waits for the end of an outage."""
        return self._http("/report" if by_key else "/report?brief")

    def requests(self) -> list[dict[str, Any]]:
        """The log's records, in order of arrival."""
        assert self.log, "the endpoint keeps no log: pass log=…"
        return [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines()]

    def _http(self, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(self.base_url.removesuffix("/v1") + path, body)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        give_up_s = time.monotonic() + 30
        while True:
            try:
                with opener.open(request, timeout=30) as reply:
                    return json.load(reply)
            except urllib.error.HTTPError as e:
                raise ValueError(f"{path}: {e.read().decode()}") from None
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > give_up_s or self.process.poll() is not None:
                    raise
                time.sleep(0.05)


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--log", help="JSONL, a line a request")
    parser.add_argument("--prices", type=json.loads, default={}, help='JSON: {model or "*": {"input", "output", "cached_input"?, "batch"?}}')
    parser.add_argument("--until-stdin-closes", action="store_true")
    for name, (read, what) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=read, default=argparse.SUPPRESS, help=what)
    given = vars(parser.parse_args())
    import asyncio

    from faulty_server import Options, serve  # beside this file, which is a program here

    front = {name: given.pop(name) for name in ("host", "port", "log", "prices", "until_stdin_closes")}
    asyncio.run(serve(Options(**given), **front))


if __name__ == "__main__":
    main()
