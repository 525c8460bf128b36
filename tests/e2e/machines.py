"""A second machine: a network namespace with an address of its own, joined to this one by a wire that can be cut."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path


class Machines:
    """Addresses of this machine and of the other, and how to run a command on the other."""

    def __init__(self, name: str, subnet: int):
        self.name, self.here, self.there = name, f"10.79.{subnet}.1", f"10.79.{subnet}.2"

    def over_there(self, *command: str) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name, *command)

    def pids(self) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    def crash(self) -> None:
        """The other machine loses its network and its processes at once."""
        subprocess.run(["ip", "link", "set", f"{self.name}a", "down"], check=True)
        for pid in self.pids():
            os.kill(pid, 9)


@contextmanager
def two_machines():
    """Needs root and iproute2; PermissionError without."""
    subnet = os.getpid() % 250
    name = f"graft{os.getpid() % 10_000}"
    machines = Machines(name, subnet)
    if os.geteuid() or not Path("/usr/sbin/ip").exists():
        raise PermissionError("network namespaces need root and iproute2")
    try:
        for command in (
            f"netns add {name}",
            f"link add {name}a type veth peer name {name}b",
            f"link set {name}b netns {name}",
            f"addr add {machines.here}/24 dev {name}a",
            f"link set {name}a up",
            f"netns exec {name} ip addr add {machines.there}/24 dev {name}b",
            f"netns exec {name} ip link set {name}b up",
            f"netns exec {name} ip link set lo up",
        ):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        yield machines
    finally:
        for pid in machines.pids() if Path("/run/netns", name).exists() else ():
            os.kill(pid, 9)
        subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
