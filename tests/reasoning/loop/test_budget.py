import pytest

from clvr_jax.errors import UsageError
from clvr_jax.reasoning.loop.budget import Account, Budget


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_steps": 0},
        {"max_nfe": 0},
        {"max_seconds": -1.0},
        {"max_seconds": float("nan")},
        {"max_parse_retries": -1},
        {"candidates": 0},
        {"stop_when": "never"},
        {"stop_when": "drawn", "candidates": 2},
    ],
)
def test_limits_are_checked(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Budget(**wrong)


def test_nfe_limit_is_never_exceeded():
    account = Account(Budget(max_nfe=10))
    assert account.spent(0) is None
    account.charge(4)
    assert account.spent(0) is None
    account.charge(4)
    assert account.spent(0) == "nfe limit"


def test_first_drawing_is_always_allowed():
    account = Account(Budget(max_nfe=1, max_seconds=1))
    assert account.spent(5) is None
    account.charge(4)
    assert account.spent(5) == "nfe limit"


def test_time_and_steps():
    account = Account(Budget(max_steps=2, max_seconds=1))
    account.charge(4)
    assert account.spent(0.9) is None
    assert account.spent(1.0) == "time limit"
    account.charge(4)
    assert account.spent(0.0) == "step limit"
