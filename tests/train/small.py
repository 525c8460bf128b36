"""A recipe whose parents of training are made by hand: a tiny random base and shards of random tokens, no Ray."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

from graft.core.metrics import read_metrics
from graft.core.recipe import EmbeddedBase, Train
from graft.core.shards import Columns, write_index, write_shard
from graft.core.stages import Plan
from graft.model.chat import load_tokenizer, tokenizer_digest
from graft.train.launch import command

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = """
name = "small"
seed = 3
deepspeed = "{configs}/deepspeed/zero2.json"
[augment]
seeds = "{configs}/recipes/image-intent/seeds.jsonl"
[shard]
seq_len = 32
[model]
base = "base"
precision = "fp32"
chat_template = "chatml"
[sft]
lora = {{ r = 4, alpha = 8 }}
lr = 1e-2
epochs = 2
global_batch = 4
micro_batch = 2
save_every = 2
validate_every = 4
"""
BINS = 14  # an epoch is 3.5 steps: step 3 crosses its border


def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    t.train_from_iterator(
        ["a b c"], trainers.BpeTrainer(vocab_size=264, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<|im_end|>", pad_token="<|pad|>")


def random_bins(count, seq_len, seed):
    """(ids, mask, doc_lens) of bins whose number of supervised tokens differs much, so that a wrong normalisation shows."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        lens = np.array([rng.integers(3, 12), rng.integers(3, 12)], np.int32)
        ids = rng.integers(4, 260, seq_len, dtype=np.int32)
        mask = (rng.random(seq_len) < rng.choice([0.1, 0.9])).astype(np.uint8)
        mask[1], mask[lens.sum() :] = 1, 0
        yield ids, mask, lens


def write_shards(folder, count, digest, seq_len=32, seed=0):
    """digest: of the tokenizer."""
    write_bins(folder, random_bins(count, seq_len, seed), digest)


def write_bins(folder, bins, digest):
    """bins: (ids, mask, doc_lens) of each, of two documents."""
    folder.mkdir(parents=True)
    ids, masks, lens = (np.stack(c) for c in zip(*bins, strict=True))
    count, seq_len = ids.shape
    documents = 2 * count
    bins = Columns(ids, masks, lens.reshape(-1), np.arange(0, documents + 1, 2), np.zeros(documents, np.int32), np.arange(documents))
    write_index(folder, seq_len=seq_len, pad_id=3, tokenizer=digest, shards=[write_shard(folder / "part-000-000.arrow", bins, ["t"])])


def small_plan(root: Path, *overrides: str, hidden_size=64, bins=None) -> Plan:
    """A plan in `root` whose sft stage is ready to run, the base of four heads. bins: of its training, or random ones."""
    from graft.model.base import random_llama

    if not (root / "small.toml").exists():
        (root / "small.toml").write_text(RECIPE.format(configs=CONFIGS))
        sizes = {"vocab_size": 300, "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "layers": 2, "heads": 4, "kv_heads": 2}
        shape = EmbeddedBase(**sizes, train=Train(corpora=("a",), lora=None))
        random_llama(shape, 264, 64, 0).save_pretrained(root / "base")
        tokenizer().save_pretrained(root / "base")
    plan = Plan(root / "small.toml", overrides, root)
    for stage, fill in (("augment", _rows), ("prepare", _splits), ("shard-sft", partial(_shards, bins))):
        job = plan.resolve(stage)
        if job.artifact is None:
            with job.writing() as draft:
                fill(draft.path, plan)
    return plan


def _rows(folder, plan):
    (folder / "rows.jsonl").write_text(json.dumps({"id": "0"}) + "\n")


CALL = 'call("generate_image", {"prompt": "b"})'


def _splits(folder, plan):
    (folder / "rows").mkdir()
    (folder / "rows" / "train.jsonl").write_text("{}\n")
    with (folder / "rows" / "test.jsonl").open("w") as f:
        for i, (label, answer) in enumerate([("call", CALL), ("text", "c"), ("text", "a")]):
            messages = [{"role": "user", "content": "abc"[i]}, {"role": "assistant", "content": answer}]
            f.write(json.dumps({"id": str(i), "messages": messages, "label": label, "family": f"{label}-0"}) + "\n")


def _shards(bins, folder, plan):
    digest = tokenizer_digest(load_tokenizer(*plan.external_base(), plan.recipe.model.chat_template))
    write_bins(folder / "train", bins or random_bins(BINS, 32, 0), digest)
    write_shards(folder / "validation", 3, digest, seed=9)


def start(plan, processes, *options, **variables):
    """The launcher of the sft stage, started; what it says is one stream. variables: of its environment."""
    sets = [word for o in plan.overrides for word in ("--set", o)]
    argv = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", "sft", "--workspace", str(plan.root), *sets, *options]
    env = environment(processes) | variables
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def train(plan, processes=2, *options, **variables):
    """The artifact of a run of the sft stage that ends well."""
    process = start(plan, processes, *options, **variables)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-3000:]
    return plan.resolve("sft").artifact


def start_program(plan, program, *arguments, processes=2):
    """A program beside this file in the place of `graft.train`, started: under it the stage runs with something amiss."""
    argv, variables = command([str(plan.path), str(plan.root), *map(str, arguments), *plan.overrides])
    module = argv.index("graft.train") - 1
    argv[module : module + 2] = [str(Path(__file__).with_name(program))]
    wanted = variables | environment(processes)
    return subprocess.Popen(argv, env=wanted, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def run_program(plan, program, *arguments, processes=2):
    """(exit code, what it said)."""
    process = start_program(plan, program, *arguments, processes=processes)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def curve(path):
    """(step, loss, gradient norm, learning rate, targets, validation loss) of every step."""
    return [(m["step"], m["loss"], m["grad_norm"], m["lr"], m["targets"], m.get("validation_loss")) for m in read_metrics(path / "metrics.jsonl")]


def environment(processes: int) -> dict[str, str]:
    return {**os.environ, "GRAFT_PROCESSES": str(processes), "OMP_NUM_THREADS": "1"}
