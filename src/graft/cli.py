"""The `graft` command: thin; a room is imported only when its verb is called."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from graft.core.errors import ConfigError, GraftError

if TYPE_CHECKING:
    from graft.core.stages import Plan


def main(argv: list[str] | None = None) -> int:
    args = _parsed(argv)
    # threads that wait for each other sleep, they do not spin: on busy cores evaluation took 117 s spinning, 16 s sleeping
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _interrupts() as came:
        try:
            return args.verb(args) or 0
        except (Exception, KeyboardInterrupt) as e:
            if came or isinstance(e, KeyboardInterrupt):
                print("graft: interrupted; what is complete stays, run the same command to go on", file=sys.stderr)
                return 130
            if isinstance(e, GraftError):
                print(f"graft: {e}", file=sys.stderr)
                return e.exit_code
            if not isinstance(e, OSError) or e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            full = e.filename or getattr(args, "workspace", ".")
            print(f"graft: no space left on the disk of {full}: free some and run the same command to go on, what is complete stays", file=sys.stderr)
            return 2


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C fills: a library may make an error of its own of the KeyboardInterrupt that reached it, as torch.tensor does."""
    came: list[int] = []

    def notice(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.default_int_handler(number, frame)

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if usual:
        signal.signal(signal.SIGINT, notice)
    try:
        yield came
    finally:
        if usual and signal.getsignal(signal.SIGINT) is notice:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    """With sentences behind options too, which argparse takes for unknown where the recipe stood before these."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if more and (not hasattr(args, "texts") or any(word.startswith("-") and word != "-" for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:
        args.texts += more
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graft", description="From a few seed examples and a raw corpus to a served LoRA adapter.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, call: object, text: str) -> argparse.ArgumentParser:
        p = verbs.add_parser(name, help=text, description=text)
        p.set_defaults(verb=call)
        return p

    def with_recipe(p: argparse.ArgumentParser, needed: bool = True) -> argparse.ArgumentParser:
        p.add_argument("recipe", nargs=None if needed else "?", help="a .toml file, for example configs/recipes/image-intent-tiny.toml")
        p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a recipe key (repeatable)")
        p.add_argument("--workspace", default=os.environ.get("GRAFT_WORKSPACE", "."), metavar="DIR", help="where data_shards/ and checkpoints/ lie")
        return p

    run = with_recipe(verb("run", _run, "make what is missing of a recipe, skip what is complete"))
    run.add_argument("--from", dest="redo_from", metavar="STAGE", help="make this stage and all later ones again")
    run.add_argument("--until", metavar="STAGE", help="stop after this stage")
    run.add_argument("--only", metavar="STAGE", help="this stage alone: those before it must be complete")
    run.add_argument("--data", action="store_true", help="the stages that need no GPU alone")
    run.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    run.add_argument("--allow-data-change", action="store_true", help="go on from a training run that was cut short over other data")
    run.add_argument("--slurm", action="store_true", help="submit what is missing as SLURM jobs, each after the one before it")
    run.add_argument(
        "--nodes", metavar="N", help="with --slurm: nodes of a training job, or a range such as 1-2 (default: NODES of slurm/site.env, or 1)"
    )
    run.add_argument("--gpus-per-node", type=int, metavar="N", help="with --slurm: default GPUS_PER_NODE of slurm/site.env, or none")
    run.add_argument("--data-nodes", metavar="N", help="with --slurm: nodes of the data job (default: DATA_NODES of slurm/site.env, or 1)")
    run.add_argument("--keep", action="store_true", help="leave the server up at the end, until Ctrl-C")
    several = verb("sweep", _sweep, "run a recipe at several settings and seeds, skip what is complete, and compare the evaluations")
    several.add_argument("sweep", metavar="FILE", help="a .toml file, for example configs/sweeps/finetome-scaling.toml")
    several.add_argument("--workspace", default=os.environ.get("GRAFT_WORKSPACE", "."), metavar="DIR", help="where data_shards/ and checkpoints/ lie")
    instead = several.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="print each run, and what is missing of it")
    instead.add_argument("--report-only", action="store_true", help="compare the runs that are complete, and make none")
    instead.add_argument(
        "--slurm", action="store_true", help="print the commands that submit what is missing; one after another, as the runs share their data"
    )
    with_recipe(verb("status", _status, "say what each stage of a recipe is doing: state, job, nodes, restarts, steps, tokens/s, time left"))
    with_recipe(verb("cancel", _cancel, "end the recipe's SLURM jobs; what is complete stays, and so do checkpoints"))
    check = with_recipe(verb("check", _check, "validate a recipe and its inputs, without torch or Ray"))
    check.add_argument(
        "--gpus",
        metavar="8xH100",
        help="say what training will need on these (default: the GPUs here): memory, step time, hours; exit code 2 where it does not fit",
    )
    check.add_argument("--price", type=float, metavar="USD", help="an hour of one GPU")
    augment = with_recipe(verb("augment", _augment, "make the recipe's rows from its seeds or images"))
    augment.add_argument("--dry-run", action="store_true", help="print what it would ask and cost, and send nothing")
    augment.add_argument("--max-retries", type=int, metavar="N", help="the same as --set api.max_retries=N")
    with_recipe(verb("review", _review, "page through the recipe's new rows, keep or reject each from the keyboard"))
    export = with_recipe(verb("export", _export, "write the recipe's rows in another trainer's format"))
    export.add_argument("--format", required=True, choices=["messages", "ms-swift", "llama-factory"])
    export.add_argument("--out", required=True, metavar="FILE", help="a .jsonl or .json file that does not exist yet; images go beside it")
    base = verb("base", _base, "`graft base build RECIPE`: build the recipe's embedded base; with --like, a random one for benchmarks")
    base.add_argument("action", choices=["build"])
    with_recipe(base, needed=False)
    base.add_argument("--like", metavar="SHAPE", help="random weights of a real model's shape, such as llama-3.1-8b, written to --out")
    base.add_argument("--out", metavar="DIR")
    merge = verb(
        "merge", _merge, "merge a LoRA adapter into its base, a weight at a time, and compare the two; a recipe's own stage is `graft run`'s"
    )
    merge.add_argument("adapter", metavar="ADAPTER", help="a folder with adapter_config.json and adapter_model.safetensors, graft's or PEFT's")
    merge.add_argument("--base", required=True, metavar="BASE", help="the model that it was trained on: a folder, or a hub id like owner/name")
    merge.add_argument("--revision", metavar="R", help="of a hub id: a branch, a tag or a commit")
    merge.add_argument(
        "--precision",
        choices=["bf16", "fp32", "fp8", "nf4"],
        help="how the base was held in training (default: as the adapter's folder says, else bf16)",
    )
    merge.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist yet")
    evaluate = with_recipe(verb("evaluate", _evaluate, "evaluate the recipe's adapter"))
    evaluate.add_argument("--server", metavar="URL", help="ask a running server the same, and compare; exit code 1 where an answer differs")
    predict = with_recipe(verb("predict", _predict, "have the recipe's adapter answer sentences, or a file of questions"))
    predict.add_argument("texts", nargs="*", metavar="TEXT", help="what is asked, each by itself; - reads lines from stdin")
    predict.add_argument("--image", action="append", default=[], metavar="FILE", help="what each TEXT is about (repeatable)")
    predict.add_argument("--file", metavar="FILE", help="questions in any layout that [evaluate.tasks] reads, with or without their answers")
    predict.add_argument("--images", metavar="DIR", help="the folder of the images that the rows of --file show")
    predict.add_argument("--out", metavar="FILE", help="of the answers to --file: .csv for ID,Answer, .jsonl for all that is known")
    predict.add_argument("--like", metavar="NAME", help="read --file as this task or corpus of the recipe says (default: the only one that can)")
    predict.add_argument(
        "--by", choices=["generated", "likelihood"], default="generated", help="how an option is chosen: named by the reply, or the likeliest one"
    )
    predict.add_argument("--base", action="store_true", help="ask the model under the adapter")
    predict.add_argument("--system", metavar="TEXT", help="system message of whatever brings none")
    predict.add_argument("--json", action="store_true", help="print one JSON object a line")
    serve = with_recipe(verb("serve", _serve, "serve the recipe's base and adapter, OpenAI-compatible, until Ctrl-C"))
    serve.add_argument("--port", type=int)
    serve.add_argument(
        "--override", metavar="WHY", help="have the recipe's adapter answer although it is refused; WHY stands beside it in /v1/models"
    )
    report = with_recipe(
        verb("report", _report, "write one HTML page of the run: lineage, data, curves, cost, evaluation, best and worst predictions")
    )
    report.add_argument("--out", metavar="FILE", help="default: checkpoints/NAME/report.html in the workspace")
    verb("lineage", _lineage, "print an artifact's chain of manifests").add_argument("path")
    kept = verb(
        "checkpoints", _checkpoints, "list a training run's checkpoints: step, size, whether every file holds; `verify` fails where one does not"
    )
    kept.add_argument("words", nargs="+", metavar="[verify] RUN", help="a run's directory, for example checkpoints/NAME/runs/sft-0123456789ab")
    look = verb("inspect", _inspect, "show what prepared rows or shards hold: counts, lengths, sources, rejects, a bin with its loss mask")
    look.add_argument(
        "path", help="an artifact of prepare or of a shard stage, for example data_shards/NAME/shard-sft/current, or a folder of shards"
    )
    look.add_argument("--bin", type=int, metavar="N", help="render this bin")
    look.add_argument("--html", metavar="FILE", help="write one page with plots instead")
    return parser


def _plan(args: argparse.Namespace, hub: Literal["ask", "recorded", "look"] = "ask"):
    from graft.core.stages import Plan

    return Plan(args.recipe, tuple(args.overrides), args.workspace, hub)


def _run(args: argparse.Namespace) -> int:
    from graft import pipeline

    plan = _plan(args)
    if args.dry_run:
        pipeline.check(plan, args.until)
        for stage, action, artifact in pipeline.outlook(plan, args.redo_from, args.until):
            print(f"{stage:<12} {action}" + (f"  {artifact.path.relative_to(plan.root)}" if artifact else ""))
        return 0
    if args.slurm:
        return _submit(plan, args)
    pipeline.summary(plan, pipeline.run(plan, args.redo_from, args.until, args.allow_data_change, args.only, args.data))
    if args.keep:
        from graft.serve.probe import serve_forever

        serve_forever(plan, None)
    return 0


def _submit(plan: Plan, args: argparse.Namespace) -> int:
    from graft.slurm.status import followed
    from graft.slurm.submit import Sizes, submit

    if args.redo_from or args.only or args.data or args.keep or args.allow_data_change:
        raise ConfigError("--slurm takes none of --from, --only, --data, --keep and --allow-data-change: submit those by sbatch slurm/*.sbatch")
    jobs = submit(plan, Sizes(args.nodes, args.gpus_per_node, args.data_nodes), args.until)
    print("\n".join(followed(jobs, args.recipe)) if jobs else f"{args.recipe}: every stage is complete")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    from graft.sweep import Sweep

    sweep = Sweep(args.sweep, args.workspace)
    if args.dry_run or args.slurm:
        print("\n".join(sweep.outlook() if args.dry_run else sweep.commands()))
        return 0
    if not args.report_only:
        sweep.make()
    print(sweep.report())
    return 0


def _status(args: argparse.Namespace) -> int:
    from graft.slurm.status import shown, status

    print("\n".join(shown(status(_plan(args, "recorded")))))
    return 0


def _cancel(args: argparse.Namespace) -> int:
    from graft.slurm.status import cancel

    ended = cancel(_plan(args, "recorded"))
    print(f"ended {', '.join(ended)}" if ended else "none of its jobs is under way")
    return 0


def _augment(args: argparse.Namespace) -> int:
    if args.max_retries is not None:
        args.overrides.append(f"api.max_retries={args.max_retries}")
    if not args.dry_run:
        return _until(args, "augment")
    from graft import pipeline
    from graft.data.augment.outlook import outlook

    plan = _plan(args)
    pipeline.check(plan, "augment")
    print("\n".join(outlook(plan)))
    return 0


def _review(args: argparse.Namespace) -> int:
    from graft.core.rows import read_jsonl
    from graft.data.augment.review import review_in_terminal

    plan = _plan(args)
    made = plan.latest("augment").path
    rows, rejected = (list(read_jsonl(made / f"{name}.jsonl")) for name in ("rows", "rejected"))
    with plan.lock():
        done = review_in_terminal(rows, plan.review_file, rejected)
    print(f"{done['keep']} kept, {done['reject']} rejected, {done['undecided']} undecided; `graft augment {args.recipe}` takes the decisions in")
    return 0


def _export(args: argparse.Namespace) -> int:
    from pathlib import Path

    from graft.data.export import export

    made = export(_plan(args).latest("augment").path, args.format, Path(args.out))
    print(f"{made['rows']} rows and {made['images']} images in {args.out}")
    return 0


def _until(args: argparse.Namespace, stage: str) -> int:
    from graft import pipeline

    plan = _plan(args)
    pipeline.summary(plan, pipeline.run(plan, until=stage))
    return 0


def _base(args: argparse.Namespace) -> int:
    if args.like is None and args.recipe:
        return _until(args, "base")
    if args.like is None or args.out is None or args.recipe:
        raise ConfigError("`graft base build` takes a recipe, or --like SHAPE and --out DIR")
    from graft.data.like import write_like

    print(f"{args.out}: {write_like(args.like, Path(args.out)):,} random weights of the shape of {args.like}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from graft.train.merge import merge_folder

    c = merge_folder(Path(args.adapter), args.base, args.revision, args.precision, Path(args.out))
    print(
        f"{args.out}: {c['layers']} layers merged, {c['shards']} shards; over {c['tokens']} tokens its logits differ from base + adapter's "
        f"by {c['logit_difference_max']:.1e} at most (spread {c['logit_std']:.2g}), {c['kl_nats']:.1e} nats a token"
    )
    return 0


def _check(args: argparse.Namespace) -> int:
    from graft import pipeline

    plan = _plan(args, "look")
    pipeline.check(plan)
    from graft.train.sizing.check import report, report_here, trains_alike

    told = trains_alike(plan)
    print(f"{args.recipe}: {'nothing wrong in what was looked at' if plan.unseen else 'ok'}, stages {', '.join(plan.stages)}")
    for name, why in plan.unseen.items():
        print(f"not looked at: {name} ({why})")
    lines, fits = report(plan, args.gpus, args.price) if args.gpus else (report_here(plan, args.price), True)
    for line in [*told, *lines]:
        print(line)
    return 0 if fits else 2


def _evaluate(args: argparse.Namespace) -> int:
    if args.server is None:
        return _until(args, "evaluate")
    from graft.evaluate.served import compare

    lines, equal = compare(_plan(args, "recorded"), args.server)
    print("\n".join(lines))
    return 0 if equal else 1


def _predict(args: argparse.Namespace) -> int:
    if bool(args.texts) == bool(args.file) or bool(args.file) != bool(args.out) or (args.file and args.json):
        raise ConfigError("`graft predict` takes a recipe and TEXT (or -), or --file FILE and --out FILE.csv or FILE.jsonl")
    if not args.file and (args.like or args.by != "generated"):
        raise ConfigError("--like and --by are of --file: sentences have no options")
    if args.image if args.file else args.images:
        raise ConfigError("--image FILE is what a TEXT is about, --images DIR the folder of the images that the rows of --file show")
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="graft-images-") as kept:  # by content, as an evaluation's
        return _predict_file(args, Path(kept)) if args.file else _predict_texts(args, Path(kept))


def _predict_file(args: argparse.Namespace, kept: Path) -> int:
    from graft.data.pictures import below
    from graft.data.prompts import source

    plan, file, out = _plan(args, "recorded"), Path(args.file), Path(args.out)
    found = source(plan.recipe, file, args.like, below(args.images, kept) if args.images else None)
    print(f"{file}: layout {found.layout}" + (f", read as {found.name} says" if found.name else ""))
    from graft.evaluate.predict import Predictor, check_out, write

    check_out(out, file)
    images = kept if args.images else None
    with closing(Predictor.of(plan, found.task, args.base, args.by == "likelihood", args.system, images)) as predictor:
        print(write(predictor, found.rows(), out))
    return 0


def _predict_texts(args: argparse.Namespace, kept: Path) -> int:
    import json

    from graft.evaluate.predict import Predictor, sentences, shown

    texts = (line for text in args.texts for line in (filter(None, map(str.strip, sys.stdin)) if text == "-" else [text]))
    refused, about = 0, []
    if args.image:
        from graft.data.pictures import below
        from graft.data.prompts import images

        about = images(args.image, below("/", kept))
    with closing(Predictor.of(_plan(args, "recorded"), base=args.base, system=args.system, images=kept if about else None)) as predictor:
        for line in predictor.answers(sentences(texts, about), at_once=1 if "-" in args.texts and sys.stdin.isatty() else None):
            refused += "refused" in line
            if args.json:
                print(json.dumps(line, ensure_ascii=False), flush=True)
            elif "refused" in line:
                print(f"graft: text {line['id']} was not asked: {line['refused']}", file=sys.stderr)
            else:
                print(shown(line), flush=True)
    return 2 if refused else 0


def _serve(args: argparse.Namespace) -> int:
    from graft.serve.probe import serve_forever

    serve_forever(_plan(args, "recorded"), args.port, args.override)
    return 0


def _report(args: argparse.Namespace) -> int:
    from graft.report.page import write

    print(write(_plan(args, "recorded"), Path(args.out) if args.out else None))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from pathlib import Path

    from rich import get_console

    from graft.data.inspect import inspect

    inspect(Path(args.path), args.bin, Path(args.html) if args.html else None, get_console())
    return 0


def _checkpoints(args: argparse.Namespace) -> int:
    from graft.train.checkpoint import described

    verify = args.words[0] == "verify" and len(args.words) > 1
    held = True
    for run in map(Path, args.words[verify:]):
        for line, holds in described(run):
            print(line)
            held = held and holds
    return 0 if held or not verify else 2


def _lineage(args: argparse.Namespace) -> int:
    from pathlib import Path

    from graft.core.stages import lineage

    for depth, artifact in lineage(Path(args.path)):
        m = artifact.manifest
        source = "".join(f", {k} {v if isinstance(v, str) else '…'}" for k, v in m["inputs"].items() if v)
        print(
            f"{'  ' * depth}{m['kind']} {m['fingerprint'][:12]}  digest {m['digest'][:12]}  {len(m['files'])} files, {m['wall_s']} s, graft {m['graft']} {(m['commit'] or '')[:10]}{source[:120]}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
