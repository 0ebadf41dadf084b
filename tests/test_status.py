"""The live state goes through JSON and comes back; what is no state is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastictrain.status import Status

numbers = st.floats(allow_nan=False, allow_infinity=False)
"""NaN is not equal to itself, and no status holds it: `to_json` makes it null."""
statuses = st.builds(
    Status,
    loss=st.none() | numbers,
    tokens_per_s=numbers,
    goodput=numbers,
    last_recovery_s=st.none() | numbers,
    updated_at=numbers,
)


@given(statuses)
def test_a_status_comes_back_from_json(status: Status) -> None:
    assert Status.from_json(json.loads(json.dumps(status.to_json()))) == status


def test_fields_that_are_missing_or_wrong_are_named() -> None:
    with pytest.raises(ValueError, match="not the status of a run") as caught:
        Status.from_json({"run": "x", "status": "flying", "step": "many"})
    for field in ("status", "step", "workers"):
        assert f"{field}: " in str(caught.value)
