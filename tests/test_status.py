"""The live state goes through JSON and comes back; what is no state is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.status import Status


@given(st.from_type(Status).filter(lambda s: all(map(_finite, (s.loss, s.tokens_per_s, s.goodput, s.updated_at)))))
def test_a_status_comes_back_from_json(status: Status) -> None:
    assert Status.from_json(json.loads(json.dumps(status.to_json()))) == status


def _finite(value: float | None) -> bool:
    return value is None or abs(value) < float("inf")


def test_fields_that_are_missing_or_wrong_are_named() -> None:
    with pytest.raises(ValueError, match="not the status of a run") as caught:
        Status.from_json({"run": "x", "status": "flying", "step": "many"})
    for field in ("status", "step", "workers"):
        assert f"{field}: " in str(caught.value)
