"""A global batch and a run are split without a remainder that anybody would miss."""

import pytest

from graft.core.errors import ConfigError
from graft.train.split import micro_batch_of, total_steps


def test_micro_batches_divide_the_share():
    assert [micro_batch_of(8, 2, m) for m in (1, 2, 3, 4, 9)] == [1, 2, 2, 4, 4]
    with pytest.raises(ConfigError, match="8 bins cannot be split over 3"):
        micro_batch_of(8, 3, 1)


def test_steps_of_a_run():
    assert [total_steps(100, e, 8, m) for e, m in ((1, None), (0.01, None), (2, 10))] == [12, 1, 10]
