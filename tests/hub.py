"""A hub of one's own: the HTTP API of the Hugging Face hub over a folder, for the real clients to download from.

As on the hub, what is large (or of a suffix that the hub keeps in LFS) lies on another host: a file's address answers with its
commit, ETag and size and leads there by a redirect, small files are led to the hub's own cache of resolved files. Written
against huggingface_hub 2.4, datasets 5.2 and transformers 5.23, run with HF_ENDPOINT in a process of their own: `Client`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".parquet", ".arrow", ".safetensors", ".zst")
REPOSITORY = re.compile(r"/(?:api/)?(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?P<rest>/.*)?")
FILE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
RESOLVED = re.compile(r"/api/resolve-cache/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<path>.+)")
BLOB = re.compile(r"/blobs/(?P<digest>[0-9a-f]{64})")


class Refused(Exception):
    """An answer that is an error: status, X-Error-Code, and the commit in which an entry is missing."""


class Hub:
    """`with Hub(folder) as hub:` serves what `push` puts there, on a free port of the loopback.

    access: {"models/owner/name": "gated" or "private"}; `token` opens all of them, any other token does not. downloads: the
    path of each file that was sent, in order, whole or not. A test may set: down, each answer is a 500; cut_bytes, the
    connection ends after so many bytes of a blob, once; gone_after_cut, none is answered from then on.
    """

    def __init__(self, folder: Path):
        self.folder, self.token = folder, f"hf_{secrets.token_hex(17)}"
        self.access: dict[str, str] = {}
        self.branches: dict[tuple[str, str], str] = {}  # (models/owner/name, branch) -> commit
        self.downloads: list[str] = []
        self.requests: list[str] = []
        self.down = self.gone = self.gone_after_cut = False
        self.cut_bytes: int | None = None
        self.blobs: dict[str, Path] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Answer,), {"hub": self}))
        self.port: int = self.server.server_address[1]

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def push(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit of "models/owner/name" or "datasets/owner/name" with these files and no other; returns its name."""
        parent = self.branches.get((repository, branch), "")
        names = [parent, *(f"{path} {hashlib.sha256(data).hexdigest()}" for path, data in sorted(files.items()))]
        commit = hashlib.sha1("\n".join(names).encode()).hexdigest()
        for path, data in files.items():
            place = self.folder / repository / commit / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            self.blobs[hashlib.sha256(data).hexdigest()] = place
        self.branches[repository, branch] = commit
        return commit

    def push_folder(self, repository: str, folder: Path, branch: str = "main") -> str:
        return self.push(repository, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}, branch)


class Answer(BaseHTTPRequestHandler):
    """One connection to the hub."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append(f"{self.command} {path}")
        if hub.gone:
            self._cut()
            return
        try:
            if hub.down:
                raise Refused(500, "InternalError")
            if named := BLOB.fullmatch(path):
                assert "Authorization" not in self.headers, "a token was sent to another host than the hub"
                self._file(hub.blobs[named["digest"]], {})
            elif named := RESOLVED.fullmatch(path):
                place = self._place(f"{named['kind']}/{named['name']}", named["revision"], named["path"])
                self._file(place, {"X-Repo-Commit": named["revision"]})
            elif named := FILE.fullmatch(path):
                self._resolve(named["kind"] or "models", **{k: named[k] for k in ("name", "revision", "path")})
            elif named := REPOSITORY.fullmatch(path):
                self._api(f"{named['kind']}/{named['name']}", (named["rest"] or "").strip("/"), parse_qs(body.decode()))
            else:
                raise Refused(404, "")
        except Refused as refused:
            status, code, *commit = refused.args
            head = {"X-Error-Code": code, "X-Error-Message": code} | dict(zip(["X-Repo-Commit"], commit, strict=False))
            self._send(status, json.dumps({"error": code}).encode(), head)

    # ---- what may be seen ---------------------------------------------------------------------------------------
    def _commit(self, repository: str, revision: str, reads_files: bool) -> str:
        """The commit of a branch or commit, if whoever asks may know; the hub names a gated repository and hides its files."""
        hub, sent = self.hub, self.headers.get("Authorization", "").removeprefix("Bearer ")
        kind = hub.access.get(repository)
        if not (hub.folder / repository).is_dir() or (kind == "private" and sent != hub.token):
            raise Refused(404 if sent else 401, "RepoNotFound")
        if kind == "gated" and reads_files and sent != hub.token:
            raise Refused(403 if sent else 401, "GatedRepo")
        commit = hub.branches.get((repository, revision), revision)
        if not (hub.folder / repository / commit).is_dir():
            raise Refused(404, "RevisionNotFound")
        return commit

    def _place(self, repository: str, revision: str, path: str) -> Path:
        commit = self._commit(repository, revision, reads_files=True)
        place = self.hub.folder / repository / commit / path
        if not place.is_file():
            raise Refused(404, "EntryNotFound", commit)
        return place

    # ---- answers ------------------------------------------------------------------------------------------------
    def _resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        place = self._place(f"{kind}/{name}", revision, path)
        commit, entry = self._commit(f"{kind}/{name}", revision, True), described(place)
        head = {"X-Repo-Commit": commit, "X-Linked-Size": str(entry["size"])}
        if "lfs" in entry:
            digest = entry["lfs"]["oid"]
            self._send(302, b"", head | {"X-Linked-ETag": f'"{digest}"', "Location": f"http://localhost:{self.hub.port}/blobs/{digest}"})
        else:
            self._send(307, b"", head | {"Location": f"/api/resolve-cache/{kind}/{name}/{commit}/{path}"})

    def _api(self, repository: str, rest: str, form: dict[str, list[str]]) -> None:
        what, _, rest = rest.partition("/")
        revision, _, below = rest.partition("/")
        if what not in ("", "revision", "tree", "paths-info"):
            raise Refused(404, "")
        commit = self._commit(repository, revision or "main", reads_files=what in ("tree", "paths-info"))
        root = self.hub.folder / repository / commit
        if what in ("", "revision"):
            name = repository.partition("/")[2]
            files = [{"rfilename": p.relative_to(root).as_posix()} for p in sorted(root.rglob("*")) if p.is_file()]
            gated = "auto" if self.hub.access.get(repository) == "gated" else False
            self._json(
                {"_id": commit[:24], "id": name, "sha": commit, "siblings": files, "private": False, "gated": gated, "tags": [], "downloads": 0}
            )
        elif what == "tree":
            folder = root / below
            if not folder.is_dir():
                raise Refused(404, "EntryNotFound")
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() == "true"
            self._json([self._entry(p, root) for p in sorted(folder.rglob("*") if recursive else folder.iterdir())])
        else:
            self._json([self._entry(p, root) for path in form["paths"] if (p := root / path).exists()])

    def _entry(self, place: Path, root: Path) -> dict[str, Any]:
        named = {"path": place.relative_to(root).as_posix()}
        return described(place) | named if place.is_file() else {"type": "directory", "oid": "0" * 40, "size": 0} | named

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _file(self, place: Path, head: dict[str, str]) -> None:
        """The bytes, from where a broken download left off; a GET counts as a download."""
        data, status = place.read_bytes(), 200
        entry = described(place)
        head = head | {"ETag": f'"{entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]}"', "Accept-Ranges": "bytes"}
        if begin := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, head = 206, head | {"Content-Range": f"bytes {begin[1]}-{len(data) - 1}/{len(data)}"}
            data = data[int(begin[1]) :]
        if self.command == "GET":
            self.hub.downloads.append("/".join(place.relative_to(self.hub.folder).parts[4:]))  # below kind, owner, name, commit
        self._send(status, data, head)

    def _send(self, status: int, body: bytes, head: dict[str, str]) -> None:
        cut = self.hub.cut_bytes if self.command == "GET" and BLOB.fullmatch(self.path) else None
        self.send_response_only(status)
        for name, value in {"Date": formatdate(usegmt=True), "Content-Length": str(len(body)), **head}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.hub.cut_bytes, self.hub.gone = None, self.hub.gone_after_cut
            self._cut()

    def _cut(self) -> None:
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True


def described(place: Path) -> dict[str, Any]:
    """A file as the hub's listings name it."""
    data = place.read_bytes()
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "oid": oid, "size": len(data)}
    if place.suffix in LFS:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry


class Client:
    """Processes whose hub is `hub` and whose HF_HOME lies under `root`: their libraries are as a user has them."""

    def __init__(self, hub: Hub, root: Path):
        self.hub, self.root, self.home = hub, root, root / "hf"
        self.says = ""

    def environment(self, **extra: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "OPENAI", "RAY_", "GRAFT_"))}
        here = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.home), "HOME": str(self.root), "RAY_TMPDIR": str(self.root)}
        return clean | here | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_TELEMETRY": "1"} | extra

    def run(self, *arguments: str, **extra: str) -> int:
        """The exit code of `python *arguments`; its stderr is kept as `says`."""
        done = subprocess.run([sys.executable, *arguments], env=self.environment(**extra), cwd=self.root, capture_output=True, text=True, timeout=300)
        self.says = done.stderr
        return done.returncode

    def graft(self, *arguments: str, **extra: str) -> int:
        return self.run("-m", "graft.cli", *arguments, **extra)

    def asks(self, code: str, *arguments: str, **extra: str) -> Any:
        """What `code` leaves in `answer`, JSON-ready, or the line of the GraftError that it ends with; sys.argv[1:] are `arguments`."""
        out = self.root / "answer.json"
        wrapped = "import json, os, sys\nfrom graft.core.errors import GraftError\n" + (
            "try:\n" + "".join(f"    {line}\n" for line in code.strip().splitlines()) + "except GraftError as e:\n    answer = str(e)\n"
        )
        wrapped += "open(os.environ['ANSWER'], 'w').write(json.dumps(answer))\n"
        assert self.run("-c", wrapped, *arguments, ANSWER=str(out), **extra) == 0, self.says[-4000:]
        return json.loads(out.read_text())
