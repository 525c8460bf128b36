"""wandb as a test sees it: what a .wandb file holds, and a server that takes runs, history and artifacts and says what it has."""

import base64
import gzip
import json
import re
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BLOCK, HEADER = 32768, 7  # LevelDB's log format


def records(path):
    """The records of a .wandb file, as far as it is whole."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or its last part
            found = Record()
            found.ParseFromString(whole)
            whole = b""
            yield getattr(found, found.WhichOneof("record_type")), found.WhichOneof("record_type")


def history(path):
    """[{key: value}] of each step."""
    return [{i.nested_key[0]: json.loads(i.value_json) for i in r.item} for r, kind in records(path) if kind == "history"]


class WandbServer(ThreadingHTTPServer):
    """runs: {id: {"history": lines, "group", "name"}}; artifacts: (name, aliases) in the order they were made; used: how many were declared as inputs;
    files: names of those that were uploaded; received: every body, with its path."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs, self.artifacts, self.used, self.files, self.received = {}, [], 0, set(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """As if the network were gone: who asks is refused."""
        self.shutdown()
        self.server_close()

    def variables(self):
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_address[1]}", "WANDB_API_KEY": "a1" * 20}

    def steps(self, run):
        return [line["_step"] for line in self.runs[run]["history"] if "_step" in line]

    def answer(self, name, v):
        project = {"id": "cA==", "name": "graft", "entity": {"id": "ZQ==", "name": "me"}}
        if name == "Viewer":
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if name == "RunResumeStatus":
            run = self.runs.get(v["name"])
            if not run:
                return {"model": {**project, "bucket": None}}
            lines = run["history"]
            told = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0, "summaryMetrics": json.dumps(lines[-1] if lines else {})}
            tail = json.dumps([json.dumps(line) for line in lines[-1:]])
            return {
                "model": {
                    **project,
                    "bucket": {"id": "cnVu", "name": v["name"], "config": "{}", "tags": [], "historyTail": tail, "eventsTail": "[]", **told},
                }
            }
        if name == "UpsertBucket":
            run = self.runs.setdefault(v["name"], {"history": []})
            run |= {key: v[of] for key, of in (("group", "groupName"), ("name", "displayName")) if v.get(of)} | (
                {"host": v["host"]} if v.get("host") else {}
            )
            bucket = {
                "id": "cnVu",
                "name": v["name"],
                "displayName": v["displayName"],
                "config": "{}",
                "project": project,
                "historyLineCount": len(run["history"]),
            }
            return {"upsertBucket": {"bucket": bucket, "inserted": not run["history"]}}
        if name == "CreateArtifact":
            given = v["input"]
            self.artifacts.append((given["artifactCollectionName"], [a["alias"] for a in given["aliases"]]))
            number = base64.b64encode(f"artifact-{len(self.artifacts)}".encode()).decode()
            return {"createArtifact": {"artifact": {"id": number, "state": "COMMITTED", "artifactSequence": {"id": "cw==", "latestArtifact": None}}}}
        if name == "UseArtifact":
            self.used += 1
        if name == "ArtifactType":
            return {"project": {"artifact": None}}
        if name == "CreateRunFiles":
            self.files |= set(v["files"])
            files = [{"name": file, "uploadUrl": f"{self.variables()['WANDB_BASE_URL']}/upload"} for file in v["files"]]
            return {"createRunFiles": {"runID": "cnVu", "uploadHeaders": [], "files": files}}
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_PUT(self):
        self.do_POST()

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        raw = gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw
        answer = {}
        if self.path == "/graphql":
            body = json.loads(raw)
            name = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            answer = {"data": self.server.answer(name[1] if name else "", body.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            lines = json.loads(raw).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.server.runs[self.path.split("/")[4]]["history"] += map(json.loads, lines)
            answer = {"exitcode": None, "limits": {}}
        self.server.received.append(self.path.encode() + b"\n" + raw)
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
