"""What does CPT buy, and what does it cost? A base that has never seen Taigi, before and after CPT on Taiwanese news, in three seeds.

    python benchmarks/cpt.py --prepare DIR              (1 to 2 minutes on two cores; DIR has 15 MB and can be moved)
    python benchmarks/cpt.py --train DIR --out RESULT   (about 4 minutes on an H200; needs neither Ray nor the data stages)

A Llama of 150 M weights, and its tokenizer, learn Wikipedia articles in Mandarin (DRCD) and GSM8K; LoRA of r = 64 on all seven projections then
learns the news, through `accelerate launch -m graft.train`. graft's own evaluation asks the base and each seed's model what no training read: perplexity of
Taigi articles and, for what is forgotten, of Mandarin ones, and a cloze of four phrases, of which one goes on with the article. All intervals are of 95 %, over
articles; the seeds are of the CPT, the base is one. RESULT gets cpt.json, cpt.md, cpt.png and predictions/. Exit code 1 where a figure is not finite or
the cloze has under 500 questions, whatever the outcome is. `--tiny`, for both halves, runs on the CPU (2 minutes).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from math import exp, isfinite, log
from pathlib import Path
from statistics import stdev
from typing import Any, NamedTuple

from cpt_data import TINY, Scale, letters_of, prepare
from small_base import Curve, both_halves, launch, machine, make_base, plan_of, refuse_other_bins, said_of, said_of_machine, where

LORA = """
[cpt]
corpora = ["made"]
lora = {{ r = {scale.r}, alpha = {scale.alpha} }}
lr = {scale.lr}
epochs = {scale.epochs}
global_batch = {scale.batch}
micro_batch = {scale.batch}
validate_every = {scale.every}
save_every = 100000
[sft]
corpora = ["made"]
"""
BASE = "base"
COLOURS = {"taigi": "#d1495b", "mandarin": "#00798c", "correct_loglikelihood": "#222222", "correct_loglikelihood_per_character": "#edae49"}
Columns = dict[str, dict[str, list[float]]]  # task -> what was counted -> [rows]


class Unit(NamedTuple):
    """Of a difference between two ratios."""

    scale: float
    form: str
    name: str = ""


class Measure(NamedTuple):
    """A ratio of two columns, each summed over the rows."""

    name: str
    task: str
    part: str
    whole: str
    shown: Callable[[float], float]  # of the ratio
    form: str
    unit: Unit


NATS, BITS, SHARE = Unit(1, "+.3f", " nats"), Unit(1 / log(2), "+.3f", " bits"), Unit(1, "+.1%")
MEASURES = (
    Measure("Taigi, perplexity a token", "taigi", "nats", "tokens", exp, ".1f", NATS),
    Measure("Taigi, bits a character", "taigi", "nats", "characters", BITS.scale.__mul__, ".3f", BITS),
    Measure("Mandarin, perplexity a token", "mandarin", "nats", "tokens", exp, ".1f", NATS),
    Measure("Mandarin, bits a character", "mandarin", "nats", "characters", BITS.scale.__mul__, ".3f", BITS),
    Measure("cloze, by log-likelihood", "cloze", "correct_loglikelihood", "questions", float, ".1%", SHARE),
    Measure("cloze, by that a character", "cloze", "correct_loglikelihood_per_character", "questions", float, ".1%", SHARE),
)


# ---- runs -------------------------------------------------------------------------------------------------------------
def run(seed: int | None, base: Path, folder: Path, data: Path, scale: Scale, kept: Path) -> tuple[Curve, Columns, float]:
    """(held-out loss by steps of CPT, answers, seconds) of one seed, or with no seed of the base as it is; in a process of its own."""
    began_s, curve, adapters = time.perf_counter(), {}, {}
    if seed is not None:
        plan = plan_of(folder / f"cpt-{seed}", "cpt", base, data / "cpt", scale.seq_len, LORA.format(scale=scale), seed)
        curve = launch(plan, "cpt")
        adapters["cpt"] = plan.artifact("cpt").path
    return curve, evaluate(base, adapters, data, kept / system_of(seed)), time.perf_counter() - began_s


def evaluate(base: Path, adapters: dict[str, Path], data: Path, folder: Path) -> Columns:
    """graft's evaluation of one system, whose predictions lie in `folder` then."""
    from transformers.utils.logging import disable_progress_bar

    from graft.core.recipe import load
    from graft.core.rows import read_jsonl
    from graft.engine.hf import HFEngine
    from graft.evaluate.tasks import measure
    from graft.model.chat import load_tokenizer

    disable_progress_bar()  # of reading one file
    folder.mkdir(parents=True, exist_ok=True)
    recipe, tokenizer = load(data / "recipe.toml"), load_tokenizer(str(data / "tokenizer"))
    engine = HFEngine(str(base), None, recipe.model.precision, adapters, tokenizer)
    measure(recipe, data / "questions", folder, engine, tokenizer, {"system": next(iter(adapters), None)})
    found: Columns = {}
    for name, task in recipe.evaluate.tasks.items():
        asked, lines = (list(read_jsonl(path)) for path in (data / "questions" / f"{name}.jsonl", folder / f"predictions-{name}.jsonl"))
        if task.kind == "cloze":
            scores = [line["system"]["scores"] for line in lines]
            found[name] = {metric: [row[metric][0] for row in scores] for metric in scores[0]} | {"questions": [1.0] * len(scores)}
        else:
            counted = {key: [line["system"][key] for line in lines] for key in ("nats", "tokens")}
            found[name] = counted | {"characters": [len(row["text"]) for row in asked]}
    return found


def run_all(seeds: list[int], at_once: int, *common: Any) -> tuple[dict[int, Curve], dict[int | None, Columns]]:
    """(curves, answers) by seed. All share the GPU, which a model of this size leaves idle: no speed is measured here."""
    curves, answers = {}, {}
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        started = {seed: pool.submit(run, seed, *common) for seed in (*seeds, None)}
        for seed, result in started.items():
            try:
                curve, answers[seed], wall_s = result.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            if seed is not None:
                curves[seed] = curve
            trained = f", {max(curve)} steps of CPT, validation loss {', '.join(f'{loss:.3f}' for loss in curve.values())}" if curve else ""
            print(f"{system_of(seed)}{trained}: {wall_s:.0f} s", flush=True)
    return curves, answers


def system_of(seed: int | None) -> str:
    return BASE if seed is None else f"seed {seed}"


# ---- what is said -----------------------------------------------------------------------------------------------------
def compared(measure: Measure, answers: dict[int | None, Columns]) -> dict[str, Any]:
    """Of one measure: each system's mean with its interval, that of the seeds together, and its difference to the base over the same rows."""
    from graft.evaluate.statistics import paired, ratio_of

    wholes = answers[None][measure.task][measure.whole]
    parts = {system_of(seed): found[measure.task][measure.part] for seed, found in answers.items()}
    trained = [part for system, part in parts.items() if system != BASE]
    together = [sum(row) / len(row) for row in zip(*trained, strict=True)]
    told: dict[str, Any] = {"rows": len(wholes), "systems": {}}
    for system, part in (*parts.items(), ("cpt", together)):
        found = ratio_of(part, wholes)
        told["systems"][system] = {key: measure.shown(getattr(found, key)) for key in ("mean", "low", "high")}
    if len(trained) > 1:
        told["systems"]["cpt"]["std"] = stdev(told["systems"][system]["mean"] for system in parts if system != BASE)
    a_row = [[measure.unit.scale * part / whole for part, whole in zip(own, wholes, strict=True)] for own in (*trained, parts[BASE])]
    return told | {"paired": paired(a_row[:-1], a_row[-1:]).told()}


def table(found: dict[str, dict[str, Any]]) -> str:
    """The base, the seeds together with their standard deviation, the paired difference, and each seed."""
    measures = {measure.name: measure for measure in MEASURES}
    seeds = [system for system in next(iter(found.values()))["systems"] if system not in (BASE, "cpt")]
    lines = [f"| held out | rows | base | after CPT | CPT less base, mean of the rows | {' | '.join(seeds)} |", "|---" * (5 + len(seeds)) + "|"]
    for name, told in found.items():
        form, unit, systems, pair = measures[name].form, measures[name].unit, told["systems"], told["paired"]
        between = f" ± {systems['cpt']['std']:{form}}" if "std" in systems["cpt"] else ""
        apart = "{:{form}}{name} ({:{form}} to {:{form}})".format(
            *(pair[key] for key in ("difference", "low", "high")), form=unit.form, name=unit.name
        )
        p = f"p {pair['p']:.3f}" if pair["p"] else "p < 0.001"
        cells = [interval(systems[BASE], form), interval(systems["cpt"], form) + between, f"{apart}, {p}"]
        lines.append(f"| {name} | {told['rows']} | {' | '.join(cells)} | {' | '.join(interval(systems[s], form) for s in seeds)} |")
    return "\n".join(lines)


def interval(mean: dict[str, float], form: str) -> str:
    return f"{mean['mean']:{form}} ({mean['low']:{form}} to {mean['high']:{form}})"


def in_common(questions: list[dict[str, Any]]) -> float:
    """Share of the cloze that is right by the phrase most of whose letters stand in the text before it: what no model is needed for."""
    right = 0
    for row in questions:
        known = set(row["text"])
        shares = [sum(letter in known for letter in letters) / len(letters) for letters in map(letters_of, row["replies"])]
        right += max(range(len(shares)), key=shares.__getitem__) == row["right"]
    return right / len(questions)


def broken(found: dict[str, dict[str, Any]], curves: dict[int, Curve], base: Curve, items: int) -> list[str]:
    """Why the run says nothing; an outcome that disappoints is none."""
    why = [
        f"{name}, {system}: {mean}"
        for name, told in found.items()
        for system, mean in told["systems"].items()
        if not all(map(isfinite, mean.values()))
    ]
    losses = {"base": base, **{system_of(seed): curve for seed, curve in curves.items()}}
    why += [f"{system}: a loss of {loss}" for system, curve in losses.items() for loss in curve.values() if not isfinite(loss)]
    asked = min(told["rows"] for name, told in found.items() if name.startswith("cloze"))
    return why + ([f"the cloze has {asked} questions, not {items}"] if asked < items else [])


def draw(found: dict[str, dict[str, Any]], chance: float, letters: float, path: Path) -> None:
    """Each system's perplexities, and its share of the cloze beside chance and what letters in common give."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    of_panel = dict(zip(("taigi", "mandarin", "cloze"), panels, strict=True))
    for measure in (m for m in MEASURES if m.whole != "characters"):
        told = found[measure.name]
        names = [BASE, *(system for system in told["systems"] if system not in (BASE, "cpt"))]
        means = [told["systems"][name] for name in names]
        aside = 0.0 if measure.task != "cloze" else 0.08 if measure.part.endswith("character") else -0.08  # two in one panel
        off = [[m["mean"] - m["low"] for m in means], [m["high"] - m["mean"] for m in means]]
        style = {"fmt": "o", "capsize": 4, "color": COLOURS.get(measure.part) or COLOURS[measure.task], "label": measure.name.partition(", ")[2]}
        axes = of_panel[measure.task]
        axes.errorbar([n + aside for n in range(len(names))], [m["mean"] for m in means], yerr=off, **style)
        axes.set_xticks(range(len(names)), names)
        axes.set(
            title=f"{measure.name.partition(', ')[0]}, {told['rows']} held-out articles", ylabel="perplexity a token", xlim=(-0.5, len(names) - 0.5)
        )
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:2]:
        axes.set_ylim(bottom=0)
    panels[2].axhline(chance, color="#999999", linestyle="--", linewidth=1, label="chance")
    panels[2].axhline(letters, color="#999999", linestyle=":", linewidth=1, label="most letters in common with the text")
    panels[2].set(ylim=(0, 1), ylabel="share that is right")
    panels[2].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


# ---- the half on the GPU ----------------------------------------------------------------------------------------------
def train(args: argparse.Namespace, scale: Scale) -> bool:
    """Whether the run says something."""
    from graft.core.rows import read_jsonl

    began_s, device, data = time.perf_counter(), where(), args.train.resolve()
    refuse_other_bins(data / "cpt", scale.seq_len)
    args.out.mkdir(parents=True, exist_ok=True)
    at_once = args.at_once or (len(args.seeds) + 1 if device.type == "cuda" else 1)
    with tempfile.TemporaryDirectory(prefix="graft-cpt-") as own:
        base, said = make_base(Path(own), data, scale)
        print(f"{said_of(said)}, {time.perf_counter() - began_s:.0f} s", flush=True)
        curves, answers = run_all(args.seeds, at_once, base, Path(own), data, scale, args.out.resolve() / "predictions")
    found = {measure.name: compared(measure, answers) for measure in MEASURES}
    questions = list(read_jsonl(data / "questions/cloze.jsonl"))
    chance, letters = 1 / len(questions[0]["replies"]), in_common(questions)
    result = {
        **machine(device),
        "command": shlex.join(["python", *sys.argv]),
        "scale": asdict(scale),
        "data": json.loads((data / "counts.json").read_text(encoding="utf-8")),
        "base": said,
        "validation_loss": {system_of(seed): curve for seed, curve in curves.items()},
        "measures": found,
        "cloze": {"chance": chance, "letters in common": letters},
        "wall_s": time.perf_counter() - began_s,
    }
    said_beside = f"Cloze: chance {chance:.0%}, the phrase with most letters in common with the text before it {letters:.1%}."
    of_run = f"{said_of_machine(result)}; {result['wall_s']:.0f} s in all\n\n    {result['command']}"
    report = f"{table(found)}\n\n{said_beside}\n\n{said_of(said)}. {of_run}\n"
    (args.out / "cpt.json").write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    (args.out / "cpt.md").write_text(report, encoding="utf-8")
    draw(found, chance, letters, args.out / "cpt.png")
    print(report)
    why = broken(found, curves, said["held_out"], scale.items)
    for line in why:
        print(f"BROKEN: {line}")
    return not why


if __name__ == "__main__":
    sys.exit(both_halves(__doc__, "systems that share the GPU (all) or the CPU (1)", Scale(), TINY, prepare, train))
