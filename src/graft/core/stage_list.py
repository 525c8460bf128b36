"""The stages of a recipe in the order they run: which keys, parents and external inputs each depends on, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from graft.core.recipe import HELD_OUT, Recipe, Train

DATA, CHECKPOINTS = "data_shards", "checkpoints"


@dataclass(frozen=True)
class Stage:
    name: str
    room: str  # module that has `run(job)`; "launch" is a subprocess of `accelerate launch -m graft.train`
    version: int  # raised when the same keys would give another result
    keys: tuple[str, ...]
    parents: dict[str, str] = field(default_factory=dict)  # stage name -> pattern of the files that it reads
    inputs: tuple[str, ...] = ()  # external: seeds, images, review, corpora, tasks, schemas, machine, model, template, semantic, endpoint, deepspeed
    place: str = DATA


def stages(recipe: Recipe) -> list[Stage]:
    """The recipe's stages in the order they run."""
    source: dict[str, str] = {}  # the model that the next training stage starts from
    model_input: tuple[str, ...] = () if recipe.base else ("model",)
    model = _fields("model", "base precision chat_template")  # a revision is the commit among the inputs
    lm = ("seed", *model)
    out: list[Stage] = []
    if recipe.augment:
        api = _fields("api", "model max_output_tokens output_limit response_format service_tier budget_usd budget_tokens")
        inputs = ("images" if recipe.augment.images else "seeds", "review", "endpoint")
        out.append(Stage("augment", "graft.data.augment.stage", 3 if recipe.augment.images else 2, ("seed", "task", "augment", *api), inputs=inputs))
    if recipe.sft is None and recipe.augment:
        return out  # it ends with its rows
    out.append(
        Stage(
            "prepare",
            "graft.data.prepare",
            3,
            (*(["seed"] if recipe.augment else []), "task", "prepare", "corpora", "dedup", "decontaminate", "shard.part_mib"),  # it splits rows alone
            {"augment": "rows.jsonl"} if recipe.augment else {},
            ("corpora", "evaluation", "machine"),
        )
    )
    if recipe.sft is None:
        return out
    tasks, schemas = recipe.tasks, tuple({"schemas" for task in recipe.tasks.values() if task.answer_schema})
    if tasks:
        held_out = (
            {"prepare": f"rows/{HELD_OUT}.jsonl"} if recipe.augment and recipe.augment.images else {}
        )  # whose images are named by their content
        out.append(Stage("questions", "graft.data.questions", 2, ("evaluate.tasks",), held_out, ("tasks", *schemas)))
    tokenizer = {}
    if recipe.base:
        shape = _fields("base", "vocab_size hidden_size intermediate_size layers heads kv_heads" + (" vision" if recipe.base.vision else ""))
        out.append(
            Stage(
                "init",
                "graft.data.init",
                1,
                ("seed", "model.chat_template", "shard.seq_len", *shape, "base.train.corpora"),
                {"prepare": "corpora/*"},
                place=CHECKPOINTS,
            )
        )
        tokenizer = source = {"init": "*"}
    for stage in recipe.train_stages():
        section = "base.train" if stage == "base" else stage
        reads = ("*" if recipe.sft.corpora else "rows/*") if stage == "sft" else "corpora/*"
        out.append(
            Stage(
                f"shard-{stage}",
                "graft.data.shard",
                3 if recipe.stage_shows_images(stage) else 2,
                ("shard", "model.chat_template", *_fields(section, "corpora weights pack"), *(("prepare.validation",) if stage == "sft" else ())),
                {"prepare": reads, **{k: "tokenizer*" for k in tokenizer}},
                model_input,
            )
        )
    for stage in recipe.train_stages():
        section = "base.train" if stage == "base" else stage
        same = (  # decide no result, or are turned while a run goes on
            *("save_every", "keep_checkpoints", "on_save_failure", "spike_deviations", "max_skipped", "hang_timeout_s"),
            *("micro_batch", "activation_checkpointing", "deterministic", "tune_matmuls", "compile"),
        )
        result = [k for k in _fields(section, " ".join(Train.model_fields)) if k.rsplit(".", 1)[-1] not in same]
        out.append(
            Stage(
                stage,
                "launch",
                2 if stage == "sft" else 1,
                (*lm, *result),
                {**source, f"shard-{stage}": "*"},
                ("deepspeed", *(model_input if not source else ())),
                CHECKPOINTS,
            )
        )
        if stage == "base":
            source = {"base": "*"}
        if stage == "cpt":
            out.append(Stage("merge", "graft.train.merge", 2, model, {**source, "cpt": "*"}, model_input if not source else (), CHECKPOINTS))
            source = {"merge": "*"}
    served = {**source, "sft": "*"}
    external = model_input if not source else ()
    asked = {**({"prepare": "rows/*"} if recipe.learns_calls else {}), **({"questions": "*"} if tasks else {})}
    if asked:
        keys = ("seed", "task", *model, "evaluate", *(("shard.image_pixels",) if recipe.asks_of_images else ()))
        inputs = (*external, *(("semantic",) if recipe.evaluate.semantic else ()), *schemas)
        out.append(Stage("evaluate", "graft.evaluate.stage", 2, keys, {**served, **asked}, inputs, CHECKPOINTS))
    out.append(
        Stage(
            "serve",
            "graft.serve.probe",
            1,
            (*model, "serve.system", "serve.prompt", "serve.max_batch", "evaluate.max_new_tokens"),
            served,
            external,
            CHECKPOINTS,
        )
    )
    if recipe.model.template_file:
        out = [replace(s, inputs=(*s.inputs, "template")) if "model.chat_template" in s.keys else s for s in out]
    return out


def _fields(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{n}" for n in names.split())
