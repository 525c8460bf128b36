"""The server: one Ray Serve deployment over the engine, on a local Ray that is started and stopped with it, or on RAY_ADDRESS's, with a
replica a GPU, or a machine where there are none. A single replica of a local Ray answers on the port itself (listener.py), several are behind
Serve's proxy; either way Serve starts, watches and replaces them.

`with start(spec_of(plan)) as server:` costs about 15 s on two cores, most of it Ray's, and about 1 GB of memory beside
the model. Only loopback is served unless GRAFT_API_KEY is set; then every route demands that key, and /admin GRAFT_ADMIN_KEY.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.core.errors import ServeError
from graft.core.recipe import BASE_NAME
from graft.core.stages import Plan
from graft.core.store import AdapterStore
from graft.serve.guard import Keys
from graft.serve.runner import Runner
from graft.serve.spec import ServeSpec

SHARED = (
    "host",
    "system",
    "engine",
    "replicas",
    "max_batch",
    "max_adapters",
    "max_rank",
    "kv_tokens",
    "max_images",
    "fetch_images",
    "max_concurrent",
    "deadline_s",
)  # recipe.serve's and the spec's
DRAIN_S = 30.0  # that answers under way have when the server stops
OBJECT_STORE = 128 << 20  # bytes: nothing large is passed between processes, and Ray's own choice is a third of the memory
PROXIED = {  # of Ray Serve's processes: half the time that a message takes, where nothing else runs in a replica's loop
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
STREAMS_BESIDE = 64  # requests that need no engine (health, models, the page), on top of the engine's own limit


def spec_of(plan: Plan, port: int | None = None) -> ServeSpec:
    """What a recipe serves: the model below its adapter as "base", and every adapter of the workspace's store that belongs to that, its own
    first; a fully trained model alone. Its own is published if it is not there yet, and asked for by its version: the name
    may stand for another one."""
    recipe, (base, revision, adapters), sft = plan.recipe, plan.trained(), plan.artifact("sft")
    store = AdapterStore(plan.served)
    own = store.publish(recipe.name, sft).id if adapters else None
    return ServeSpec(
        base=base,
        revision=revision,
        precision=recipe.model.precision,
        identity=plan.base_identity() if adapters else sft.digest,
        tokenizer=str(sft.path),
        store=str(plan.served) if adapters else None,
        ready=(own,) if own else (),
        base_name=BASE_NAME if adapters else recipe.name,
        port=port or recipe.serve.port,
        image_pixels=recipe.shard.image_pixels,
        **{key: getattr(recipe.serve, key) for key in SHARED},
    )


def own_key() -> str | None:
    """The first of GRAFT_API_KEY's."""
    return os.environ.get("GRAFT_API_KEY", "").split(",")[0].strip() or None


def check_address(host: str, port: int, key: str | None) -> None:
    """ServeError where the port is taken, or where the host is open to others and there is no key."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an ended server do not count
            probe.bind((host, port))
            probe.listen(1)
    except ValueError:
        raise ServeError(f"serve.host = {host!r} is no address: write localhost, 127.0.0.1, or the address of an interface") from None
    except OSError as e:
        raise ServeError(
            f"port {port} on {host} is in use or cannot be had ({e.strerror}): stop what listens there, or set --set serve.port=N"
        ) from None
    if not loopback and not key:
        raise ServeError(f"serve.host = {host!r} is open to other machines: set GRAFT_API_KEY, which clients must then send, or use 127.0.0.1")


class Replica:
    """What Ray Serve runs: the runner's thread and the HTTP app over it, in one process. direct: it listens on the server's port itself."""

    def __init__(self, spec: ServeSpec, keys: Keys, direct: bool = False):
        self.runner, self.keys, self.listener = Runner(spec), keys, None
        if direct:
            from graft.serve.listener import Listener

            self.listener = Listener(self.__serve_build_asgi_app__(), spec.host, spec.port, DRAIN_S)

    def __serve_build_asgi_app__(self) -> Any:
        from graft.serve.api import build

        return build(self.runner, self.keys)

    def check_health(self) -> None:
        """Called by Ray Serve, which replaces the replica on an error: an engine that ended does not come back by itself."""
        if self.listener and not self.listener.alive:
            raise ServeError("nothing listens any more")
        if self.runner.engine is not None and not self.runner.thread.is_alive():
            raise ServeError(self.runner.error or "the engine has stopped")

    def __del__(self) -> None:
        """Called by Ray Serve when the replica shall end."""
        if listener := getattr(self, "listener", None):
            listener.stop()


@dataclass
class Server:
    """A server that answers. `stop` ends it and whatever was started for it; leaving a `with` block does the same."""

    url: str  # http://host:port
    dashboard_url: str | None
    start_s: float
    stop: Callable[[], None]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


def start(spec: ServeSpec, temp_dir: str | None = None, timeout_s: float = 1800.0) -> Server:
    """Start Ray (unless this process has one), Serve and the engine; return once a token was generated.

    ServeError where the address cannot be had, the model does not load, or nothing is ready after `timeout_s`; then
    everything that was started is stopped again. temp_dir: Ray's session folder, short (its sockets lie in it).
    """
    keys = Keys.of(os.environ)
    key = own_key()
    check_address(spec.host, spec.port, key)
    began = time.monotonic()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve
    from ray.serve.schema import LoggingConfig

    with ExitStack() as undo:
        dashboard, machines = None, 0  # of a cluster that was joined
        if ray.is_initialized():  # another's Ray: only Serve is ours to stop
            undo.callback(serve.shutdown)
        elif address := os.environ.get("RAY_ADDRESS"):
            undo.callback(ray.shutdown)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": PROXIED})
            undo.callback(serve.shutdown)
            machines = sum(node["Alive"] for node in ray.nodes())
        else:
            undo.callback(ray.shutdown)  # ends Serve with it; serve.shutdown before that would print the raylet's complaint
            context = ray.init(
                address="local",
                runtime_env={"env_vars": PROXIED},
                num_cpus=max(2, os.cpu_count() or 2),
                object_store_memory=OBJECT_STORE,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=temp_dir,
            )
            dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else None
            token = Path.home() / ".ray" / "auth_token"
            if token.is_file():
                token.chmod(0o600)  # Ray writes it readable to everyone
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = spec.replicas if spec.replicas > 1 or not machines else gpus or machines
        direct = count == 1 and not machines
        http_options = {"host": spec.host, "port": spec.port}
        serve.start(proxy_location="Disabled" if direct else "HeadOnly", http_options=http_options, logging_config=quiet)
        across: Any = {"num_replicas": count, **({"max_replicas_per_node": 1} if machines and not gpus and count <= machines else {})}
        deployment = serve.deployment(
            name="graft",
            **across,
            max_ongoing_requests=spec.max_waiting + 2 * spec.max_batch + STREAMS_BESIDE,  # the runner itself says 429, and earlier
            ray_actor_options={"num_cpus": 1, "num_gpus": min(gpus, 1)},
            health_check_period_s=2,
            graceful_shutdown_wait_loop_s=0.1,
            graceful_shutdown_timeout_s=DRAIN_S,
            logging_config=quiet,
        )(Replica if direct else serve.ingress()(Replica))
        serve.run(deployment.bind(spec, keys, direct), name="graft", route_prefix=None if direct else "/", logging_config=quiet)
        undo.callback(serve.delete, "graft")  # answers under way may end
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(spec.host, spec.host)
        wait_until_ready(host, spec.port, key, began + timeout_s)
        url = f"http://[{host}]:{spec.port}" if ":" in host else f"http://{host}:{spec.port}"
        return Server(url, dashboard, time.monotonic() - began, undo.pop_all().close)


def wait_until_ready(host: str, port: int, key: str | None, deadline: float) -> None:
    """Ask /ready until it says 200; ServeError where loading failed or `deadline` (monotonic seconds) has passed."""
    state = "nothing answered"
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection(host, port, timeout=5)  # no proxy, whatever the environment says
        try:
            connection.request("GET", "/ready", headers={"Authorization": f"Bearer {key}"} if key else {})
            reply = connection.getresponse()
            if reply.status == 200:
                return
            found = json.loads(reply.read())
            if found.get("status") == "failed":
                raise ServeError(f"the model cannot be served: {found['error']}")
            state = f"the last answer was {found}"
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as e:
            state = f"the last answer was {type(e).__name__}: {e}"
        finally:
            connection.close()
        time.sleep(0.1)
    raise ServeError(f"the server on {host}:{port} did not become ready in time ({state}): see the logs in Ray's session folder")
