"""Where a step goes: `graft.train … --profile` writes profile.txt and trace.json.gz (for https://ui.perfetto.dev) of three steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

AFTER, STEPS = 5, 3  # compiled and settled by then


class Profiler:
    """Told of every finished step; records STEPS of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.running: Any = None

    def step(self, done: int) -> None:
        """done: steps of this launch."""
        if done == AFTER:
            on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self.running = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self.running.start()
        if done == AFTER + STEPS and self.running:
            self.running.stop()
            (self.folder / "profile.txt").write_text(table(self.running, STEPS), encoding="utf-8")
            self.running.export_chrome_trace(str(self.folder / "trace.json.gz"))
            print(f"profile: {self.folder / 'profile.txt'}", flush=True)
            self.running = None


def table(recorded: Any, steps: int, rows: int = 40) -> str:
    """Time a step by kernel on the GPU (by operator on the CPU where there is none), the longest first; of a GPU also where it waited."""
    on_gpu = torch.cuda.is_available()
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [e for e in recorded.key_averages() if e.device_type == kind]
    found = sorted(((e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key) for e in events), reverse=True)
    whole_us = sum(us for us, _, _ in found)
    lines = [f"{whole_us / steps / 1e3:10.2f} ms a step in all, {'GPU kernels' if on_gpu else 'CPU operators'}"]
    lines += [f"{us / steps / 1e3:10.2f} ms  {us / max(whole_us, 1e-9):6.1%}  {count / steps:7.0f} x  {key[:120]}" for us, count, key in found[:rows]]
    if on_gpu:
        lines += waits([(e.time_range.start, e.time_range.end, e.name) for e in recorded.events() if e.device_type == kind], steps)
    return "\n".join(lines) + "\n"


def waits(kernels: list[tuple[float, float, str]], steps: int, rows: int = 10) -> list[str]:
    """Lines on how long nothing ran, and between which kernels; kernels: (start, end, name) each, in microseconds."""
    found: dict[str, list[float]] = {}
    until_us, before = math.inf, ""
    for start_us, end_us, name in sorted(kernels):
        if start_us > until_us:
            found.setdefault(f"{before[:60]} -> {name[:60]}", []).append(start_us - until_us)
        if before == "" or end_us > until_us:
            until_us, before = end_us, name
    longest = sorted(((sum(gaps_us), len(gaps_us), where) for where, gaps_us in found.items()), reverse=True)
    lines = [f"{sum(us for us, _, _ in longest) / steps / 1e3:10.2f} ms a step in which the GPU waits"]
    return lines + [f"{us / steps / 1e3:10.2f} ms  {count / steps:7.0f} x  {where}" for us, count, where in longest[:rows]]
