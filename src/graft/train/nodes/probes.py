"""What a rank measures of its node and of the way to the others: is it right, and how fast is it. inspection.py judges.

Every check has an answer that is known beforehand and that no order of additions changes. About 0.5 s on the CPU, and on a GPU beside
its start. Buffers take 0.5 GiB of a GPU, given back at the end.
"""

from __future__ import annotations

import errno
import os
import platform
import random
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

import graft

PACKAGES = ("deepspeed", "accelerate", "transformers", "peft", "bitsandbytes", "triton")
# _checksum of the product of two matrices of the size, by what holds it. Products of whole numbers up to 8 add up to 2^18 at most, so fp32
# (TF32 too, whose ten bits hold the factors) has every partial sum exactly; bf16 rounds once, at the end.
SUMS = {512: {"float32": 336334853, "bfloat16": 334892456}, 4096: {"float32": -11343529844, "bfloat16": -11293516361}}
MATMUL_S = {"cpu": 0.1, "cuda": 0.3}
DISK_BYTES = 8 << 20
MESSAGE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
ROUNDS = 3  # of exchanges between pairs


def device() -> torch.device:
    """The one that Accelerate will give this process."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")


def versions(device: torch.device) -> dict[str, str]:
    """Of all that decides a result."""
    major, minor, patch = platform.python_version_tuple()
    found = {"python": f"{major}.{minor}", "python's patch": patch, "graft": graft.__version__, "torch": torch.__version__}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    found["CUDA"] = str(torch.version.cuda)
    if device.type == "cuda":
        found |= {"NCCL": ".".join(map(str, torch.cuda.nccl.version())), "GPU": torch.cuda.get_device_name(device)}
    return found


# ---- alone --------------------------------------------------------------------------------------------------------------
def matmul(device: torch.device) -> tuple[str | None, float | None]:
    """(what is wrong, TFLOP/s): in bf16 on a GPU, in fp32 on the CPU, where bf16's pace says nothing. (None, None): the GPU has no room now."""
    timed = "bfloat16" if device.type == "cuda" else "float32"
    size = 4096 if device.type == "cuda" else 512
    tflop_per_s = None
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # a sum of parts that were rounded would depend on how it is cut
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        for name, known in SUMS[size].items():
            a, b = (_whole_numbers(size, salt, device).to(getattr(torch, name)) for salt in (1, 2))
            c = product(a, b)  # for the sum, and to warm up
            wrong = _checksum(c) != known
            if name == timed:
                many = 50 if device.type == "cuda" else 1  # a wait
                times_s: list[float] = []
                while many * sum(times_s) < MATMUL_S[device.type]:
                    started = time.perf_counter()
                    for _ in range(many):
                        c = product(a, b)
                    _wait(device)
                    times_s.append((time.perf_counter() - started) / many)
                tflop_per_s = 2 * size**3 / median(times_s) / 1e12
                wrong = wrong or _checksum(c) != known
            if wrong:
                return f"a matmul in {name} gives a wrong result", tflop_per_s
        return None, tflop_per_s
    except torch.OutOfMemoryError:
        return None, None
    except RuntimeError as e:  # what CUDA says of a broken GPU
        return f"a matmul fails: {str(e).splitlines()[0]}", None
    finally:
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced


def product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _whole_numbers(size: int, salt: int, device: torch.device) -> Tensor:
    """int32 (size, size) of -8 to 8, without any random generator, whose numbers differ by device and version."""
    i = torch.arange(size, device=device, dtype=torch.int32)
    return (((i[:, None] * 7919 + i * 104729 + i[:, None] * i * 31 * salt) >> 5) % 17) - 8


def _checksum(c: Tensor) -> int:
    """Changes with any one element."""
    i = torch.arange(len(c), device=c.device)
    return int(((c.long() * (i % 101 + 1)).sum(1) * (i % 89 + 1)).sum())


def disk(folder: Path, rank: int) -> float:
    """MB/s of a file in `folder` written and fsynced; OSError where that fails, or where it reads back otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    room = os.statvfs(folder)
    size = max(4096, min(DISK_BYTES, room.f_bavail * room.f_frsize // 4))  # what is nearly full may still do: on_save_failure says
    path, data = folder / f".probe-{rank}-{os.getpid()}", random.Random(rank).randbytes(size)
    try:
        started = time.perf_counter()
        with path.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        seconds = time.perf_counter() - started
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or memory would answer for the disk
            if f.read() != data:
                raise OSError(errno.EIO, "what was written reads back otherwise")
    finally:
        with suppress(OSError):
            path.unlink()
    return size / seconds / 1e6


# ---- together, all ranks at once ----------------------------------------------------------------------------------------
def skew(device: torch.device, exchanges: int = 5) -> tuple[float, float]:
    """(seconds by which this rank's clock is ahead of rank 0's, the error's bound): half the shortest of some round trips.

    Cristian, "Probabilistic clock synchronization", Distributed Computing 3 (1989): the asked one's clock is read between question and
    answer. The question is an all-reduce, which rank 0 cannot leave before this rank has entered it, the answer a broadcast, so that
    all ranks ask at once.
    """
    found = []
    for _ in range(exchanges):
        asked_s = time.time()
        question = torch.ones((), device=device)
        dist.all_reduce(question)
        question.item()
        answer = torch.tensor(time.time(), dtype=torch.float64, device=device)
        dist.broadcast(answer, 0)
        there_s, answered_s = answer.item(), time.time()
        found.append(((answered_s - asked_s) / 2, (asked_s + answered_s) / 2 - there_s))
    error_s, skew_s = min(found)
    return (skew_s, error_s) if dist.get_rank() else (0.0, 0.0)


def all_reduce(device: torch.device) -> tuple[int, float]:
    """(elements that are not the known sum, GB/s): bus bandwidth as nccl-tests counts it, 2 (n - 1) / n of the bytes over the time."""
    rank, world = dist.get_rank(), dist.get_world_size()
    pattern = torch.arange(MESSAGE_BYTES[device.type] // 4, device=device, dtype=torch.float32) % 7 + 1
    wanted = pattern * sum(r % 64 + 1 for r in range(world))  # below 2^24 up to 70,000 ranks
    wrong, times_s = 0, []
    for _ in range(3):
        mine = pattern * (rank % 64 + 1)
        _wait(device)
        started = time.perf_counter()
        dist.all_reduce(mine)
        _wait(device)
        times_s.append(time.perf_counter() - started)
        wrong = max(wrong, int((mine != wanted).sum()))
    return wrong, 2 * (world - 1) / world * MESSAGE_BYTES[device.type] / min(times_s) / 1e9


def links(device: torch.device, hosts: list[str]) -> tuple[dict[str, float], list[int]]:
    """({other rank: GB/s each way, both ways at once}, ranks whose message came altered). hosts: of the ranks.

    An all-reduce is as slow on every rank as on the slowest, so it names nobody. Here nodes meet in pairs, each rank the one of its own
    place in the other node, in up to three rounds with another partner each: who is slow with all of them is slow itself.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    each = world // len(set(hosts))
    in_blocks = all(len(set(hosts[at : at + each])) == 1 for at in range(0, world, each)) and each * len(set(hosts)) == world
    if len(set(hosts)) == 1 or not in_blocks:
        each = 1  # processes meet, not nodes
    rates, altered = {}, []
    words = MESSAGE_BYTES[device.type] // 4
    for turn in range(min(ROUNDS, world // each)):
        unit = partner(rank // each, world // each, turn)
        if unit is None:
            continue
        other = unit * each + rank % each
        times_s: list[float] = []
        sent = torch.arange(words, device=device, dtype=torch.int32) + rank
        received = torch.empty_like(sent)
        for _ in range(4):  # the first makes the connection
            started = time.perf_counter()
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, other), dist.P2POp(dist.irecv, received, other)]):
                work.wait()
            _wait(device)
            times_s.append(time.perf_counter() - started)
        rates[str(other)] = 4 * words / min(times_s[1:]) / 1e9
        if not torch.equal(received, sent - rank + other):
            altered.append(other)
    return rates, altered


def partner(unit: int, units: int, turn: int) -> int | None:
    """Whom `unit` meets in a round of a tournament in which all meet (the circle method); None where the number is odd and it sits out."""
    last = units - 1 + units % 2  # who stays in place; nobody where the number is odd
    if unit == last:
        return turn * (last + 1) // 2 % last
    other = (turn - unit) % last
    return other if other != unit else last if last < units else None


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clean(device: torch.device) -> None:
    """As if nothing had been allocated, for who counts memory afterwards."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
