"""Which weights a run keeps, and when it has waited long enough."""

import pytest

from graft.core.errors import ConfigError
from graft.core.recipe import Train, load
from graft.train.best import Best


def writer(word):
    return lambda folder: (folder / "weights").write_text(word)


def test_the_lowest_loss_is_kept_and_patience_ends_the_run(tmp_path):
    best = Best(Train(validate_every=5, keep="best", patience=2), tmp_path, None)
    for step, loss in ((5, 2.0), (10, 1.5), (15, 1.5), (20, float("nan"))):
        assert not best.stop
        best.validated(loss, step, writer(f"of {step}"))
    assert best.stop and best.state == {"loss": 1.5, "step": 10, "waited": 2}
    again = Best(Train(validate_every=5, keep="best", patience=2), tmp_path, best.state)
    assert again.stop, "a resumed run has waited as long"
    (tmp_path / "out").mkdir()
    assert again.place(tmp_path / "out", writer("last")) == {"kept_step": 10, "kept_validation_loss": 1.5}
    assert (tmp_path / "out/weights").read_text() == "of 10"


def test_by_default_the_last_weights_are_the_artifact_and_nothing_stops(tmp_path):
    best = Best(Train(validate_every=5), tmp_path, None)
    for step in range(1, 50):
        best.validated(float(step), step, writer("better"))
    assert not best.stop and not (tmp_path / "best").exists()
    assert best.place(tmp_path, writer("last")) == {} and (tmp_path / "weights").read_text() == "last"


def test_other_ranks_write_nothing(tmp_path):
    best = Best(Train(validate_every=1, keep="best"), tmp_path, None)
    best.validated(1.0, 1, None)
    assert best.state["step"] == 1 and not list(tmp_path.iterdir())


def test_both_need_validations(tmp_path):
    (tmp_path / "r.toml").write_text('name = "r"\n[augment]\nseeds = "s"\n[model]\nbase = "b"\n[sft]\npatience = 2\n')
    with pytest.raises(ConfigError, match="set validate_every = N"):
        load(tmp_path / "r.toml")
