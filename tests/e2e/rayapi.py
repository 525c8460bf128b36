"""Ray's own API as anyone with the cluster's token reads it, while a run is under way; every answer becomes a file."""

import json
import re
import urllib.error
import urllib.request
from pathlib import Path

from .tree import Tree

LISTS = "actors tasks workers nodes objects placement_groups runtime_envs jobs cluster_events"
RAY_API = [
    "/api/jobs/",
    "/logical/actors",
    "/api/cluster_status",
    "/api/component_activities",
    "/events",
    "/nodes?view=summary",
    "/nodes/{node}",
    "/api/serve/applications/",
    *(f"/api/v0/{name}?detail=1" for name in LISTS.split()),
]


class RayApi:
    """Reads the API of the cluster that a tree's run has at the moment; each answer becomes a file in `answers`."""

    def __init__(self, tree: Tree, temporary: Path, answers: Path):
        self.tree, self.temporary, self.answers = tree, temporary, answers
        self.seen: dict[str, list[bytes]] = {path: [] for path in [*RAY_API, "metrics"]}
        answers.mkdir()

    def read(self) -> None:
        sessions = sorted(self.temporary.glob("ray/session_2*/logs/dashboard.log"), key=lambda p: p.stat().st_mtime)
        address = re.search(r"http address: (127\.0\.0\.1:\d+)", sessions[-1].read_text()) if sessions else None
        token = self.tree.home / ".ray/auth_token"
        if not address or not token.exists():
            return
        headers = {"Authorization": f"Bearer {token.read_text().strip()}"}
        nodes = self._get(f"http://{address[1]}/api/v0/nodes?detail=1", headers)
        listed = json.loads(nodes)["data"]["result"]["result"] if nodes else []
        if not listed:
            return
        for path in RAY_API:
            self._keep(path, self._get(f"http://{address[1]}{path.format(node=listed[0]['node_id'])}", headers))
        for target in json.loads((self.temporary / "ray/prom_metrics_service_discovery.json").read_text())[0]["targets"]:
            self._keep("metrics", self._get(f"http://{target}/metrics", headers))

    def _get(self, url: str, headers: dict[str, str]) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as reply:
                return reply.read()
        except (OSError, ValueError):  # not up yet, or gone
            return b""

    def _keep(self, path: str, answer: bytes) -> None:
        if answer:
            self.seen[path].append(answer)
            name = re.sub(r"\W+", "-", path).strip("-")
            (self.answers / f"{name}-{len(self.seen[path])}").write_bytes(answer)
