import dataclasses
from pathlib import Path

import pytest

from clvr_jax.errors import ClvrError
from clvr_jax.files.recipe_files import config_from_json, config_to_json


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = (1, 2)
    where: Path = Path("a")


@dataclasses.dataclass(frozen=True)
class Config:
    start: Path | None = None
    name: str | None = None
    inner: Inner = Inner()


def test_a_configuration_comes_back_with_its_types():
    config = Config(Path("runs/x"), "x", Inner((3,), Path("b")))
    assert config_from_json(Config(), config_to_json(config)) == config
    assert config_from_json(config, config_to_json(Config())) == Config()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (3, "the configuration must be an object, got 3"),
        ({"inner": None}, "inner must be an object"),
        ({"inner": {"sizes": 4}}, "sizes must be a list, got 4"),
        ({"inner": {"where": ["a"]}}, "where must be a text, got a list of 1"),
    ],
)
def test_values_of_another_type_are_refused_by_the_name_of_their_field(values, said):
    with pytest.raises(ClvrError, match=said):
        config_from_json(Config(), values)
