"""Safetensors read and written a tensor at a time: the library reads what was written, and what is no model folder is one line."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from graft.core.errors import ConfigError
from graft.train.tensor_files import INDEX, Spec, TensorFiles, write_tensors

TENSORS = {
    "a.weight": torch.randn(8, 5).bfloat16(),
    "b.weight": torch.randn(3, 4).t(),
    "c.count": torch.tensor(7),
    "d.weight": torch.randn(40, 2),
    "e.empty": torch.zeros(0, 3),
}
SPECS = {name: Spec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


@pytest.mark.parametrize("shard_bytes", [10**6, 150, 1])
def test_the_library_reads_what_was_written(tmp_path, shard_bytes):
    shards = write_tensors(tmp_path, SPECS, TENSORS.__getitem__, shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards == {10**6: 1, 150: 3, 1: 5}[shard_bytes]
    assert (tmp_path / INDEX).exists() == (shards > 1)
    found = {name: (t, file.name) for file in files for name, t in load_file(file).items()}
    assert all(torch.equal(found[name][0], t) and found[name][0].dtype == t.dtype for name, t in TENSORS.items()) and len(found) == 5
    if shards > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {name: file for name, (_, file) in found.items()}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    for file in files:
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt"}
    read = TensorFiles(tmp_path)
    assert read.specs == SPECS and all(torch.equal(read.get(name), t) for name, t in TENSORS.items())


def test_a_tensor_that_is_not_as_announced_is_not_written(tmp_path):
    with pytest.raises(AssertionError, match=r"a\.weight"):
        write_tensors(tmp_path, SPECS, lambda name: TENSORS[name].float())


def test_what_is_no_folder_of_safetensors_is_one_line(tmp_path):
    def refused(match):
        with pytest.raises(ConfigError, match=match) as e:
            TensorFiles(tmp_path)
        assert "\n" not in str(e.value)

    refused(r"holds no model\.safetensors nor other safetensors: name a Hugging Face model folder")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(r"its weights are pickled: only safetensors are read")
    (tmp_path / "pytorch_model.bin").unlink()
    save_file({"x": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    refused(rf"and no {INDEX} that says where its tensors lie")
    where = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    refused(r"holds no model-00002-of-00002\.safetensors")
    save_file({"z": torch.zeros(2)}, tmp_path / "model-00002-of-00002.safetensors")
    refused(r"model-00002-of-00002\.safetensors lacks the tensor y, which")
    whole = (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(whole[:-3])
    refused(r"model-00001-of-00002\.safetensors cannot be read")
    (tmp_path / INDEX).write_text("{}")
    refused(rf"{INDEX} cannot be read")


def test_a_quantised_dtype_is_named(tmp_path):
    save_file({"x": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"x is of dtype F8_E4M3: name a base that is not quantised"):
        TensorFiles(tmp_path)
