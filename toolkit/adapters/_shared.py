"""What every adapter does alike, above the framework: checks, hashes, packing, host-side random states."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping

import numpy as np

from toolkit import compression as compressors
from toolkit.errors import UsageError
from toolkit.options import REDUCERS

GPU_RANDOM = "random/torch_cuda"  # the state of torch's generator on a worker's GPU


def seed_python_and_numpy(seed: int) -> None:
    """Seed `random` and numpy's legacy global generator, which users' own data code may use."""
    random.seed(seed)
    np.random.seed(seed)


def framework_seed(seed: int, rank: int) -> int:
    """A rank's own seed for its framework's generator, 0 … 2³¹ − 1."""
    return int(np.random.SeedSequence([seed, rank]).generate_state(1)[0] >> 1)


def export_python_and_numpy() -> dict[str, np.ndarray]:
    """The states of `random` and of numpy's legacy global generator, as named arrays."""
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "random/python": np.array(words, np.uint32),
        "random/python/gauss": np.array([np.nan if gauss is None else gauss]),
        "random/numpy": np.array(keys, np.uint32),
        "random/numpy/position": np.array([position, has_gauss], np.int64),
        "random/numpy/gauss": np.array([cached]),
    }


def import_python_and_numpy(state: Mapping[str, np.ndarray]) -> None:
    """Put back what `export_python_and_numpy` gave."""
    gauss = float(state["random/python/gauss"][0])
    random.setstate((3, tuple(state["random/python"].tolist()), None if np.isnan(gauss) else gauss))
    position, has_gauss = state["random/numpy/position"].tolist()
    if not 0 <= position <= len(state["random/numpy"]) or has_gauss not in (0, 1):  # numpy would read beyond its array
        raise UsageError(f"random/numpy/position is {[position, has_gauss]}: the saved state is no random state.")
    np.random.set_state(("MT19937", state["random/numpy"], position, has_gauss, float(state["random/numpy/gauss"][0])))


def check_distribute_options(accumulation_steps: int, clip_norm: float | None, compression: str, reducer: str) -> None:
    """Raise `UsageError` for an option of `distribute` that is out of range."""
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int) or accumulation_steps < 1:
        raise UsageError(f"accumulation_steps is {accumulation_steps!r}: give a whole number of at least 1.")
    if clip_norm is not None and not 0 < clip_norm < float("inf"):
        raise UsageError(f"clip_norm is {clip_norm!r}: give a positive number, or None for no clipping.")
    compressors.make(compression, [])
    check_reducer(reducer)


def check_reducer(reducer: str) -> None:
    """Raise `UsageError` for a reducer that there is not."""
    if reducer not in REDUCERS:
        raise UsageError(f"the reducer is {reducer!r}: give one of {', '.join(REDUCERS)}.")


def weighted_average(
    values: Mapping[str, float | np.ndarray],
    weight: float,
    all_reduce_sum: Callable[[np.ndarray], np.ndarray],
) -> dict[str, float | np.ndarray]:
    """`Adapter.average` on top of one sum of a float64 vector over all ranks."""
    if not 0 <= weight < float("inf"):
        raise UsageError(f"the weight of an average is {weight!r}: give a finite number of at least 0.")
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}
    weighted = [weight * array.ravel() if weight > 0 else np.zeros(array.size) for array in arrays.values()]
    total = all_reduce_sum(np.concatenate([[weight], *weighted]))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = total[1:] / total[0]
    result: dict[str, float | np.ndarray] = {}
    start = 0
    for name, array in arrays.items():
        part = means[start : start + array.size].reshape(array.shape)
        result[name] = float(part) if array.ndim == 0 else part
        start += array.size
    return result


def digest_arrays(state: Mapping[str, np.ndarray]) -> dict[str, str]:
    """16 hexadecimal digits of BLAKE2b over each array's dtype, shape and bytes."""
    digests = {}
    for name, array in state.items():
        hasher = hashlib.blake2b(f"{array.dtype.str}{array.shape}".encode(), digest_size=8)
        hasher.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        digests[name] = hasher.hexdigest()
    return digests


def check_state_fits(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Raise `UsageError` listing the first differences in names, shapes and dtypes."""
    refuse(differences(found, expected))


def check_local_fits(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """As `check_state_fits`, for `Adapter.export_local`: the random state of a GPU may be there on one side alone."""
    if (GPU_RANDOM in found) != (GPU_RANDOM in expected):
        found, expected = ({n: a for n, a in state.items() if n != GPU_RANDOM} for state in (found, expected))
    check_state_fits(found, expected)


def differences(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> list[str]:
    """What the names, shapes and dtypes of a saved state have different from a model's own, a text each."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in this {_owner(name)}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        have, want = found[name], expected[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            problems.append(
                f"{name} is {have.dtype}{list(have.shape)} where the {_owner(name)} has {want.dtype}{list(want.shape)}"
            )
    return problems


def refuse(problems: list[str]) -> None:
    """Raise `UsageError` with the first of the differences, where there is one."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UsageError(
            f"the saved state does not fit: {'; '.join(sorted(problems)[:5])}{more}. "
            "Build the model and its optimizer with the options that they were saved with."
        )


def _owner(name: str) -> str:
    return "optimizer" if name.startswith("optimizer/") else "model"
