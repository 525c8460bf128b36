"""Which weights a run keeps, and when it has waited long enough."""

import errno
import shutil

import pytest
from safetensors import SafetensorError

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


def full(folder):
    (folder / "weights").write_text("half")
    raise OSError(errno.ENOSPC, "No space left on device")


def full_to_safetensors(folder):
    """What its writer raises; a disk that is truly full: test_resume.py."""
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("fails", [full, full_to_safetensors])
def test_what_a_full_disk_did_not_take_is_never_published_under_its_step(tmp_path, fails):
    config = Train(validate_every=5, keep="best", patience=3)
    best = Best(config, tmp_path, None)
    assert best.validated(1.5, 5, writer("of 5")) is None
    why = best.validated(1.0, 10, fails)
    assert why.startswith("the best weights so far, of step 10, were not written: ") and "No space left" in why
    assert [p.name for p in tmp_path.iterdir()] == ["best"], "what was begun makes no disk fuller"
    for again in (best, Best(config, tmp_path, best.state)):
        (out := tmp_path / str(id(again))).mkdir()
        assert again.place(out, writer("last")) == {"kept_step": 5, "kept_validation_loss": 1.5}
        assert {p.name: p.read_text() for p in out.iterdir()} == {"weights": "of 5"}
        shutil.rmtree(out)
    assert best.validated(1.2, 15, writer("of 15")) is None, "not the lowest, but lower than what is kept"
    assert best.state == {"loss": 1.0, "step": 10, "waited": 1}, "patience does not depend on the disk, which one rank sees"
    assert best.place(tmp_path, writer("last")) == {"kept_step": 15, "kept_validation_loss": 1.2}


def test_where_none_were_written_the_last_are_published_without_a_word(tmp_path):
    best = Best(Train(validate_every=5, keep="best"), tmp_path, None)
    (tmp_path / "best").mkdir()
    (tmp_path / "best/weights").write_text("of a run that was started over")
    assert "No space left" in best.validated(1.0, 5, full)
    assert best.place(tmp_path, writer("last")) == {} and (tmp_path / "weights").read_text() == "last"


def test_a_loss_that_is_no_number_is_no_lower_one(tmp_path):
    best = Best(Train(validate_every=5, keep="best"), tmp_path, None)
    for step, loss in ((5, float("nan")), (10, 2.0)):
        best.validated(loss, step, writer(f"of {step}"))
    assert best.state == {"loss": 2.0, "step": 10, "waited": 0} and (tmp_path / "best/weights").read_text() == "of 10"


def test_both_need_validations(tmp_path):
    (tmp_path / "r.toml").write_text('name = "r"\n[augment]\nseeds = "s"\n[model]\nbase = "b"\n[sft]\npatience = 2\n')
    with pytest.raises(ConfigError, match="set validate_every = N"):
        load(tmp_path / "r.toml")
