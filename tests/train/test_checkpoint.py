"""Discovery takes the newest checkpoint whose files all hold, and says why it passed over the others."""

import json
import pickle
import random
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from graft.cli import main
from graft.core.artifact import sha256_file
from graft.core.metrics import MetricsWriter, read_metrics
from graft.train import checkpoint
from graft.train.checkpoint import CURSOR, FORMAT, SUMS, Writer, _canonical, cursor_of, fault, newest, steps

RANK = "rank-00000.safetensors"


def make(run, step, form=FORMAT):
    folder = run / f"step-{step:08d}"
    folder.mkdir(parents=True)
    save_file({"a:fp32": torch.arange(100.0) * step}, folder / RANK, metadata={"starts": '{"a": 0}'})
    (folder / CURSOR).write_text(json.dumps({"step": step, "format": form, "processes": 1}, indent=1))
    (folder / SUMS).write_text(_canonical({p.name: sha256_file(p) for p in folder.iterdir()}))
    return folder


def test_the_newest_whole_one_is_taken(tmp_path):
    assert newest(tmp_path) == (None, [])
    for step in (5, 10, 15):
        make(tmp_path, step)
    (tmp_path / ".step-00000020.writing").mkdir()
    assert newest(tmp_path) == (tmp_path / "step-00000015", [])


@pytest.mark.parametrize("damage", ["gone", "sums", "format"])
def test_a_damaged_one_is_passed_over_by_name(tmp_path, damage):
    make(tmp_path, 5)
    folder = make(tmp_path, 10, 1 if damage == "format" else FORMAT)
    if damage != "format":
        (folder / (RANK if damage == "gone" else SUMS)).unlink()
    taken, passed = newest(tmp_path)
    assert taken == tmp_path / "step-00000005" and fault(taken) is None
    said = {"gone": f"{RANK} is missing", "sums": SUMS, "format": "format 1"}[damage]
    assert len(passed) == 1 and "step-00000010" in passed[0] and said in passed[0]


def test_a_thousand_flipped_bits_and_cuts_are_each_refused_by_the_files_name(tmp_path):
    make(tmp_path, 5)
    files, draw, refused = sorted(make(tmp_path, 10).iterdir()), random.Random(0), 0
    for n in range(1000):
        file = draw.choice(files)
        held = file.read_bytes()
        at = draw.randrange(len(held))
        changed = bytearray(held)
        changed[at] ^= 1 << draw.randrange(8)
        file.write_bytes(held[:at] if n % 4 == 0 else bytes(changed))
        taken, passed = newest(tmp_path)
        refused += taken == tmp_path / "step-00000005" and (file.name in passed[0] or file.name == SUMS)
        file.write_bytes(held)
    print(f"refused {refused} of 1000 flips and cuts")
    assert refused == 1000 and newest(tmp_path)[0] == tmp_path / "step-00000010"


def test_one_that_cannot_be_read_is_passed_over_by_name(tmp_path, capsys):
    make(tmp_path, 5)
    tensors = make(tmp_path, 10) / RANK
    tensors.unlink()
    tensors.symlink_to("/proc/self/mem")  # reading it is an input/output error, as of a bad block
    assert newest(tmp_path) == (tmp_path / "step-00000005", [f"step-00000010 is passed over: {RANK} cannot be read (Input/output error)"])
    assert main(["checkpoints", "verify", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().out


def test_training_does_not_wait_for_the_removal_of_the_oldest(tmp_path, monkeypatch):
    for step in (5, 10):
        make(tmp_path, step)
    draft = make(tmp_path, 15).rename(tmp_path / ".step-00000015.writing")
    (draft / SUMS).rename(draft / RANK.replace(".safetensors", ".sums"))
    rmtree, may_go = shutil.rmtree, threading.Event()
    monkeypatch.setattr(
        shutil, "rmtree", lambda folder, **how: "writing" in folder.name or not folder.exists() or (may_go.wait(30), rmtree(folder, **how))
    )
    writer = Writer.__new__(Writer)
    vars(writer).update(run=tmp_path, keep=2, rank=0, world=1, failure=None, _thread=None, _step=15)
    assert writer.border(1, 0) is None and writer.failure is None
    assert newest(tmp_path) == (tmp_path / "step-00000015", []) and len(steps(tmp_path)) == 3, "it is whole, and the oldest still there"
    may_go.set()
    writer._removal.join(30)
    assert [folder.name for folder in steps(tmp_path)] == ["step-00000010", "step-00000015"]


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_the_next_steps_change_is_not_in_a_checkpoint_that_is_written_slowly(tmp_path, monkeypatch, alone):
    write, may_go = checkpoint.save_file, threading.Event()
    monkeypatch.setattr(checkpoint, "save_file", lambda *given, **how: (may_go.wait(30), write(*given, **how)))
    monkeypatch.setattr(checkpoint, "fragments", lambda engine: [])
    monkeypatch.setattr(checkpoint, "_state", lambda *given: {"step": torch.tensor(3.0)})
    optimizer = SimpleNamespace(single_partition_of_fp32_groups=[None])
    writer = Writer.__new__(Writer)
    vars(writer).update(run=tmp_path, keep=2, rank=0, world=1, failure=None, _thread=None, _removal=None, _step=None, _copies=None, _host={})
    writer._engine = SimpleNamespace(optimizer=optimizer)
    guard = {"losses": [1.0]}
    writer.save({"step": 5, "guard": guard})
    guard["losses"] = [1.0, 2.0]  # of the step after, while the file is being written
    may_go.set()
    assert writer.finish() is None
    (folder,) = steps(tmp_path)
    assert cursor_of(folder)["guard"] == {"losses": [1.0]}


def test_what_others_left_half_written_goes_when_training_begins(tmp_path, alone):
    make(tmp_path, 5)
    (make(tmp_path, 10) / RANK).rename(tmp_path / "metrics.jsonl")
    (tmp_path / "step-00000010").rename(tmp_path / ".step-00000010.writing")
    optimizer = SimpleNamespace(bit16_groups=[], single_partition_of_fp32_groups=[])
    Writer(SimpleNamespace(optimizer=optimizer, module=torch.nn.Linear(1, 1), device=torch.device("cpu")), tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "step-00000005"]


class Trap:
    """A pickle that runs code as it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("slot", [RANK, CURSOR, SUMS])
def test_a_planted_pickle_runs_nothing(tmp_path, slot):
    folder, ran = make(tmp_path, 5), tmp_path / "ran"
    pickle.loads(pickle.dumps(Trap(ran))).close()
    assert ran.exists()
    ran.unlink()
    (folder / slot).write_bytes(pickle.dumps(Trap(ran)))
    for recorded in (False, True):
        if recorded and slot != SUMS:
            (folder / SUMS).write_text(_canonical({p.name: sha256_file(p) for p in folder.iterdir() if p.name != SUMS}))
        assert fault(folder) and not ran.exists()


def test_the_command_lists_and_verifies(tmp_path, capsys):
    for step in (5, 10):
        make(tmp_path, step)
    assert main(["checkpoints", "verify", str(tmp_path)]) == 0 and capsys.readouterr().out.count("verified") == 2
    shard = tmp_path / "step-00000010" / RANK
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["checkpoints", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "verified" in lines[0] and lines[1].endswith(f"{RANK} was altered")
    assert main(["checkpoints", "verify", str(tmp_path)]) == 2
    assert main(["checkpoints", str(tmp_path / "none")]) == 2 and "holds no checkpoint" in capsys.readouterr().err


def test_metrics_of_repeated_steps_are_dropped_and_a_cut_line_is_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = MetricsWriter(path)
    for step in range(5):
        first.write({"step": step, "run": 1})
    first.close()
    path.write_text(path.read_text() + '{"step": 5, "ru')
    second = MetricsWriter(path, resume_step=3)
    second.write({"step": 3, "run": 2})
    second.close()
    assert [(m["step"], m["run"]) for m in read_metrics(path)] == [(0, 1), (1, 1), (2, 1), (3, 2)]
