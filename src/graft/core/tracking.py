"""wandb by choice, online or offline: a run a stage, `<recipe>/<stage>`, in the group of its recipe run; imported only where a recipe asks for it.

What is told comes from metrics.jsonl, whose step is the global step and wandb's own. A launch begins with the steps that wandb lacks: offline that is all of
them, into a new folder that replaces the one of the launch before, whose last buffer a kill may have cost; online what the server has not. So no step is there
twice: offline a replayed step replaces, online wandb keeps the first. Manifests are linked as artifacts, no weights unless asked; no command line, code, package
list or host is told. Once begun, nothing that goes wrong here ends what is tracked.
"""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from graft.core.artifact import MANIFEST, Artifact, digest_of, write_text_atomic
from graft.core.errors import ConfigError
from graft.core.metrics import read_metrics
from graft.core.recipe import Tracking, pick
from graft.core.stages import Job, Plan

BEGIN_S, END_S = 60.0, 60.0  # that an unreachable server may hold a run up, before its first step and after its last
MEND = "set tracking.wandb = 'offline' and `wandb sync` later"


def check(tracking: Tracking) -> None:
    """ConfigError where the package is missing, or online no key is found; asks nobody."""
    if tracking.wandb == "off":
        return
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports, which go elsewhere
    try:
        import wandb
        from wandb.sdk.lib import wbauth
    except ImportError as e:
        raise ConfigError(
            f"tracking.wandb = {tracking.wandb!r} needs the package wandb ({e}): pip install 'wandb>=0.31', or set tracking.wandb = 'off'"
        ) from None
    if tracking.wandb == "online":
        try:
            found = wbauth.authenticate_session(host=wandb.setup().settings.base_url, source="graft", prompt=False, update_session=False)
        except Exception as e:  # noqa: BLE001  a key of the wrong form, two of them
            raise ConfigError(f"tracking.wandb = 'online': {_line(e)}: mend WANDB_API_KEY, or {MEND}") from None
        if found is None:
            raise ConfigError(f"tracking.wandb = 'online' finds no API key: set WANDB_API_KEY or run `wandb login`, or {MEND}")


class Tracker:
    """One stage's run, by one process. ConfigError from its making, where wandb does not begin; later troubles are one line, and what follows is not told."""

    def __init__(self, job: Job, history: Path | None = None):
        """history: the metrics.jsonl of steps that an earlier launch took."""
        import wandb

        self.job, self.gone = job, False
        tracking, folder = job.recipe.tracking, job.run_directory
        folder.mkdir(parents=True, exist_ok=True)
        earlier = list((folder / "wandb").glob("offline-run-*"))
        mode: Any = tracking.wandb
        nothing: Any = {"x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False, "disable_git": True, "host": ""}
        try:
            self.run: Any = wandb.init(
                project=tracking.project,
                name=f"{job.recipe.name}/{job.stage.name}",
                group=group_of(job.plan),
                job_type=job.stage.name,
                id=_id(job, folder),
                resume="allow",
                mode=mode,
                dir=str(folder),
                config={"seed": job.recipe.seed, "fingerprint": job.fingerprint, **job.head["keys"]},
                save_code=False,
                settings=wandb.Settings(**nothing, program="graft", console="off", silent=True, init_timeout=BEGIN_S, finish_timeout=END_S),
            )
        except Exception as e:  # noqa: BLE001  wandb has many ways to fail, without a network among them
            raise ConfigError(f"tracking.wandb = {tracking.wandb!r} does not begin ({_line(e)}): mend the network or the key, or {MEND}") from None
        for line in read_metrics(history) if history and history.is_file() else ():
            if line["step"] >= self.run.step:
                self.log(line)
        for old in earlier:
            if not _sent(old):
                shutil.rmtree(old, ignore_errors=True)

    def log(self, metrics: dict[str, Any]) -> None:
        """Of one step."""
        self._attempt(lambda: self.run.log({k: v for k, v in metrics.items() if v is not None}, step=metrics["step"]))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], summary: dict[str, float]) -> None:
        """A table, and figures of the whole run."""
        import wandb

        self._attempt(lambda: self.run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])}))
        self._attempt(lambda: self.run.summary.update(summary))

    def finish(self, artifact: Artifact | None) -> None:
        """Link what was made with what it was made of, and close; what an unreachable server does not take within END_S stays on the disk."""
        closing = threading.Thread(target=self._attempt, args=(lambda: self._close(artifact),), daemon=True)
        closing.start()
        closing.join(2 * END_S)
        if closing.is_alive():
            self._fail(f"it has not taken everything in {2 * END_S:.0f} s")

    def _close(self, artifact: Artifact | None) -> None:
        if artifact:
            for parent in self.job.parents.values():
                # what run.use_artifact does of an artifact of one's own, without waiting for a server, so that it is recorded offline too: of the
                # same content, it is the version that the parent's own run has logged
                self.run._log_artifact(
                    self._described(parent), aliases=[parent.manifest["fingerprint"][:12]], is_user_created=True, use_after_commit=True
                )
            self.run.log_artifact(self._described(artifact), aliases=[artifact.manifest["fingerprint"][:12]])
            if self.job.recipe.tracking.weights:
                self.run.log_artifact(self._described(artifact, whole=True))
        self.run.finish()

    def _described(self, artifact: Artifact, whole: bool = False) -> Any:
        """The manifest as an artifact of wandb's: lineage, fingerprints, counts; whole: every file."""
        import wandb

        m = artifact.manifest
        name = f"{self.job.recipe.name}-{m['kind']}"
        told = {k: m.get(k) for k in ("fingerprint", "digest", "graft", "commit", "counts")}
        found = wandb.Artifact(f"{name}-weights", "weights", metadata=told) if whole else wandb.Artifact(name, m["kind"], metadata=told)
        if whole:
            found.add_dir(str(artifact.path), policy="immutable")  # artifacts never change: no copy is made
        else:
            found.add_file(str(artifact.path / MANIFEST), policy="immutable")
        return found

    def _attempt(self, act: Callable[[], Any]) -> None:
        if not self.gone:
            try:
                act()
            except Exception as e:  # noqa: BLE001  whatever it is, the stage goes on
                self._fail(_line(e))

    def _fail(self, why: str) -> None:
        self.gone = True
        print(
            f"wandb: {why}; {self.job.stage.name} goes on without it, what it has is in {self.job.run_directory / 'wandb'} (`wandb sync`)", flush=True
        )


def begin(job: Job, history: Path | None = None) -> Tracker | None:
    """The stage's tracker, None where the recipe wants none; raises as check() and Tracker."""
    check(job.recipe.tracking)
    return None if job.recipe.tracking.wandb == "off" else Tracker(job, history)


def group_of(plan: Plan) -> str:
    """What ties the stages of one recipe run: the recipe's name and a digest of the keys that decide what it trains."""
    trained = max((n for n, spec in enumerate(plan.stages.values()) if spec.room == "launch"), default=-1)
    keys = [pick(plan.recipe, spec.keys) for spec in list(plan.stages.values())[: trained + 1] if spec.name != "questions"]
    return f"{plan.recipe.name}-{digest_of(keys)[:8]}"


def _id(job: Job, folder: Path) -> str:
    """The id of a training run, the same in all its launches. One that wandb's server may hold already goes on online alone: offline nobody knows its steps."""
    file = folder / "wandb.id"
    known = file.read_text(encoding="utf-8") if file.is_file() else None
    if known and job.recipe.tracking.wandb == "offline":
        told = folder / "wandb"
        if list(told.glob(f"run-*-{known}")) or any(_sent(old) for old in told.glob(f"offline-run-*-{known}")):
            print(f"wandb: run {known} was sent already, offline it goes on as another, from its first step", flush=True)
            known = None
    if known is None:
        known = f"{job.stage.name}-{job.fingerprint[:12]}-{secrets.token_hex(3)}"
        write_text_atomic(file, known)
    return known


def _sent(folder: Path) -> bool:
    """Whether `wandb sync` has begun to send an offline run."""
    return any(folder.glob("*.wandb.sync*"))


def _line(error: BaseException) -> str:
    """In one line, without what the environment holds as a key."""
    said = " ".join(str(error).split())[:200] or type(error).__name__
    key = os.environ.get("WANDB_API_KEY")
    return said.replace(key, "…") if key else said
