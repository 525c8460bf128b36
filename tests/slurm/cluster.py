"""A real SLURM cluster on this machine: slurmctld and munged here, each node in network, PID, UTS and mount namespaces of its own.

Up in 0.3 to 1.6 s. Needs root and Debian's slurm-wlm, munge and iproute2. The nodes share this machine's files, as a cluster's nodes do.
Faults are methods: cut, heal, power_off, boot, kill_slurmd, restart_slurmctld.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .settings import CGROUP_CONF, NODE_INIT, SLURM_CONF

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "setpriv")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
NULL_DEVICE = os.makedev(1, 3)
_NUMBERS = itertools.count()


def missing() -> str | None:
    """Why there can be no cluster here, None where there can."""
    if os.geteuid():
        return "a SLURM cluster of namespaces needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge iproute2" if absent else None


def until(what: Callable[[], Any], within_s: float, step_s: float = 0.05) -> Any:
    """The first true answer of what(); TimeoutError after within_s."""
    deadline = time.monotonic() + within_s
    while not (answer := what()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s} s: {what}")
        time.sleep(step_s)
    return answer


class Cluster:
    """Nodes n1 … nN of `cpus` CPUs, which need not exist; `gpus` devices a node, which compute nothing. root: a short path."""

    def __init__(self, root: Path, nodes: int = 2, cpus: int = 4, gpus: int = 0, grace_s: int = 0, kill_wait_s: int = 5):
        self.root, self.nodes, self.gpus = root, [f"n{i}" for i in range(1, nodes + 1)], gpus
        number = next(_NUMBERS)  # of this process's clusters
        self.name, self.net = f"g{os.getpid() % 100_000}{chr(97 + number)}", f"10.{80 + number}.{os.getpid() % 250}"
        self.sizes = {"cpus": cpus, "grace_s": grace_s, "kill_wait_s": kill_wait_s}
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}
        self.environment["PATH"] = f"{self.environment.get('PATH', '')}:/usr/sbin:/sbin"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def address(self, node: str) -> str:
        return f"{self.net}.{10 + int(node[1:])}"

    # ---- up and down ----------------------------------------------------------------------------------------------------
    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._connect()
            socket_file = self.root / "run/munge.sock"
            self._start(
                "munged",
                *("munged", "-F", f"--socket={socket_file}", f"--key-file={self.root}/munge.key", f"--pid-file={self.root}/run/munged.pid"),
                *(f"--seed-file={self.root}/munge.seed", f"--log-file={self.root}/log/munged.log"),
            )
            until(socket_file.exists, 30)
            self._start("slurmctld", "slurmctld", "-D")
            for node in self.nodes:
                self.boot(node)
            self.wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            if node in self._daemons:
                self.power_off(node)
        for name in ("slurmctld", "munged"):
            if daemon := self._daemons.pop(name, None):
                daemon.kill()
                daemon.wait()
        for node in self.nodes:
            self._ip("link", "del", self._wire(node), check=False)
            self._ip("netns", "del", f"{self.name}-{node}", check=False)
        self._ip("link", "del", f"{self.name}br", check=False)

    def _configure(self) -> None:
        for folder in ("state", "log", "run", "spool", "dev"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        devices = [self.root / f"dev/nvidia{i}" for i in range(self.gpus)]
        for device in devices:
            os.mknod(device, 0o666 | stat.S_IFCHR, NULL_DEVICE)
        host, controller = socket.gethostname().split(".")[0], f"{self.net}.254"
        named = "".join(f"{self.address(n)} {n}\n" for n in self.nodes)
        (self.root / "hosts").write_text(f"127.0.0.1 localhost\n{controller} {host}\n{named}")
        (self.root / "resolv.conf").write_text("")  # a name that is not known is so at once
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        conf = SLURM_CONF.format(
            name=self.name,
            host=host,
            address=controller,
            port=port,
            root=self.root,
            nodes=f"n[1-{len(self.nodes)}]",
            addresses=f"{self.net}.[{','.join(str(11 + i) for i in range(len(self.nodes)))}]",
            gres=f"Gres=gpu:{self.gpus}" if self.gpus else "",
            **self.sizes,
        )
        (self.root / "slurm.conf").write_text(conf)
        (self.root / "cgroup.conf").write_text(CGROUP_CONF)
        lines = [f"Name=gpu File={device} Flags=nvidia_gpu_env\n" for device in devices]
        (self.root / "gres.conf").write_text("AutoDetect=off\n" + "".join(lines) if lines else "")
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    def _connect(self) -> None:
        bridge = f"{self.name}br"
        self._ip("link", "add", bridge, "type", "bridge")
        self._ip("addr", "add", f"{self.net}.254/24", "dev", bridge)
        self._ip("link", "set", bridge, "up")
        for node in self.nodes:
            space = f"{self.name}-{node}"
            self._ip("netns", "add", space)
            self._ip("link", "add", self._wire(node), "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("link", "set", self._wire(node), "master", bridge, "up")
            self._ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")
            self._ip("-n", space, "link", "set", "lo", "up")

    def _wire(self, node: str) -> str:
        return f"{self.name}{node}"

    def _ip(self, *words: str, check: bool = True) -> None:
        done = subprocess.run(["/usr/sbin/ip", *words], capture_output=True, text=True)
        if check and done.returncode:
            raise RuntimeError(f"ip {' '.join(words)}: {done.stderr}")

    def _start(self, name: str, *command: str) -> None:
        with (self.root / f"log/{name}.out").open("ab") as log:  # a test run that is killed leaves no daemon behind
            argv = ["setpriv", "--pdeathsig", "KILL", *command]
            self._daemons[name] = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    # ---- faults ---------------------------------------------------------------------------------------------------------
    def boot(self, node: str) -> None:
        """Power on."""
        self.heal(node)
        script = NODE_INIT.format(root=self.root, node=node)
        spaces = ("nsenter", f"--net=/run/netns/{self.name}-{node}", "unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child=KILL")
        self._start(node, *spaces, "bash", "-c", script)

    def power_off(self, node: str) -> None:
        """Every process of the node ends at once, and no peer hears of it."""
        self.cut(node)
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def cut(self, node: str) -> None:
        """Pull the network's cable: what runs there runs on."""
        self._ip("link", "set", self._wire(node), "down")

    def heal(self, node: str) -> None:
        self._ip("link", "set", self._wire(node), "up")

    def pids(self, node: str, pattern: str) -> list[int]:
        """Of the node's processes whose command line holds the regular expression, in this machine's numbers, the oldest first."""
        space = os.stat(f"/run/netns/{self.name}-{node}").st_ino
        found = []
        for pid in sorted(int(p) for p in os.listdir("/proc") if p.isdigit()):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if re.search(pattern, line) and os.stat(f"/proc/{pid}/ns/net").st_ino == space:
                    found.append(pid)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found

    def kill_slurmd(self, node: str) -> None:
        """slurmd alone: what it started runs on."""
        for pid in self.pids(node, r"^slurmd -D"):
            os.kill(pid, signal.SIGKILL)

    def start_slurmd(self, node: str) -> None:
        (init,) = (pid for pid in self.pids(node, r"^bash -c ") if Path(f"/proc/{pid}/status").read_text().split("NSpid:")[1].split()[1] == "1")
        self._start(f"slurmd-{node}", "nsenter", "-t", str(init), "-a", "slurmd", "-D")

    def restart_slurmctld(self) -> None:
        daemon = self._daemons.pop("slurmctld")
        daemon.kill()
        daemon.wait()
        self._start("slurmctld", "slurmctld", "-D")

    # ---- use ------------------------------------------------------------------------------------------------------------
    def run(self, *command: str, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """stdout of a command that can reach the cluster; RuntimeError with what it said where it fails."""
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment | (environment or {}), cwd=cwd)
        if done.returncode:
            raise RuntimeError(f"{command} left with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def sbatch(self, *words: object, cwd: Path | None = None, environment: dict[str, str] | None = None) -> str:
        """The id of the job."""
        return self.run("sbatch", "--parsable", *map(str, words), cwd=cwd, environment=environment).split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        text = subprocess.run(["scontrol", "-o", "show", "job", job], capture_output=True, text=True, env=self.environment).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, within_s: float = 120, states: set[str] = OVER) -> dict[str, str]:
        """The job in one of `states`; TimeoutError with the job as it is."""
        try:
            return until(lambda: (found := self.job(job)).get("JobState") in states and found, within_s, 0.2)
        except TimeoutError:
            raise TimeoutError(f"job {job} is not {sorted(states)} within {within_s} s: {self.job(job)}") from None

    def states(self) -> dict[str, str]:
        done = subprocess.run(["sinfo", "-h", "-p", "main", "-N", "-o", "%N %T"], capture_output=True, text=True, env=self.environment)
        return dict(line.split() for line in done.stdout.splitlines())

    def wait_idle(self, *nodes: str, within_s: float = 30) -> None:
        until(lambda: (found := self.states()) and all(found.get(node) == "idle" for node in nodes or self.nodes), within_s)
