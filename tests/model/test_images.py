import json

import numpy as np
import pytest
from PIL import Image

from graft.core.errors import ConfigError
from graft.model.images import CONFIG, ImageProcessor, copy_config, write_config

REAL = {  # of Qwen/Qwen2.5-VL-7B-Instruct
    "min_pixels": 3136, "max_pixels": 12_845_056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip


@pytest.fixture
def real(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps(REAL))
    return tmp_path


@pytest.mark.parametrize("size", [(112, 112), (4, 4), (1000, 30), (1920, 1080), (29, 57), (4096, 4096)])
def test_the_grid_follows_from_the_size_alone(real, size):
    processor = ImageProcessor(str(real), None, 200_000)
    t, h, w = grid = processor.grid(*size)
    assert processor.patches(Image.new("RGB", size)).shape == (t * h * w, 3 * 2 * 14 * 14)
    assert t == 1 and h % 2 == w % 2 == 0 and 3136 <= h * w * 196 <= 200_000 and processor.tokens(grid) == h * w // 4


def test_the_recipes_limit_counts_where_it_is_lower_than_the_bases(real):
    assert ImageProcessor(str(real), None, 1_003_520).tokens(ImageProcessor(str(real), None, 1_003_520).grid(4000, 4000)) <= 1280
    high = ImageProcessor(str(real), None, 1 << 40)
    assert high.most == 12_845_056 and high.tokens(high.grid(4000, 4000)) > 10_000


def test_pixels_are_normalised_as_the_base_says(real):
    found = ImageProcessor(str(real), None, 1_003_520).patches(Image.new("RGB", (56, 56), (255, 0, 0)))
    wanted = [(1 - REAL["image_mean"][0]) / REAL["image_std"][0], -REAL["image_mean"][1] / REAL["image_std"][1]]
    np.testing.assert_allclose([found[0, 0], found[0, 2 * 196]], wanted, rtol=1e-5)


def test_a_base_that_sees_nothing_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"it sees no images; name a Qwen2\.5-VL model"):
        ImageProcessor(str(tmp_path), None, 10_000)
    (tmp_path / CONFIG).write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))
    with pytest.raises(ConfigError, match=r"does not know \(CLIPImageProcessor\)"):
        ImageProcessor(str(tmp_path), None, 10_000)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        ImageProcessor(str(tmp_path), None, 10_000)


def test_what_graft_writes_is_the_bases_own_and_goes_on_with_it(tmp_path, real):
    (tmp_path / "made").mkdir()
    (tmp_path / "trained").mkdir()
    write_config(tmp_path / "made")
    copy_config(str(tmp_path / "made"), None, tmp_path / "trained")
    found, wanted = (ImageProcessor(str(f), None, 1 << 40).processor for f in (tmp_path / "trained", real))
    assert [found.image_mean, found.image_std, found.patch_size, found.merge_size] == [
        tuple(wanted.image_mean), tuple(wanted.image_std), wanted.patch_size, wanted.merge_size,
    ]  # fmt: skip
    copy_config(str(tmp_path), None, tmp_path / "made")
