"""A copy of the source tree in a folder of its own, run with this environment's packages and watched as a whole."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECIPE = "configs/recipes/image-intent-tiny.toml"
MARK = "GRAFT_TEST_RUN"


class Tree:
    """The copy at `path`; every process started through it carries a mark in its environment.

    extra: what else their environment holds.
    """

    def __init__(self, path: Path, extra: dict[str, str] | None = None):
        self.path, self.mark, self.extra = path / "graft", uuid.uuid4().hex, extra or {}
        self.home = path / "home"
        self.home.mkdir(parents=True)
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
        for name in filter(None, listed.stdout.decode().split("\0")):
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                shutil.copy2(ROOT / name, target)
        assert not (self.path.parent / "shared").exists()

    def environment(self) -> dict[str, str]:
        keys = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "GRAFT_API_KEY", "OMP_NUM_THREADS", "RAY_AUTH_MODE", "RAY_ADDRESS")
        clean = {k: v for k, v in os.environ.items() if k not in keys}
        return clean | {
            "HOME": str(self.home),
            "GRAFT_VENV": sys.prefix,
            "GRAFT_INSTALLED": "1",
            "PYTHONPATH": str(self.path / "src"),
            MARK: self.mark,
            **self.extra,
        }

    def start(self, *command: str) -> subprocess.Popen:
        log = (self.path.parent / "output.log").open("ab")
        return subprocess.Popen(command, cwd=self.path, env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def said(self) -> str:
        """What its processes have printed so far."""
        return (self.path.parent / "output.log").read_text(errors="replace")

    def run(self, *command: str, timeout_s: float = 600) -> float:
        """Run to success; the seconds it took."""
        began = time.monotonic()
        code = self.start(*command).wait(timeout_s)
        assert code == 0, self.said()[-4000:]
        return time.monotonic() - began

    def graft(self, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, "-m", "graft.cli", *arguments)

    def alive(self) -> dict[int, str]:
        """Processes of this tree that still run."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                if f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    found[int(pid)] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def none_alive(self, within_s: float = 30, but: tuple[str, ...] = ()) -> None:
        """Wait until no process is left; `but`: beginnings of command lines that may stay."""
        deadline = time.monotonic() + within_s
        while left := {pid: line for pid, line in self.alive().items() if not line.startswith(but or ("\0",))}:
            assert time.monotonic() < deadline, f"outlived their run: {left}"
            time.sleep(0.2)
