"""Golden losses: a tiny model's first 20 steps through the ordinary training path, one process, to the last bit.

    python tests/train/golden.py            trains every case of this machine and compares; exit code 1 where one differs
    python tests/train/golden.py --write    writes the file anew: only where a change of the numbers is meant

graft must be importable (installed, or PYTHONPATH=src). The cases and the file are the CPU's (golden/cpu.json), or the GPU's
where there is one (golden/nvidia-h200.json, by its name); --cpu takes the CPU's there too. Each case takes 10 to 20 s, twice that to write.

Numbers of one machine, which is what `machine()` says, are compared exactly; those of another within TOLERANCE. A case whose
two runs differ as it is written has that difference as its `spread`, and on the same machine ten times that is let through.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent)]
from small import curve, small_plan, train  # noqa: E402

FOLDER = Path(__file__).with_name("golden")
STEPS, HIDDEN = 20, 256  # heads of 64, as kernels want them
SETTINGS = (f"sft.max_steps={STEPS}", "sft.epochs=9", "sft.save_every=100", "sft.validate_every=100")
WAYS = {
    "lora-fp32": ("model.precision=fp32", "sft.lr=2e-3"),
    "lora-bf16": ("model.precision=bf16", "sft.lr=2e-3"),
    "lora-fp8": ("model.precision=fp8", "sft.lr=2e-3"),
    "lora-nf4": ("model.precision=nf4", "sft.lr=2e-3"),
    "full-fp32": ("model.precision=fp32", "sft.lora=false", "sft.lr=5e-4"),
}
CASES = {"cpu": ("lora-fp32", "lora-bf16", "lora-nf4", "full-fp32"), "gpu": ("lora-bf16", "lora-fp8", "lora-nf4")}
# Relative, on another machine than the file's. An AVX-512 machine held to AVX2 and to SSE4 (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA,
# MKL_ENABLE_INSTRUCTIONS) came within 4.7e-7 in fp32, 2.0e-3 in bf16 and 9.2e-3 in nf4 of itself; fp8 was not seen yet.
TOLERANCE = {"fp32": 5e-6, "bf16": 1e-2, "fp8": 3e-2, "nf4": 3e-2}
MATTERS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_tile", "asimd", "sve", "bf16", "i8mm")  # to matmul kernels

FIGURES = ("loss", "grad_norm")
Figures = dict[str, list[float]]  # each of FIGURES, of every step


def machine(device: str) -> dict[str, str]:
    """What decides the last bits."""
    if device == "gpu":
        from graft.model.attention import fastest

        found = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "attention": fastest(4, 2, HIDDEN // 4, torch.device("cuda"))}
    else:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        said = {key.strip(): value.split() for key, value in lines.items()}
        flags = {*said.get("flags", []), *said.get("Features", [])}
        vendor = " ".join(said.get("vendor_id") or said.get("CPU implementer") or ["unknown"])
        found = {"cpu": f"{torch.backends.cpu.get_cpu_capability()} {vendor} {' '.join(name for name in MATTERS if name in flags)}"}
    return {"torch": torch.__version__, **found}


def path_of(device: str) -> Path:
    kind = torch.cuda.get_device_name().lower().replace(" ", "-") if device == "gpu" else "cpu"
    return FOLDER / f"{kind}.json"


def run(case: str, device: str) -> Figures:
    """Train it."""
    variables = {"OMP_NUM_THREADS": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    with tempfile.TemporaryDirectory() as folder:
        plan = small_plan(Path(folder), *SETTINGS, *WAYS[case], hidden_size=HIDDEN)
        steps = curve(train(plan, 1, **variables).path)
    return {key: [s[n] for s in steps] for n, key in enumerate(FIGURES, 1)}


def spread(one: Figures, other: Figures) -> float:
    """The largest relative difference of any figure."""
    return max(abs(a - b) / abs(b) for key in FIGURES for a, b in zip(one[key], other[key], strict=True))


def difference(case: str, found: Figures, held: dict, here: dict[str, str]) -> str | None:
    """What is wrong with a case's figures, None where nothing is. held: the file; here: this machine."""
    known = held["cases"][case]
    same = held["machine"] == here
    tolerance = 10 * known["spread"] if same else TOLERANCE[case.rpartition("-")[2]]
    for step in range(STEPS):
        for key in FIGURES:
            ours, theirs = found[key][step], known[key][step]
            if not abs(ours - theirs) <= tolerance * abs(theirs):
                why = f"the same machine, {here}" if same else f"written on {held['machine']}, this is {here}"
                apart = f"{abs(ours - theirs) / abs(theirs):.2e} apart, tolerance {tolerance:g}"
                return f"{case}: {key} of step {step} is {ours!r}, golden is {theirs!r}: {apart} ({why})"
    return None


def write(device: str) -> None:
    """Every case twice, and the file."""
    cases = {}
    for case in CASES[device]:
        found, again = run(case, device), run(case, device)
        cases[case] = {"spread": spread(found, again), **found}
        print(f"{case}: loss {found['loss'][0]:.4f} to {found['loss'][-1]:.4f}, spread {cases[case]['spread']:.1e}", flush=True)
    FOLDER.mkdir(exist_ok=True)
    path_of(device).write_text(json.dumps({"machine": machine(device), "cases": cases}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    device = "gpu" if torch.cuda.is_available() and not args.cpu else "cpu"
    if args.write:
        write(device)
        return 0
    held = json.loads(path_of(device).read_text(encoding="utf-8"))
    wrong = 0
    for case in CASES[device]:
        found = run(case, device)
        said = difference(case, found, held, machine(device))
        wrong += bool(said)
        print(said or f"{case}: as golden, {spread(found, held['cases'][case]):.1e} apart at most", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
