"""Shards and bases that do not belong together are refused in one line with the numbers, before any weight is read."""

import json
import subprocess
import sys

import pytest

from graft.core.errors import ConfigError
from graft.core.shards import ShardSet
from graft.train.fit import refuse_misfits
from graft.train.sizing.check import trains_alike

from .small import environment, small_plan


@pytest.fixture
def plan(tmp_path):
    return small_plan(tmp_path)


@pytest.fixture
def folder(plan):
    """Of the training shards, as they were made for the base before a test changes it."""
    return plan.resolve("shard-sft").directory / "train"


def refuse(plan, folder):
    refuse_misfits([(folder, ShardSet.open(folder))], plan, "sft")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_belongs_together_is_let_through(plan, folder):
    refuse(plan, folder)


def test_bins_that_are_not_the_recipes(plan, folder):
    with pytest.raises(ConfigError, match=r"train has bins of 32 tokens, the recipe shard\.seq_len = 64: make the shards again"):
        refuse(small_plan(plan.root, "shard.seq_len=64"), folder)


def test_a_document_longer_than_the_base_has_positions(plan, folder):
    longest = int(ShardSet.open(folder).doc_lens().max())
    edit(plan.root / "base/config.json", max_position_embeddings=longest)
    refuse(plan, folder)
    edit(plan.root / "base/config.json", max_position_embeddings=longest - 1)
    with pytest.raises(ConfigError, match=rf"of {longest} tokens, .*max_position_embeddings = {longest - 1}: set shard\.seq_len to {longest - 1} at"):
        refuse(plan, folder)


def test_a_document_longer_than_a_layer_sees(plan, folder):
    longest, config = int(ShardSet.open(folder).doc_lens().max()), plan.root / "base/config.json"
    edit(config, model_type="starcoder2", sliding_window=longest)
    refuse(plan, folder)
    edit(config, sliding_window=longest - 1)
    with pytest.raises(
        ConfigError, match=rf"train has a document of {longest} tokens, .* = {longest - 1}, .*: set shard\.seq_len to {longest - 1} at"
    ):
        refuse(plan, folder)
    again = small_plan(plan.root)  # of the changed base, as `graft check` finds them
    with pytest.raises(ConfigError, match=rf"train has a document of {longest} tokens, model\.base = '.*base' sliding_window = {longest - 1}"):
        trains_alike(again)


def test_a_head_that_is_not_computed(plan, folder):
    edit(plan.root / "base/config.json", model_type="granite", logits_scaling=8.0)
    with pytest.raises(ConfigError, match=r"model\.base = '.*base' has logits_scaling = 8\.0, which graft does not compute"):
        refuse(plan, folder)


def test_an_id_beyond_the_embedding(plan, folder):
    largest = ShardSet.open(folder).largest_id()
    edit(plan.root / "base/config.json", vocab_size=largest + 1)
    refuse(plan, folder)
    edit(plan.root / "base/config.json", vocab_size=largest)
    with pytest.raises(ConfigError, match=rf"train has the token id {largest}, model\.base = '.*base' only {largest} embeddings: name a base"):
        refuse(plan, folder)


def test_another_vocabulary_of_the_same_size(plan, folder):
    file = plan.root / "base/tokenizer.json"
    model = json.loads(file.read_text())["model"]
    model["vocab"] |= {"a": model["vocab"]["b"], "b": model["vocab"]["a"]}
    edit(file, model=model)
    with pytest.raises(
        ConfigError, match=r"was made with another tokenizer or chat template \(\w{12}\) than .*base' has \(\w{12}\): make the shards"
    ):
        refuse(plan, folder)


def test_another_chat_template(plan, folder):
    with pytest.raises(ConfigError, match="was made with another tokenizer or chat template"):
        refuse(small_plan(plan.root, "model.chat_template=alpaca"), folder)


def test_shards_from_elsewhere_stop_the_launch_before_a_weight_is_read(plan):
    """As if a folder had been copied into the artifact; that the weights are unreadable as well, nobody notices."""
    (plan.root / "base/model.safetensors").write_bytes(b"nothing")
    plan = small_plan(plan.root)
    index = plan.resolve("shard-sft").directory / "train/index.json"
    text = index.read_text()
    index.write_text(text.replace(json.loads(text)["tokenizer"], "0" * 64))
    command = [sys.executable, "-m", "graft.train.launch", str(plan.path), "--stage", "sft", "--workspace", str(plan.root)]
    process = subprocess.run(command, env=environment(2), capture_output=True, text=True, timeout=120)
    assert process.returncode == 2 and process.stderr.count("\n") == 1, process.stderr
    assert "another tokenizer or chat template (000000000000)" in process.stderr
