"""The fault-injecting endpoint as a process: its books outlive clients and itself, it leaves no orphan and is no bottleneck."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .faulty_client import ask, body, endpoint


def test_the_books_survive_clients_and_the_server_itself(tmp_path: Path) -> None:
    client = """
import asyncio, sys, openai
async def main():
    client = openai.AsyncOpenAI(base_url=sys.argv[1], api_key="k", max_retries=0)
    one = lambda n: client.chat.completions.create(model="m", messages=[{"role": "user", "content": str(n)}])
    await asyncio.gather(*(one(n) for n in range(20)))
asyncio.run(main())
"""
    log = tmp_path / "requests.jsonl"
    with endpoint(latency_s=30.0, log=log) as server:
        killed = subprocess.Popen([sys.executable, "-c", client, server.base_url])
        while server.report(by_key=False)["in_flight"] < 20:
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        while (report := server.report())["in_flight"]:
            time.sleep(0.02)
        assert (report["requests"], report["max_in_flight"], report["billed"]) == (20, 20, 20)
        os.kill(server.process.pid, signal.SIGKILL)
    with endpoint(log=log) as server:
        again = server.report()
        assert again == report
        assert ask(server, body()).status_code == 200
        assert server.report()["requests"] == 21
    assert len(server.requests()) == 21 and server.requests()[0]["unix_s"] <= server.requests()[-1]["unix_s"]


def test_it_ends_with_the_one_who_started_it() -> None:
    code = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE); print(p.pid, p.stdout.readline().decode(), flush=True); input()"
    program = Path(__file__).with_name("faulty.py")
    starter = subprocess.Popen(
        [sys.executable, "-c", code, sys.executable, str(program), "--until-stdin-closes"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout and starter.stdin
    port = int(starter.stdout.readline().split(":")[-1].split("/")[0])
    socket.create_connection(("127.0.0.1", port), timeout=1).close()
    starter.kill()
    starter.communicate()
    give_up_s = time.monotonic() + 5
    while time.monotonic() < give_up_s:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("the endpoint outlived its starter")


def test_it_is_no_bottleneck(tmp_path: Path) -> None:
    """At least 3,000 logged requests a second of its own CPU time, whatever else the machine does."""
    payloads = [json.dumps(body(n)).encode() for n in range(3000)]

    async def client(host: str, port: int, mine: list[bytes]) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        for payload in mine:
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(payload) + payload)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
        writer.close()

    async def load(port: int) -> None:
        await asyncio.gather(*(client("127.0.0.1", port, payloads[i::16]) for i in range(16)))

    with endpoint(log=tmp_path / "log.jsonl") as server:
        before_s = _cpu_s(server.process.pid)
        asyncio.run(load(server.port))
        per_s = 3000 / (_cpu_s(server.process.pid) - before_s)
        assert server.report(by_key=False)["billed"] == 3000
    print(f"{per_s:,.0f} requests a second of CPU time")
    assert per_s >= 3000


def _cpu_s(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_it_speaks_plain_http() -> None:
    with endpoint() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for path, status in (("/nowhere", 404), ("/report", 200), ("/v1/chat/completions", 404)):  # one connection, kept alive
            connection.request("GET", path)
            reply = connection.getresponse()
            assert (reply.status, reply.read()[:1]) == (status, b"{")
        connection.request("POST", "/v1/chat/completions", body="no json")
        assert connection.getresponse().status == 400
