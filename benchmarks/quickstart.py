"""Wall time and memory of a whole run: every process's proportional set size (PSS), sampled twice a second.

    python benchmarks/quickstart.py -- bash launch/quickstart.sh

Prints one JSON object: wall_s, peak_pss_gib, what ran at the peak, and the seconds that each stage's manifest gives (a training stage's are its steps).
Needs Linux; about 1 % of a core.
"""

import argparse
import json
import os
import subprocess
import time
import uuid
from collections import Counter
from pathlib import Path

MARK = "GRAFT_BENCHMARK_RUN"


def pss_kib(pid: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


def sample(mark: bytes) -> Counter[str]:
    """PSS in KiB by program, of every process that inherited the mark, daemons included."""
    found: Counter[str] = Counter()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark in Path(f"/proc/{pid}/environ").read_bytes():
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found[" ".join(Path(w.decode(errors="replace")).name for w in words[:3])[:48]] += pss_kib(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    command = [w for w in parser.parse_args().command if w != "--"]
    run = uuid.uuid4().hex
    started, began = time.time(), time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, MARK: run})
    peak, at_peak = 0, Counter()
    while process.poll() is None:
        found = sample(f"{MARK}={run}".encode())
        if found.total() > peak:
            peak, at_peak = found.total(), found
        time.sleep(0.5)
    stages = {}
    for path in sorted(Path().glob("*/*/*/[0-9a-f]*/manifest.json"), key=lambda p: p.stat().st_mtime):
        manifest = json.loads(path.read_text())
        if manifest["created_unix_s"] >= started:
            stages[manifest["kind"]] = round(manifest["counts"].get("steps_s", manifest["wall_s"]), 1)
    print(
        json.dumps(
            {
                "command": " ".join(command),
                "exit": process.returncode,
                "wall_s": round(time.perf_counter() - began, 1),
                "peak_pss_gib": round(peak / 2**20, 2),
                "at_peak_gib": {k: round(v / 2**20, 2) for k, v in at_peak.most_common(6)},
                "stage_s": stages,
            },
            ensure_ascii=False,
            indent=1,
        )
    )
    return process.returncode


if __name__ == "__main__":
    raise SystemExit(main())
