"""Plain state survives JSON."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolkit import plain
from toolkit.errors import UsageError

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
keys = st.integers() | st.text() | st.booleans()
values = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(keys, inner), max_leaves=20)


@given(values)
def test_round_trip(value):
    assert plain.decode(json.loads(json.dumps(plain.encode("x", value)))) == value


def test_schedulers_milestones_keep_their_keys():
    state = {"milestones": Counter({30: 1, 80: 2}), "last_lr": (0.1,)}
    found = plain.decode(json.loads(json.dumps(plain.encode("scheduler", state))))
    assert found == {"milestones": {30: 1, 80: 2}, "last_lr": [0.1]}


def test_anything_else_is_refused_by_name():
    with pytest.raises(UsageError, match=r"averaged\.module\[1\] holds a ndarray"):
        plain.encode("averaged", {"module": [1, np.zeros(2)]})
