"""The stages of a recipe: what each reads, where its artifact lies, and whether it is complete.

A stage is a function from (its recipe keys + parent artifacts + external inputs) to one artifact. The fingerprint
hashes all of these with the stage's version, so an edited seed, corpus, base or key is never skipped over.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from graft.core.artifact import MANIFEST, Artifact, Draft, digest_of, point, sha256_file, write_text_atomic, writing
from graft.core.errors import ArtifactError, ConfigError
from graft.core.files import files_at
from graft.core.hub import HUB, UNREACHABLE, Kind, OutOfReach, commit_of, dataset_of
from graft.core.json_schema import Schema, read_schema
from graft.core.recipe import Recipe, load, pick
from graft.core.sections import EvalTask
from graft.core.stage_list import CHECKPOINTS, DATA, Stage, stages

GRAMMAR = Path(__file__).parents[1] / "data" / "grammar.toml"
IDENTITY = Path(__file__).parents[1] / "data" / "identity.toml"


@dataclass
class Plan:
    """A recipe bound to a workspace: resolves each stage's inputs, fingerprint and directory.

    hub: what its branches stand for is asked, or is as the last `graft run` here recorded it, so that a branch that moved does not
    part ranks and servers from that run; or it is looked at, and what cannot be from here stands in `unseen` with the reason: enough to validate.
    """

    path: Path
    overrides: tuple[str, ...] = ()
    root: Path = Path(".")
    hub: Literal["ask", "recorded", "look"] = "ask"

    def __post_init__(self) -> None:
        self.path, self.root = Path(self.path).resolve(), Path(self.root).resolve()
        if not next(p for p in (self.root, *self.root.parents) if p.exists()).is_dir():
            raise ConfigError(f"the workspace {self.root} is no folder: give --workspace one, or a place for one")
        self.recipe = load(self.path, self.overrides)
        self.stages = {s.name: s for s in stages(self.recipe)}
        self._commits = self._recorded() if self.hub == "recorded" else {}
        self.unseen: dict[str, str] = {}

    # ---- places -------------------------------------------------------------------------------------------------
    def beside(self, relative: str) -> Path:
        """A path that the recipe names, relative to the recipe's own folder."""
        return (self.path.parent / relative).resolve()

    def home(self, place: str) -> Path:
        return self.root / place / self.recipe.name

    def directory(self, stage: str, fingerprint: str) -> Path:
        return self.home(self.stages[stage].place) / stage / fingerprint[:12]

    def run_directory(self, stage: str, fingerprint: str) -> Path:
        """Where a training run keeps metrics and sharded checkpoints while (and after) it runs."""
        return self.home(CHECKPOINTS) / "runs" / f"{stage}-{fingerprint[:12]}"

    @property
    def endpoint(self) -> str | None:
        """The API's base URL from the environment, None for the embedded endpoint; ConfigError where it is none."""
        if not (url := os.environ.get("OPENAI_BASE_URL")):
            return "https://api.openai.com/v1" if os.environ.get("OPENAI_API_KEY") else None
        with suppress(ValueError):  # what is printed is not the address: it may hold a password
            address = urlsplit(url)
            if address.scheme in ("http", "https") and address.hostname and address.port != 0:
                return url
        raise ConfigError("OPENAI_BASE_URL is no address of HTTP: write it as https://host/v1 or http://host:port/v1")

    # ---- resolving ----------------------------------------------------------------------------------------------
    def resolve(self, stage: str) -> Job:
        """The stage with its parents; ArtifactError names the first parent that is not complete."""
        spec = self.stage(stage)
        parents = {}
        for name in spec.parents:
            job = self.resolve(name)
            if job.artifact is None:
                raise ArtifactError(
                    f"stage {stage!r} needs {name!r}, which is not complete: run `graft run {self.path.name}` (or with --from {name})"
                )
            parents[name] = job.artifact
        head: dict[str, Any] = {
            "recipe": self.recipe.model_dump(mode="json"),
            "stage_version": spec.version,
            "keys": pick(self.recipe, spec.keys),
            "inputs": {name: self.external_input(name) for name in spec.inputs},
            "parents": {
                n: {
                    "path": os.path.relpath(a.path, self.root),
                    "fingerprint": a.manifest["fingerprint"],
                    "digest": a.digest_of_files(spec.parents[n]),
                }
                for n, a in parents.items()
            },
        }
        fingerprint = digest_of(
            {
                "stage": stage,
                "version": spec.version,
                "keys": head["keys"],
                "inputs": head["inputs"],
                "parents": {n: p["digest"] for n, p in head["parents"].items()},
            }
        )
        return Job(self, spec, fingerprint, head, parents)

    def artifact(self, stage: str) -> Artifact:
        """The complete artifact of a stage; ArtifactError where it is missing."""
        found = self.resolve(stage).artifact
        if found is None:
            raise ArtifactError(f"stage {stage!r} of {self.recipe.name!r} is not complete: run `graft run {self.path.name}`")
        return found

    def latest(self, stage: str) -> Artifact:
        """The artifact that `current` points at, whatever was edited since; ArtifactError where none was ever made."""
        current = self.home(self.stage(stage).place) / stage / "current"
        if not current.exists():
            raise ArtifactError(f"stage {stage!r} of {self.recipe.name!r} was never completed: run `graft run {self.path.name} --until {stage}`")
        return Artifact.open(current.resolve())

    def stage(self, name: str) -> Stage:
        """The stage of that name; ConfigError names those there are."""
        if name not in self.stages:
            raise ConfigError(f"recipe {self.recipe.name!r} has no stage {name!r}: it has {', '.join(self.stages)}")
        return self.stages[name]

    @property
    def base_parent(self) -> str | None:
        """The stage whose artifact is the model under the sft adapter, None where that is the recipe's own base."""
        return "merge" if self.recipe.cpt else "base" if self.recipe.base else None

    def base_model(self, stage: str = "sft") -> tuple[str, str | None]:
        """(folder or hub id, revision) of the frozen model that `stage` starts from."""
        for parent in ("merge", "base", "init"):
            if parent in self.stage(stage).parents:
                return str(self.artifact(parent).path), None
        return self.external_base()

    def base_identity(self, stage: str = "sft") -> str:
        """What tells the frozen model that `stage` starts from from any other: a digest, or a hub id with its commit."""
        for parent in ("merge", "base", "init"):
            if parent in self.stage(stage).parents:
                return self.artifact(parent).digest
        found = self.external_input("model")
        return found if isinstance(found, str) else digest_of(found)

    @property
    def served(self) -> Path:
        """The store of adapters of this workspace (core/store.py)."""
        return self.root / CHECKPOINTS / "served"

    def trained(self) -> tuple[str, str | None, dict[str, Path]]:
        """(folder or hub id, revision, adapters by name) that evaluate and serve load; a fully trained model has no adapter."""
        sft = self.artifact("sft").path
        if self.recipe.train_stage("sft").lora is None:
            return str(sft), None, {}
        return *self.base_model("sft"), {self.recipe.name: sft}

    def external_base(self) -> tuple[str, str | None]:
        """(folder, None) or (hub id, commit); ConfigError where the recipe's base is neither."""
        return self._model("model.base", self.recipe.model.base, self.recipe.model.revision)

    def semantic_encoder(self) -> tuple[str, str | None]:
        """The same of evaluate.semantic, a folder, `owner/name` or `owner/name@revision`."""
        name = self.recipe.evaluate.semantic or ""
        base, _, revision = (name, "", "") if self.beside(name).is_dir() else name.partition("@")
        return self._model("evaluate.semantic", base, revision or None)

    def _model(self, key: str, base: str, revision: str | None) -> tuple[str, str | None]:
        if (folder := self.beside(base)).is_dir():
            return str(folder), None
        if base.startswith((".", "/", "~")) or base.count("/") != 1:
            raise ConfigError(f"{key} = {base!r} is neither a folder beside the recipe nor a hub id like 'owner/name'")
        return base, self._commit("model", base, revision, key)

    @property
    def chat_template(self) -> str:
        """The recipe's, as `load_tokenizer` takes it: "tokenizer", another name, or the text of the recipe's file."""
        model = self.recipe.model
        if model.template_file is None:
            return model.chat_template
        self.external_input("template")  # it is there
        try:
            return self.beside(model.template_file).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigError(f"model.chat_template names {model.template_file}, which is no UTF-8: save it as UTF-8") from None

    # ---- the hub ------------------------------------------------------------------------------------------------
    def dataset_commit(self, path: str) -> str:
        """The commit that a corpus such as `hub:owner/name` is read at."""
        dataset = dataset_of(path)
        return self._commit("dataset", dataset.name, dataset.revision)

    def _commit(self, kind: Kind, name: str, revision: str | None, of: str = "model.base") -> str:
        """What a revision stands for, asked once: a run reads one commit, whatever is pushed meanwhile."""
        key = f"{kind} {name}@{revision or 'main'}"
        if key not in self._commits:
            try:
                if UNREACHABLE in self.unseen.values():  # nobody waits for it again
                    raise OutOfReach(UNREACHABLE, UNREACHABLE)
                self._commits[key] = commit_of(kind, name, revision, of)
            except OutOfReach as e:
                if self.hub != "look":
                    raise
                self.unseen[name if kind == "model" else f"{HUB}{name}"] = e.why
                self._commits[key] = revision or "main"
        return self._commits[key]

    def record_commits(self) -> None:
        """Keep the commits that this run reads for those who share its artifacts."""
        if self._commits:
            self._commits_file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self._commits_file, json.dumps(self._recorded() | self._commits, indent=1))

    def _recorded(self) -> dict[str, str]:
        return json.loads(self._commits_file.read_text()) if self._commits_file.is_file() else {}

    @property
    def _commits_file(self) -> Path:
        return self.home(DATA) / ".commits.json"

    # ---- external inputs ----------------------------------------------------------------------------------------
    def external_input(self, name: str) -> Any:
        """What a fingerprint records of an input that is no artifact; ConfigError where it is not there."""
        if name == "seeds":
            return self._digest(self.beside(self.recipe.augmentation.seeds or ""), "augment.seeds")
        if name == "images":
            return self._images()
        if name == "review":
            return self._digest(self.review_file, "review") if self.review_file.is_file() else None
        if name == "deepspeed":
            return self._digest(self.beside(self.recipe.deepspeed), "deepspeed")
        if name == "corpora":
            return {
                c: f"{HUB}{dataset_of(s.path).name}@{self.dataset_commit(s.path)}" if s.path.startswith(HUB) else self._content(self._corpus_files(c))
                for c, s in self.recipe.corpora.items()
                if s.path
            } | {f"{c}.images": self.images_digest(f"corpora.{c}", s.images) for c, s in self.recipe.corpora.items() if s.images}
        if name == "evaluation":
            tasks = self.external_input("tasks").values()
            read = {n: t.model_dump(mode="json", include={"layout", "text", "mcq"}) for n, t in self.recipe.evaluate.tasks.items()}
            return [*(self._digest(self.beside(p), "decontaminate.sets") for p in self.recipe.decontaminate.sets), *tasks, read]
        if name == "template":
            return self._digest(self.beside(self.recipe.model.template_file or ""), "model.chat_template")
        if name == "tasks":
            return {k: v for name, task in self.recipe.evaluate.tasks.items() for k, v in self._asked(name, task).items()}
        if name == "schemas":
            return {name: digest_of(self.answer_schema(name)) for name, task in self.recipe.tasks.items() if task.answer_schema}
        if name == "machine":  # corpora that are made, not read: by this interpreter's library, by this graft's grammar
            kinds = {c.kind for c in self.recipe.corpora.values()}
            return {
                "python": platform.python_version() if "docstrings" in kinds else None,
                "grammar": sha256_file(GRAMMAR) if kinds & {"grammar", "dialogues"} else None,
                **({"identity": sha256_file(IDENTITY)} if "identity" in kinds else {}),
                **({"pillow": version("pillow")} if "drawings" in kinds else {}),
            }
        if name == "endpoint":
            url = self.endpoint
            return f"embedded {sha256_file(GRAMMAR)[:12]}" if url is None else urlsplit(url).netloc.rsplit("@", 1)[-1]
        key, (base, commit) = ("evaluate.semantic", self.semantic_encoder()) if name == "semantic" else ("model.base", self.external_base())
        if commit:
            return f"{HUB}{base}@{commit}"
        folder = Path(base)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{key} = {base!r} is no model folder: it has no config.json; name a Hugging Face model folder")
        return {p.name: self._digest(p, key) for p in sorted(folder.iterdir()) if p.is_file()}

    def _corpus_files(self, corpus: str) -> list[Path]:
        """The files of a corpus as they are read; ConfigError where there are none."""
        path = self.beside(self.recipe.corpora[corpus].path or "")
        if not (files := files_at(path)):
            raise ConfigError(f"corpora.{corpus}.path names {path}, where no file is: mend the path (it is relative to {self.path.parent})")
        return files

    def _asked(self, name: str, task: EvalTask) -> dict[str, Any]:
        """What a task's questions are made of: a file, with its folder of images, or drawings by this Pillow."""
        if task.path is None:
            return {name: {"drawings": task.drawings, "seed": task.seed, "pillow": version("pillow")}}
        key = f"evaluate.tasks.{name}"
        shown = {f"{name}.images": self.images_digest(key, task.images)} if task.images else {}
        return {name: self._digest(self.beside(task.path), f"{key}.path"), **shown}

    def answer_schema(self, task: str) -> Schema | None:
        """The JSON Schema that a task's answers must satisfy, None where the recipe names none; ConfigError where its file holds none."""
        file, own = self.recipe.tasks[task].answer_schema, task in self.recipe.evaluate.tasks
        return read_schema(self.beside(file), f"evaluate.tasks.{task}.answer_schema" if own else "augment.images.answer_schema") if file else None

    def images_digest(self, key: str, images: str) -> str:
        """Of every file in the folder that `key`.images names, hidden ones left out; ConfigError where there is no folder."""
        folder = self.beside(images)
        if not folder.is_dir():
            raise ConfigError(f"{key}.images names {folder}, which is no folder: mend the path (it is relative to {self.path.parent})")
        return digest_of({str(p.relative_to(folder)): d for p, d in self.digests(_visible(folder)).items()})

    def _content(self, paths: list[Path]) -> dict[str, str]:
        return {os.path.relpath(p, self.path.parent): d for p, d in self.digests(paths).items()}

    @property
    def review_file(self) -> Path:
        """A person's decisions on the recipe's rows (`graft review`)."""
        return self.home(DATA) / "review.jsonl"

    def _images(self) -> dict[str, Any]:
        """Digests of the image source: the listing with the local files it names, or every file of the folder."""
        images = self.recipe.augmentation.images
        assert images is not None
        schema = self._digest(self.beside(images.answer_schema), "augment.images.answer_schema") if images.answer_schema else None
        if images.file:
            listing = self.beside(images.file)
            found: dict[str, Any] = {"file": self._digest(listing, "augment.images.file")}
            local = sorted({self.beside(name) for name in _listed(listing) if "://" not in name and os.path.isfile(self.path.parent / name)})
        else:
            folder = self.beside(images.folder or "")
            if not folder.is_dir():
                raise ConfigError(f"augment.images.folder names {folder}, which is no folder: mend the path (it is relative to {self.path.parent})")
            found, local = {}, _visible(folder)
        digests = self.digests(local)
        return {
            **found,
            "schema": schema,
            "images": len(local),
            "content": digest_of({os.path.relpath(p, self.path.parent): d for p, d in digests.items()}),
        }

    def _digest(self, path: Path, key: str) -> str:
        if not path.is_file():
            raise ConfigError(f"{key} names {path}, which is no file: mend the path (it is relative to {self.path.parent})")
        return self.digests([path])[path]

    def digests(self, paths: list[Path]) -> dict[Path, str]:
        """SHA-256 of external files, remembered by (path, size, mtime) so that a second run reads no base again."""
        memory = self.home(DATA) / ".digests.json"
        known = json.loads(memory.read_text()) if memory.is_file() else {}
        found, new = {}, False
        for path in paths:
            stat = path.stat()
            tag = f"{path}:{stat.st_size}:{stat.st_mtime_ns}"
            if tag not in known:
                known[tag], new = sha256_file(path), True
            found[path] = known[tag]
        if new:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(memory, json.dumps(known, indent=1))
        return found

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer a recipe and workspace; ConfigError where another process holds it."""
        self.home(DATA).mkdir(parents=True, exist_ok=True)
        with (self.home(DATA) / ".lock").open("w") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"another `graft run` works on {self.recipe.name!r} in {self.root}: wait for it, or use --workspace") from None
            yield


@dataclass
class Job:
    """One stage ready to run: its parents are complete and its fingerprint is known."""

    plan: Plan
    stage: Stage
    fingerprint: str
    head: dict[str, Any]
    parents: dict[str, Artifact]

    @property
    def recipe(self) -> Recipe:
        return self.plan.recipe

    @property
    def directory(self) -> Path:
        return self.plan.directory(self.stage.name, self.fingerprint)

    @property
    def run_directory(self) -> Path:
        return self.plan.run_directory(self.stage.name, self.fingerprint)

    @property
    def artifact(self) -> Artifact | None:
        """The finished artifact, None where it was never completed; ArtifactError where it was damaged."""
        return Artifact.open(self.directory) if (self.directory / MANIFEST).exists() else None

    @contextmanager
    def writing(self) -> Iterator[Draft]:
        """Publish this job's artifact and point `current` at it."""
        with writing(self.directory, kind=self.stage.name, fingerprint=self.fingerprint, head=self.head) as draft:
            yield draft
        self.mark_current()

    def discard(self) -> None:
        """Remove the artifact and its training run; a kill on the way leaves no half of the artifact under its name."""
        doomed = self.directory.with_name(f".{self.directory.name}.draft-discarded")  # the next writer sweeps what is left
        os.rename(self.directory, doomed)
        shutil.rmtree(doomed)
        shutil.rmtree(self.run_directory, ignore_errors=True)

    def mark_current(self) -> None:
        point(self.directory.parent / "current", self.directory)


def _visible(folder: Path) -> list[Path]:
    """The files in a folder and below it, sorted, hidden ones left out."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _listed(listing: Path) -> Iterator[str]:
    """The images that a JSONL file names; lines that name none are the stage's to reject."""
    with listing.open("rb") as f:
        for line in f:
            with suppress(ValueError, AttributeError, RecursionError):
                if isinstance(name := json.loads(line).get("image"), str):
                    yield name


def lineage(path: Path) -> list[tuple[int, Artifact]]:
    """(depth, artifact) of an artifact and all its ancestors, each once, the artifact itself first."""
    path = Path(path).resolve()
    start = next((p for p in (path, *path.parents) if (p / MANIFEST).is_file()), None)
    if start is None:
        raise ArtifactError(f"{path} lies in no artifact: give a folder under data_shards/ or checkpoints/ that holds a {MANIFEST}")
    root = start
    while root.name not in (DATA, CHECKPOINTS) and root != root.parent:
        root = root.parent
    seen: set[Path] = set()
    found: list[tuple[int, Artifact]] = []

    def visit(folder: Path, depth: int) -> None:
        if folder in seen:
            return
        seen.add(folder)
        artifact = Artifact.open(folder)
        found.append((depth, artifact))
        for parent in artifact.manifest["parents"].values():
            visit((root.parent / parent["path"]).resolve(), depth + 1)

    visit(start, 0)
    return found
