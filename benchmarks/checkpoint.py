"""What saving a checkpoint costs: graft's own trainer beside accelerate.save_state and transformers' Trainer, a process group each.

    python benchmarks/checkpoint.py --shape llama-3.1-8b --precision bf16                       (LoRA, one GPU: about 7 minutes)
    python benchmarks/checkpoint.py --full --layers 8 --every 40                                (all weights, two GPUs)
    python benchmarks/checkpoint.py --tiny                                                      (a minute on a CPU: does it run)
    python benchmarks/checkpoint.py --table a.json --append                                     (earlier calls into RESULTS.md)

All train the same random base, LoRA r = 16 on all seven projections or all weights, on random full bins, under DeepSpeed ZeRO-2;
processes are GRAFT_PROCESSES or the GPUs that CUDA_VISIBLE_DEVICES leaves. Beside FP8 the peers' base is bf16. Counted are the
bytes of a checkpoint and how long a save holds the steps, from border to border, so that a copy that is only queued on the GPU
counts too. A full fine-tune of 8B needs 14 bytes of GPU memory a weight, shared out but for 4: two H200, or --layers.
Disk: the base, and graft's 2 checkpoints and the one that is written, each 12 bytes a trained weight; peers' go at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from checkpoint_table import SETTLE, Saved, appended, figures, report
from train_gpu import ROOT, attempt, finished, gpus, installed, write_workspace

CONTESTANTS = ("graft", "save_state", "save_state-trained", "trainer")
STRATEGY = ROOT / "configs/deepspeed/zero2.json"
TINY = {"vocab_size": 3000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
POLL_S = 0.005


class Watch(threading.Thread):
    """Looks at a run's folders from outside: when a checkpoint is written by all ranks, when it is whole, and its bytes.

    graft's are seen by their names, also those that never became whole; of peers a line in the log says it, and then they are deleted.
    discard: graft's too.
    """

    def __init__(self, folder: Path, log: Path | None, processes: int, discard: bool):
        super().__init__(daemon=True)
        self.folder, self.log, self.processes, self.discard = folder, log, processes, discard or bool(log)
        self.saves: dict[int, Saved] = {}
        self.bytes = 0
        self._begun: set[int] = set()
        self._written: dict[int, float] = {}
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(POLL_S):
            self._look()

    def close(self) -> None:
        self._over.set()
        self.join()
        self._look()

    def _look(self) -> None:
        now = time.time()
        if self.log:
            for line in self._lines():
                if "saved" in line and line["saved"] not in self.saves:
                    self._whole(line["saved"], Path(line["folder"]), line["whole_unix_s"], line["whole_unix_s"])
            return
        for draft in self.folder.glob(".step-*.writing"):
            step = int(draft.name[len(".step-") : -len(".writing")])
            self._begun.add(step)
            with suppress(FileNotFoundError):  # it is renamed at this moment
                if len(list(draft.glob("rank-*.sums"))) == self.processes:
                    self._written.setdefault(step, now)
        for found in sorted(self.folder.glob("step-*")):
            step = int(found.name.removeprefix("step-"))
            if step not in self.saves:
                self._whole(step, found, self._written.get(step, now), now)

    def _whole(self, step: int, folder: Path, written: float, whole: float) -> None:
        self.saves[step] = Saved(step, written, whole)
        self.bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if self.discard:
            shutil.rmtree(folder, ignore_errors=True)

    def _lines(self) -> list[dict[str, Any]]:
        assert self.log
        lines = self.log.read_text(encoding="utf-8").split("\n")[:-1] if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def found(self, ends_unix_s: list[float]) -> dict[str, Any]:
        steps = sorted(step for step in self._begun | self.saves.keys() if step < len(ends_unix_s))
        saves = [self.saves.get(step, Saved(step, None, None)) for step in steps]
        return {"bytes": self.bytes, **figures(ends_unix_s, saves), "ends_unix_s": ends_unix_s, "saves": saves}


def run_graft(folder: Path, base: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Through its launcher, as users start it; timed by its own metrics.jsonl. What it saved counts, whatever ends it."""
    given = [f"sft.save_every={args.every}", *args.set]
    settings = argparse.Namespace(gpus=args.processes, micro=1, steps=args.every * (args.saves + 1), set=given)
    row = "full-whole-ckpt" if args.full else f"{args.precision}-whole"
    plan = write_workspace(folder, base, row, settings, args.seq_len, args.bins)
    job = plan.resolve("sft")
    watch = Watch(job.run_directory, None, args.processes, args.discard)
    watch.start()
    overrides = [word for o in plan.overrides for word in ("--set", o)]
    command = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", "sft", "--workspace", str(plan.root), *overrides]
    ended = ""
    try:
        finished(command, args.limit)
    except (TimeoutError, RuntimeError) as why:
        ended = str(why)
    finally:
        watch.close()
    metrics = job.run_directory / "metrics.jsonl"
    if not metrics.exists():
        raise RuntimeError(ended)
    ends_unix_s = [json.loads(line)["ended_unix_s"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {"ended": ended, **watch.found(ends_unix_s)}


def run_peer(peer: str, folder: Path, base: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A peer's ranks under the same launcher; timed by its log."""
    from graft.train.launch import command

    log = folder / "log.jsonl"
    folder.mkdir(parents=True)
    argv, environment = command([])
    start = argv[: argv.index("graft.train") - 1]
    start += [str(Path(__file__).with_name("checkpoint_peers.py")), "--peer", peer, "--base", str(base), "--deepspeed", str(STRATEGY)]
    start += ["--precision", "nf4" if args.precision == "nf4" else "bf16", *(["--full"] if args.full else []), "--log", str(log)]
    start += ["--bins", str(args.bins), "--seq-len", str(args.seq_len)]
    start += ["--every", str(args.peer_every), "--steps", str(args.peer_every * args.saves + 2)]
    watch = Watch(folder, log, args.processes, True)
    watch.start()
    try:
        finished(start, args.limit, environment | {"HF_HUB_OFFLINE": "1"})
    finally:
        watch.close()
    return watch.found([line["ended_unix_s"] for line in watch._lines() if "saved" not in line])


def made_base(args: argparse.Namespace) -> Path:
    from graft.data.like import write_like
    from graft.model.shapes import SHAPES

    if args.tiny:
        SHAPES[args.shape] = TINY
    base = args.folder / "bases" / (f"{args.shape}-{args.layers}-layers" if args.layers else args.shape)
    if not (base / "tokenizer.json").exists():
        write_like(args.shape, base, args.layers)
    return base


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp8", "nf4"])
    parser.add_argument("--full", action="store_true", help="train all weights, with full activation checkpointing")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and short bins")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, help="all, as far as they differ")
    parser.add_argument("--saves", type=int, default=6, help="that are timed, the first apart")
    parser.add_argument("--every", type=int, default=10, help="steps between graft's saves; enough for one to be written")
    parser.add_argument("--peer-every", type=int, default=4, help="steps between peers' saves")
    parser.add_argument("--bins", type=int, default=2, help="a step and GPU, one a forward")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of graft's recipe")
    parser.add_argument("--discard", action="store_true", help="delete graft's checkpoints as they are whole, for small disks")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one contestant may take; graft's saves until then count")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/graft-checkpoint"))
    parser.add_argument("--out", type=Path, default=Path("checkpoint.json"))
    parser.add_argument("--table", type=Path, nargs="+", help="of earlier calls' --out, and run nothing")
    parser.add_argument("--append", action="store_true", help="put the entry into RESULTS.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.every <= SETTLE or args.peer_every < 3 or args.saves < 2:
        parser.error(f"--every is more than {SETTLE}, --peer-every more than 2, --saves more than 1")
    if args.tiny:
        args.shape, args.seq_len = "tiny", 128
        os.environ.setdefault("GRAFT_PROCESSES", "1")
    args.contestants = args.contestants or [of for of in CONTESTANTS if not (args.full and of == "save_state-trained")]
    args.folder = args.folder.absolute()
    return args


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """This call, and its file after each contestant: the call may be cut off."""
    from graft.train.launch import processes_per_node

    args.processes = processes_per_node()
    base = made_base(args)
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    device, driver = gpus()
    what = f"{args.shape}{f' cut to {args.layers} layers' if args.layers else ''}, {'all weights' if args.full else f'LoRA on {args.precision}'}"
    runs: list[dict[str, Any]] = []
    call = {"what": what, "device": device, "driver": driver, "processes": args.processes, "versions": installed(), "commit": commit or "unknown"}
    call |= {"command": " ".join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]), "date": time.strftime("%Y-%m-%d"), "runs": runs}
    with tempfile.TemporaryDirectory(dir=args.folder) as workspaces:
        for of in args.contestants:
            folder = Path(workspaces) / of
            given = (folder, base, args)
            runs.append({"of": of, **(attempt(run_graft, *given) if of == "graft" else attempt(run_peer, of, *given))})
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{of}:", runs[-1].get("failed") or {k: v for k, v in runs[-1].items() if k not in ("ends_unix_s", "saves")}, flush=True)
            args.out.write_text(json.dumps([call], indent=1), encoding="utf-8")
    return call


def main() -> None:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    calls = [call for path in args.table for call in json.loads(path.read_text(encoding="utf-8"))] if args.table else [measured(args)]
    entry = report(calls)
    print(entry)
    if args.append:
        args.results.write_text(appended(args.results.read_text(encoding="utf-8"), entry), encoding="utf-8")


if __name__ == "__main__":
    main()
