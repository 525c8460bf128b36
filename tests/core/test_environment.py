import pytest

from graft.core.environment import number
from graft.core.errors import ConfigError


def test_a_number_of_the_environment(monkeypatch):
    monkeypatch.delenv("GIVEN", raising=False)
    assert number("GIVEN", 3, 1) == 3
    for text, default, read in (("", 3, 3), ("2", 3, 2), ("1.5", 50.0, 1.5)):
        monkeypatch.setenv("GIVEN", text)
        assert number("GIVEN", default, 1) == read


@pytest.mark.parametrize("default", [3, 3.0])
@pytest.mark.parametrize("text", ["two", "2m", "²", "0", "-1", "nan", "inf", "1e999"])
def test_what_is_none_is_refused_in_one_line(monkeypatch, text, default):
    monkeypatch.setenv("GIVEN", text)
    with pytest.raises(ConfigError, match=r"^GIVEN = '.+': give a (whole )?number from 1 on$"):
        number("GIVEN", default, 1)
