import dataclasses
from pathlib import Path

from clvr_jax.recipe_files import plain, rebuilt


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
    assert rebuilt(Config(), plain(config)) == config
    assert rebuilt(config, plain(Config())) == Config()
