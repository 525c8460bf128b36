"""The recipe: one frozen, typed tree that says what to make and never where.

People write TOML (`configs/recipes/*.toml`); machines read the resolved JSON that lies beside every artifact.
`load("configs/recipes/X.toml", ["sft.lr=1e-4"])` costs about 0.2 s and imports no torch.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from graft.core.errors import ConfigError
from graft.core.sections import (
    Api,
    Augment,
    Corpus,
    Count,
    Decontaminate,
    Dedup,
    EvalTask,
    Evaluate,
    Name,
    Prepare,
    Section,
    Shard,
    Share,
    Task,
)

M = TypeVar("M", bound=BaseModel)


BASE_NAME = "base"  # of the untrained model, where adapters are served beside it
HELD_OUT = "test"  # the task of the rows of images that prepare held out


class Lora(Section):
    r: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Share = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


Kept = Literal["none", "selective", "full"]
FUSED_RANK = 64  # of the widest adapter that a GPU runs inside a layer's kernels (model/blocks.py)


class Train(Section):
    """One training stage. The global batch is counted in bins and does not change with the number of GPUs."""

    corpora: tuple[str, ...] = ()  # names in [corpora]; sft reads the augmented rows too
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict
    )  # how often each document of a corpus is used; 0.25: a quarter of them, once
    lora: Lora | None = Lora()  # absent (`lora = false`): all weights are trained
    lr: Annotated[float, Field(gt=0)] = 2e-4
    epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Count | None = None
    global_batch: Count = 8  # bins a step
    micro_batch: Count | Literal["auto"] = "auto"  # bins a forward, at most; auto: with activation_checkpointing, the fastest that fits the GPU
    pack: bool = True  # false: one document a bin, padded
    warmup: Share | Count = 0.03  # a share of all steps; from 1 on, steps
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    spike_deviations: Annotated[float, Field(gt=0)] | Literal[False] = 8.0  # a loss so far above the last ones' mean leaves its step out
    max_skipped: Count = 5  # steps left out in a row, for a spike or what is not finite, after which training stops
    activation_checkpointing: Kept | Literal["auto"] = "auto"  # what is computed again to save memory: nothing, wide activations, layers
    deterministic: bool = False  # on a GPU: the same bits in every run, by slower kernels
    tune_matmuls: bool | Literal["auto"] = "auto"  # on a GPU, LoRA's by the fastest kernels of cuBLAS and QuACK; auto: in runs of 30 minutes or more
    compile: bool = True  # on a GPU, decoder layers that graft has no kernels for
    train_vision: bool = False  # the vision tower too: adapters on its linear layers, or, with lora = false, its weights
    validate_every: Count | None = None  # steps
    keep: Literal["last", "best"] = "last"  # the weights that become the artifact; best: of the lowest validation loss
    patience: Count | None = None  # validations without a lower loss after which training stops
    save_every: Count = 100  # steps
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    on_save_failure: Literal["stop", "continue"] = "stop"  # when a checkpoint cannot be written: the disk is full
    hang_timeout_s: Annotated[float, Field(gt=0, le=7 * 86400)] = 600.0  # for a step; six times that to load, validate and save

    @model_validator(mode="after")
    def _best_needs_validations(self) -> Train:
        if (self.keep == "best" or self.patience) and not self.validate_every:
            raise ValueError("keep = 'best' and patience go by the validation loss: set validate_every = N, in steps")
        return self

    @model_validator(mode="after")
    def _selective_has_something_to_select(self) -> Train:
        if self.activation_checkpointing == "selective" and not self.fused:
            raise ValueError(f"activation_checkpointing = 'selective' is of the fused MLP, which needs LoRA of rank {FUSED_RANK} at most: use 'full'")
        return self

    @property
    def fused(self) -> bool:
        """Whether a GPU runs a decoder layer's halves as one operator each, of models that model/blocks.py knows."""
        return self.lora is not None and self.lora.r <= FUSED_RANK

    @model_validator(mode="before")
    @classmethod
    def _lora_false(cls, data: Any) -> Any:
        return {**data, "lora": None} if isinstance(data, dict) and data.get("lora") is False else data


NAMED_TEMPLATES = ("tokenizer", "chatml", "llama-3", "alpaca")


class Model(Section):
    base: str = "embedded"  # "embedded" (built by the recipe), a folder, or a hub id
    revision: str | None = None  # of a hub id: a branch, a tag or a commit; a run reads the commit that it names when the run begins
    precision: Literal["fp32", "bf16", "fp8", "nf4"] = "bf16"  # of the frozen base; adapters are bf16, or fp32 on an fp32 base
    chat_template: str = "tokenizer"  # the tokenizer's own, another by its name, or a .jinja file, relative to the recipe

    @field_validator("chat_template")
    @classmethod
    def _named_or_a_file(cls, value: str) -> str:
        if value not in NAMED_TEMPLATES and not value.endswith(".jinja"):
            raise ValueError(f"model.chat_template = {value!r} is none of {', '.join(map(repr, NAMED_TEMPLATES))}, and names no .jinja file")
        return value

    @property
    def template_file(self) -> str | None:
        """The .jinja file that the recipe names, relative to it."""
        return None if self.chat_template in NAMED_TEMPLATES else self.chat_template


class Vision(Section):
    """The vision tower of an embedded base, which is then a small Qwen2.5-VL."""

    hidden_size: Count = 64
    intermediate_size: Count = 128
    layers: Count = 2
    heads: Count = 4


class EmbeddedBase(Section):
    """A small Llama with its own byte-level BPE tokenizer, trained whole; for machines without a hub."""

    vocab_size: Annotated[int, Field(ge=300)] = 3000
    hidden_size: Count = 192
    intermediate_size: Count = 512
    layers: Count = 4
    heads: Count = 6
    kv_heads: Count = 3
    vision: Vision | None = None  # for recipes with images
    train: Train


class Serve(Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    system: str | None = None  # the system prompt that the chat page begins with, and under which `graft run` asks
    prompt: str = "幫我畫一隻在海邊散步的柴犬"  # what `graft run` asks the finished server
    engine: Literal["auto", "hf", "vllm"] = "auto"  # of evaluations too; auto: vllm where it is installed, beside a GPU and a base in bf16
    replicas: Count = 1  # engines; on a cluster that was joined, 1 stands for one a GPU, or a machine
    max_batch: Count = 16  # rows of an engine that are under way at once
    max_adapters: Count = 8  # in memory at once; others of the store are loaded when they are asked for
    max_rank: Annotated[int, Field(ge=1, le=512)] = 64
    kv_tokens: Count | None = None  # of all rows' keys and values, an engine; absent: what the memory allows
    max_images: Count = 16  # of a request, where the base sees images
    fetch_images: bool = False  # from http(s) URLs too, at public addresses; else requests carry them as data URLs
    max_concurrent: Count = 128  # requests of one key
    deadline_s: Annotated[float, Field(gt=0, le=86400)] = 600.0  # for a request


class Tracking(Section):
    wandb: Literal["off", "offline", "online"] = "off"
    project: str = "graft"
    weights: bool = False  # upload what was trained too; else its manifest alone


class Recipe(Section):
    name: Name
    seed: int = 0
    deepspeed: str = "../deepspeed/zero2.json"  # relative to the recipe
    task: Task = Task()
    api: Api = Api()
    augment: Augment | None = None  # absent: the recipe trains on corpora alone
    prepare: Prepare = Prepare()
    corpora: dict[Name, Corpus] = Field(default_factory=dict)
    dedup: Dedup = Dedup()
    decontaminate: Decontaminate = Decontaminate()
    shard: Shard = Shard()
    model: Model = Model()
    base: EmbeddedBase | None = None
    cpt: Train | None = None
    sft: Train | None = None  # absent: the recipe ends with its rows
    evaluate: Evaluate = Evaluate()
    serve: Serve = Serve()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        if self.name == "served":
            raise ValueError("name = 'served': 'served' is where the adapters of all recipes are (checkpoints/served), choose another")
        if self.augment is None and not self.corpora:
            raise ValueError("neither [augment] nor [corpora]: a recipe makes rows, reads corpora, or does both")
        if self.augment and self.augment.images and HELD_OUT in self.evaluate.tasks:
            raise ValueError(
                f"evaluate.tasks.{HELD_OUT}: so the held-out rows of [augment.images] are called, which are asked in any case; rename it"
            )
        if self.evaluate.semantic and "generation" not in {task.kind for task in self.tasks.values()}:
            raise ValueError(
                f"evaluate.semantic = {self.evaluate.semantic!r} scores tasks of kind 'generation', and there is none: add one, or leave it out"
            )
        if self.sft is None:
            if self.base or self.cpt:
                raise ValueError("[base] or [cpt] without [sft]: add an [sft] section, or leave all training out and the recipe ends with its rows")
            return self
        if self.augment is None and not self.sft.corpora:
            raise ValueError("sft has nothing to train on: add [augment], or name corpora of chats in sft.corpora")
        if (self.model.base == "embedded") != (self.base is not None):
            raise ValueError(
                f"model.base = {self.model.base!r} and a [base] section that is {'present' if self.base else 'absent'} "
                "do not go together: [base] describes the embedded base and nothing else"
            )
        for section, train in (("base.train", self.base.train if self.base else None), ("cpt", self.cpt), ("sft", self.sft)):
            if train is None:
                continue
            if not train.corpora and section != "sft":
                raise ValueError(f"{section}.corpora is empty: name at least one of {sorted(self.corpora) or 'the [corpora] you add'}")
            if missing := [c for c in train.corpora if c not in self.corpora]:
                raise ValueError(f"{section}.corpora names {missing[0]!r}, but [corpora] has {sorted(self.corpora)}")
            if missing := [c for c in train.weights if c not in (*train.corpora, *(["rows"] if section == "sft" else []))]:
                raise ValueError(f"{section}.weights names {missing[0]!r}, which {section}.corpora does not")
        if self.sft.lora and self.name == BASE_NAME:
            raise ValueError(f"name = {self.name!r} is what servers call the untrained model: choose another")
        if self.sft.lora and self.sft.lora.r > self.serve.max_rank:
            raise ValueError(
                f"sft.lora.r = {self.sft.lora.r} and serve.max_rank = {self.serve.max_rank}: what is trained could not be served; raise it"
            )
        if self.base and self.base.train.lora:
            raise ValueError("base.train.lora is set, but an embedded base is trained whole: write lora = false")
        for section, train in (("cpt", self.cpt), ("sft", self.sft)):
            if train and not train.lora and self.model.precision in ("fp8", "nf4"):
                raise ValueError(
                    f"{section}.lora = false and model.precision = {self.model.precision!r}: such weights cannot be trained whole; use bf16"
                )
        if self.asks_of_images and self.base and not self.base.vision:
            raise ValueError("images, but the embedded base sees none: add a [base.vision] section")
        for name, heads, width in (("base", self.base, 1), ("base.vision", self.base.vision if self.base else None, 4)):
            if heads and heads.hidden_size % (width * heads.heads):  # a tower's heads turn by row and by column, in pairs
                raise ValueError(
                    f"{name}.hidden_size = {heads.hidden_size} is no multiple of {f'{width} x ' * (width > 1)}{name}.heads = {heads.heads}"
                )
        if self.base and self.base.heads % self.base.kv_heads:
            raise ValueError(f"base.heads = {self.base.heads} is no multiple of base.kv_heads = {self.base.kv_heads}")
        return self

    @property
    def augmentation(self) -> Augment:
        """[augment]; ConfigError where the recipe has none."""
        if self.augment is None:
            raise ConfigError(f"recipe {self.name!r} makes no rows: it has no [augment] section")
        return self.augment

    @property
    def shows_images(self) -> bool:
        """Whether a training stage may see images."""
        return bool(self.sft) and any(map(self.stage_shows_images, self.train_stages()))

    def stage_shows_images(self, stage: str) -> bool:
        """Whether training stage `stage` may see images: of its corpora, or of the rows that augment makes of them."""
        rows = stage == "sft" and self.augment is not None and self.augment.images is not None
        return rows or any(name in self.corpora and self.corpora[name].shows_images for name in self.train_stage(stage).corpora)

    @property
    def asks_of_images(self) -> bool:
        """Whether a training stage or a task may show images."""
        return self.shows_images or any(task.shows_images for task in self.tasks.values())

    @property
    def learns_calls(self) -> bool:
        """Whether its own rows, made from seeds, are of calls and texts; else they are of images, or there are none."""
        return self.augment is not None and self.augment.seeds is not None

    @property
    def tasks(self) -> dict[str, EvalTask]:
        """Those of [evaluate.tasks] and, of a recipe that makes rows of images, HELD_OUT: its rows come from prepare, its path is empty."""
        if self.augment is None or self.augment.images is None:
            return self.evaluate.tasks
        schema = self.augment.images.answer_schema
        own = EvalTask(path="", images="", kind="json" if schema else "generation", answer_schema=schema)
        return {HELD_OUT: own, **self.evaluate.tasks}

    def train_stage(self, stage: str) -> Train:
        """The training section of stage `base`, `cpt` or `sft`; ConfigError where the recipe has none."""
        train = {"base": self.base.train if self.base else None, "cpt": self.cpt, "sft": self.sft}.get(stage)
        if train is None:
            raise ConfigError(f"stage {stage!r} is not in recipe {self.name!r}: it has {self.train_stages()}")
        return train

    def train_precision(self, stage: str) -> str:
        """How the weights that `stage` starts from are held; an embedded base is trained whole, which fp8 and nf4 cannot be."""
        return "bf16" if stage == "base" and self.model.precision in ("fp8", "nf4") else self.model.precision

    def train_stages(self) -> list[str]:
        return [s for s, t in (("base", self.base), ("cpt", self.cpt), ("sft", self.sft)) if t]


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read and validate a recipe; raises ConfigError with one line that says what, where and the mend."""
    tree = read_toml(Path(path), "recipe")
    for item in overrides:
        _override(tree, item)
    return validated(Recipe, tree, path)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The file as TOML has it; ConfigError where there is none, or none that can be read. what: "recipe"."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        raise ConfigError(f"no {what} at {path}" + (f": that folder has {', '.join(near)}" if near else "; give the path of a .toml file")) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as e:
        raise ConfigError(f"{path} is not a TOML file: {e}") from None


def validated(model: type[M], tree: dict[str, Any], path: str | Path) -> M:
    """The typed tree; ConfigError names up to three keys that are wrong, and the nearest valid one of those that are unknown."""
    try:
        return model.model_validate(tree)
    except ValidationError as e:
        raise ConfigError(f"{path}: " + "; ".join(_explain(err, model) for err in e.errors()[:3])) from None


def keys(model: type[BaseModel] = Recipe, prefix: str = "") -> list[str]:
    """Every key a recipe may hold, dotted; `corpora.*` stands for any name."""
    found = []
    for name, field in model.model_fields.items():
        child = _section_of(field.annotation)
        star = ".*" if "dict" in str(field.annotation) else ""
        found += keys(child, f"{prefix}{name}{star}.") if child else [f"{prefix}{name}"]
    return found


def pick(recipe: Recipe, dotted: tuple[str, ...]) -> dict[str, Any]:
    """The resolved values of some keys or whole sections, JSON-ready, for a fingerprint."""
    tree = recipe.model_dump(mode="json")

    def get(key: str) -> Any:
        node = tree
        for part in key.split("."):
            node = node[part] if node is not None else None
        return node

    return {key: get(key) for key in dotted}


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in getattr(annotation, "__args__", ()):
        if child := _section_of(arg):
            return child
    return None


def _override(tree: dict[str, Any], item: str) -> None:
    key, sep, text = item.partition("=")
    if not sep or not key.strip():
        raise ConfigError(f"--set {item!r} is not key=value, for example --set sft.lr=1e-4")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = key.strip().split(".")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {part!r} is a value, not a section")
    node[last] = value


def _explain(err: Any, model: type[BaseModel]) -> str:
    loc = [str(p) for p in err["loc"]]
    where = ".".join(loc)
    if err["type"] == "extra_forbidden":
        known = keys(model)
        parent = ".".join(loc[:-1])
        siblings = [k[len(parent) + 1 :].split(".")[0] if parent else k.split(".")[0] for k in known if k.startswith(parent)]
        near = difflib.get_close_matches(loc[-1], siblings, 1, 0.5) or difflib.get_close_matches(
            loc[-1], [k.rsplit(".", 1)[-1] for k in known], 1, 0.6
        )
        full = next((k for k in known if k.rsplit(".", 1)[-1] == near[0]), near[0]) if near and near[0] not in siblings else None
        hint = f"did you mean {full or '.'.join([*loc[:-1], near[0]])!r}?" if near else f"[{parent or 'top level'}] has {sorted(set(siblings))}"
        return f"unknown key {where!r}: {hint}"
    if err["type"] == "missing":
        return f"missing key {where!r}: add it"
    if err["type"] == "value_error":
        return str(err["ctx"]["error"])
    return f"{where} = {json.dumps(err['input'], ensure_ascii=False, default=str)}: {err['msg'][0].lower()}{err['msg'][1:]}"
