"""Compression: each scheme on ranks that are threads, against a second, plain way to compute what it promises."""

import struct
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rank_threads import Ranks
from toolkit import compression
from toolkit.compression import quantised, sixteen, topk
from toolkit.errors import UsageError

SCHEMES = ["none", "fp16", "bf16", "int8", "topk:0.1", "powersgd:2"]
WITH_MEMORY = ["int8", "topk:0.1", "powersgd:2"]
# Odd lengths, a kernel, an empty tensor, a single value, a matrix that a rank of 2 makes smaller.
SHAPES = [(13, 11), (7,), (3, 2, 5, 5), (0, 4), (), (31, 17), (1,)]
MODELS = {"mixed": SHAPES, "one value": [()], "two values": [(2,)], "empty tensors": [(0,), (3, 0)], "nothing": []}


def values_in(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


def gradients(shapes, size, steps=1, seed=0, scale=1e-2):
    """float32, (steps, size, n): each rank's, of magnitudes over some orders."""
    generator = np.random.default_rng(seed)
    n = values_in(shapes)
    spread = np.exp(generator.normal(0, 2, n))
    return (scale * spread * generator.normal(size=(steps, size, n))).astype(np.float32)


def averaged(name, shapes, given, states=None, ranks=None):
    """Each rank's results, (size, steps, n), and compressors, after averaging each step of `given` (steps, size, n)."""
    size = given.shape[1]

    def work(wire):
        compressor = compression.make(name, shapes)
        if states:
            compressor.load_state(states[wire.rank])
        results = []
        for step in given:
            flat = step[wire.rank].copy()
            compressor.average(flat, wire)
            results.append(flat)
        return np.array(results), compressor

    results, compressors = zip(*(ranks or Ranks(size)).run(work), strict=True)
    return np.array(results), compressors


def same_bits(a, b):
    return a.shape == b.shape and a.tobytes() == b.tobytes()


# --- what every scheme promises


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_same_bits_on_all_ranks_and_about_the_mean(name, model, size):
    given = gradients(MODELS[model], size, steps=4)
    results, _ = averaged(name, MODELS[model], given)
    assert all(same_bits(result, results[0]) for result in results)
    assert results.shape == (size, *given[:, 0].shape)
    if name in ("none", "fp16", "bf16"):
        np.testing.assert_allclose(
            results[0], given.astype(float).mean(1), rtol=0, atol=0.02 * (given.max() if given.size else 0)
        )


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", [*SCHEMES, "topk", "powersgd"])
def test_bytes_per_step_are_those_that_travelled(name, model, size):
    ranks = Ranks(size)
    _, (compressor, *_) = averaged(name, MODELS[model], gradients(MODELS[model], size), ranks=ranks)
    assert ranks.bytes_sent == [compressor.bytes_per_step(size)] * size
    assert compression.make("none", MODELS[model]).bytes_per_step(size) == compressor.bytes_uncompressed(size)


def test_bytes_of_a_large_model():
    shapes = [(1000, 1000), (1000,)]
    sent = {name: compression.make(name, shapes).bytes_per_step(4) for name in compression.NAMES}
    assert sent["none"] == 6 * 1_001_000  # 2 · 3/4 of 4 bytes
    assert sent["fp16"] == sent["bf16"] == sent["none"] // 2
    assert sent["int8"] == 6 * (250_252 + 2 * 4)  # a byte a value of 250,250, and the steps of two tensors
    assert sent["topk"] == 3 * 8 * 10_010
    assert sent["powersgd"] == 2 * 3 * (4 * 1000 + 1000 + 4 * 1000)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_resumed_run_goes_on_to_the_same_bits(name, size):
    given = gradients(SHAPES, size, steps=6)
    whole, _ = averaged(name, SHAPES, given)
    _, before = averaged(name, SHAPES, given[:3])
    states = [compressor.state() for compressor in before]
    assert all(array.dtype == np.float32 for state in states for array in state.values())
    rest, _ = averaged(name, SHAPES, given[3:], states)
    assert same_bits(rest, whole[:, 3:])
    if name in WITH_MEMORY:  # so that the state is what made it so
        anew, _ = averaged(name, SHAPES, given[3:])
        assert not same_bits(anew, whole[:, 3:])


def test_a_state_is_a_copy():
    _, (compressor, _) = averaged("int8", SHAPES, gradients(SHAPES, 2))
    state = compressor.state()
    state["memory"][:] = 7
    assert not (compressor.state()["memory"] == 7).any()


@pytest.mark.parametrize("name", WITH_MEMORY)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_was_applied_and_what_is_remembered_are_all_gradients(name, size):
    given = gradients(SHAPES, size, steps=12)
    results, compressors = averaged(name, SHAPES, given)
    remembered = np.mean([compressor.state()["memory"].astype(float) for compressor in compressors], axis=0)
    total = given.astype(float).mean(1).sum(0)
    applied = results[0].astype(float).sum(0)
    np.testing.assert_allclose(applied + remembered, total, rtol=1e-5, atol=2e-6 * np.abs(given).max())
    assert np.abs(remembered).max() > 1e-4 * np.abs(total).max()  # there was something to remember


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 150, 400, -1])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_gradient_that_is_not_finite_on_one_rank(name, place, value):
    """Its mean is not finite on all ranks, and the step leaves nothing behind."""
    given = gradients(SHAPES, 3, steps=5)
    broken = given.copy()
    broken[2, 1, place] = value
    results, compressors = averaged(name, SHAPES, broken)
    assert not np.isfinite(results[:, 2]).all(axis=1).any()
    without, expected = averaged(name, SHAPES, given[[0, 1, 3, 4]])
    assert same_bits(results[:, [0, 1, 3, 4]], without)
    for compressor, like in zip(compressors, expected, strict=True):
        for key, array in like.state().items():
            assert same_bits(compressor.state()[key], array)


COLUMN = slice(-1 - 31 * 17, -1, 17)  # the first one of the matrix of 31 rows


@pytest.mark.parametrize("place", [slice(None), slice(143, 150), COLUMN])  # everything, the vector of 7
@pytest.mark.parametrize("name", SCHEMES)
def test_sums_beyond_float32_are_not_finite_and_leave_nothing_behind(name, place):
    given = gradients(SHAPES, 3, steps=3)
    given[1] = 0
    given[1, :, place] = 2e38
    results, compressors = averaged(name, SHAPES, given)
    if name.startswith("topk"):  # divides before it adds
        assert np.isfinite(results).all() and results[0, 1].max() > 1.9e38
        return
    assert not np.isfinite(results[:, 1]).all(axis=1).any()
    without, expected = averaged(name, SHAPES, given[[0, 2]])
    assert same_bits(results[:, [0, 2]], without)
    for compressor, like in zip(compressors, expected, strict=True):
        for key, array in like.state().items():
            assert same_bits(compressor.state()[key], array)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zeros_and_gradients_that_come_later_are_seen(name):
    given = gradients(SHAPES, 2, steps=5)
    given[:3] = 0
    results, compressors = averaged(name, SHAPES, given)
    assert not results[:, :3].any()
    assert results[0, 3:].any(axis=1).all()
    assert all(np.isfinite(array).all() for array in compressors[0].state().values())


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e6, 1e12])
@pytest.mark.parametrize("name", ["bf16", "int8", "topk:0.1", "powersgd:2"])
def test_the_scale_of_the_gradients_does_not_matter(name, scale):
    """A power of two near it scales the result and nothing else."""
    factor = np.float32(2.0 ** round(np.log2(scale)))
    given = gradients(SHAPES, 2, steps=3)
    plain, _ = averaged(name, SHAPES, given)
    scaled, _ = averaged(name, SHAPES, given * factor)
    np.testing.assert_allclose(scaled / factor, plain, rtol=1e-4, atol=1e-6 * np.abs(plain).max())


def test_the_number_of_ranks_may_change_between_steps():
    given = gradients(SHAPES, 5)
    made = [compression.make("int8", SHAPES) for _ in range(5)]
    for size in (2, 5, 3, 1, 4):

        def work(wire):
            flat = given[0, wire.rank].copy()
            compressor = made[wire.rank]
            compressor.load_state(compression.make("int8", SHAPES).state())
            compressor.average(flat, wire)
            return flat

        fresh, _ = averaged("int8", SHAPES, given[:, :size])
        assert same_bits(np.array(Ranks(size).run(work)), fresh[:, 0])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", SCHEMES)
def test_extra_values_travel_as_they_are(name, model, size):
    """Also in a step that is not finite; they change nothing else, and are in the bytes."""
    given = gradients(MODELS[model], size, steps=3)
    given[1, -1, -1:] = np.nan
    extra = np.random.default_rng(0).normal(size=(3, size, 5)).astype(np.float32)
    ranks = Ranks(size)

    def work(wire):
        compressor = compression.make(name, MODELS[model], extra=5)
        flats = [np.concatenate([step[wire.rank], more[wire.rank]]) for step, more in zip(given, extra, strict=True)]
        for flat in flats:
            compressor.average(flat, wire)
            if flat is flats[0]:
                assert ranks.bytes_sent[wire.rank] == compressor.bytes_per_step(size)
        return np.array(flats), compressor

    plain, _ = averaged(name, MODELS[model], given)
    for flats, compressor in ranks.run(work):
        np.testing.assert_allclose(flats[:, -5:], extra.mean(1), rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(flats[:, :-5], plain[0])
        assert compressor.bytes_uncompressed(size) == compression.make("none", [(given.shape[-1] + 5,)]).bytes_per_step(
            size
        )


@settings(max_examples=150)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), max_size=5),
    name=st.sampled_from([*SCHEMES, "topk:1", "topk:0.5", "powersgd:1", "powersgd:9"]),
    size=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_shapes(shapes, name, size, seed):
    """Same bits, the bytes promised, nothing lost of what is remembered."""
    given = gradients(shapes, size, steps=3, seed=seed)
    ranks = Ranks(size)
    results, compressors = averaged(name, shapes, given, ranks=ranks)
    assert all(same_bits(result, results[0]) for result in results)
    assert ranks.bytes_sent == [3 * compressors[0].bytes_per_step(size) if values_in(shapes) else 0] * size
    if "memory" in compressors[0].state():
        remembered = np.mean([c.state()["memory"].astype(float) for c in compressors], axis=0)
        total = given.astype(float).mean(1).sum(0)
        np.testing.assert_allclose(
            results[0].astype(float).sum(0) + remembered, total, rtol=1e-5, atol=1e-5 * np.abs(given).max(initial=0)
        )


# --- names and wrong use


WRONG_NAMES = "fp32 int8:3 none: topk: topk:0 topk:1.5 topk:nan topk:a topk:0.1:2 PowerSGD powersgd:0 powersgd:-1"
WRONG_ARGUMENTS = "powersgd:1.5 powersgd: powersgd:²"


@pytest.mark.parametrize("name", ["", *WRONG_NAMES.split(), *WRONG_ARGUMENTS.split()])
def test_a_wrong_name_is_one_line(name):
    with pytest.raises(UsageError) as raised:
        compression.make(name, SHAPES)
    text = str(raised.value)
    assert name in text and "give" in text and "\n" not in text


def test_more_gradients_than_a_message_holds_are_refused_at_once():
    with pytest.raises(UsageError, match="2147483648 gradients: compression takes at most 2147483647"):
        compression.make("topk", [(2**31,)])


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"memory": np.zeros(5, np.float32)},
        {"memory": np.zeros(values_in(SHAPES))},
        {"memory": np.zeros(values_in(SHAPES), np.float32), "q": np.zeros(3, np.float32)},
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(state):
    _, (compressor, _) = averaged("topk", SHAPES, gradients(SHAPES, 2))
    before = compressor.state()
    with pytest.raises(
        UsageError, match=r"the saved state of the compression has .* where this one has memory float32"
    ):
        compressor.load_state(state)
    assert same_bits(compressor.state()["memory"], before["memory"])


@pytest.mark.parametrize("flat", [np.zeros(4), np.zeros(5, np.float32), np.zeros(8, np.float32)[::2], [0.0] * 4])
def test_an_array_of_another_kind_is_refused(flat):
    compressor = compression.make("fp16", [(4,)])
    with pytest.raises(ValueError, match="contiguous, writable float32 array of 4 values"):
        compressor.average(flat, None)


# --- 16 bits

SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 65504, 65519.99, 65520, -65520, 1e30, 3.4028235e38, 1e-45]
SPECIAL += [2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 2.0**-14 - 2.0**-25]
SPECIAL += [1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8]


def patterns():
    """float32 of all exponents: random bits, and what is special or half-way between two 16-bit numbers."""
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 300_000, dtype=np.uint32)
    halfway = (generator.integers(0, 2**16, 100_000, dtype=np.uint32) << 16) | 0x8000
    fp16_halfway = (generator.integers(0, 2**19, 200_000, dtype=np.uint32) << 13) | 0x1000
    nan = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FFF8000], np.uint32)
    with np.errstate(over="ignore"):
        special = np.array(SPECIAL).astype(np.float32)
    return np.concatenate([special, np.concatenate([bits, halfway, fp16_halfway, nan]).view(np.float32)])


def through(codec, values):
    codes, decoded = np.empty(len(values), np.uint16), np.empty(len(values), np.float32)
    with np.errstate(all="ignore"):
        for block in compression.common.blocks(len(values)):
            codec.encode(values[block], codes[block])
            codec.decode(codes[block], decoded[block])
    return codes, decoded


def assert_same_numbers(found, expected):
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.array_equal(np.signbit(found), np.signbit(expected))
    assert np.array_equal(found[~np.isnan(found)], expected[~np.isnan(expected)])


def test_fp16_is_numpys():
    values = patterns()
    _, decoded = through(sixteen.Fp16(), values)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_numbers(decoded, values.astype(np.float16).astype(np.float32))


def test_bf16_is_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes (a part of TensorFlow's and JAX's installations)")
    values = patterns()
    _, decoded = through(sixteen.Bf16(), values)
    with np.errstate(all="ignore"):
        assert_same_numbers(decoded, values.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_bf16_rounds_to_nearest_even():
    """By hand, without another library: the nearest of the two neighbours, the even one where both are as near."""
    for value in (1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -3.1415927, 1e-40, 2.0**-133 * 1.5):
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        low, rest = bits >> 16, bits & 0xFFFF
        code = low + (rest > 0x8000 or (rest == 0x8000 and low % 2 == 1))
        assert through(sixteen.Bf16(), np.array([value], np.float32))[0][0] == code


@pytest.mark.parametrize(("name", "digits", "least"), [("fp16", 11, 2.0**-25), ("bf16", 8, 0.0)])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_16_bits_lose_half_a_digit_twice(name, digits, least, size):
    given = gradients(SHAPES, size, scale=1.0)
    results, _ = averaged(name, SHAPES, given)
    half = 2.0**-digits
    exact = given[0].astype(float)
    first = np.maximum(half * np.abs(exact), least).sum(0) / size
    bound = first + np.maximum(half * (np.abs(exact.mean(0)) + first), least) + 1e-6 * np.abs(exact).sum(0)
    assert (np.abs(results[0, 0] - exact.mean(0)) <= bound).all()


def test_a_mean_beyond_fp16_is_infinite_and_not_a_wrong_number():
    given = np.full((1, 2, 4), 1e5, np.float32)
    results, _ = averaged("fp16", [(4,)], given)
    assert np.isinf(results).all()
    results, _ = averaged("bf16", [(4,)], given)
    np.testing.assert_allclose(results, 1e5, rtol=2.0**-7)


# --- int8


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_int8_loses_half_a_step_twice(size):
    """Against the largest value of each tensor, which is at least that of the piece that one rank sums."""
    given = gradients(SHAPES, size)
    results, _ = averaged("int8", SHAPES, given)
    start = 0
    for shape in SHAPES:
        place = slice(start, start + int(np.prod(shape)))
        start = place.stop
        exact = given[0][:, place].astype(float)
        if exact.size:
            half_steps = np.abs(exact).max(1).mean() / 254
            bound = half_steps + (np.abs(exact.mean(0)).max() + half_steps) / 254
            error = np.abs(results[0, 0, place] - exact.mean(0)).max()
            assert error <= 1.0001 * bound
            assert error > 0 or exact.shape[1] == 1  # it is no exact mean


def test_int8_has_steps_of_each_tensors_own():
    """Beside a tensor of large values one of small values keeps its digits, also within one part and across two."""
    shapes = [(50,), (60,), (70,)]
    given = gradients(shapes, 3)
    given[..., :50] *= 1e6
    given[..., 110:] *= 1e-6
    results, _ = averaged("int8", shapes, given)
    mean = given[0].mean(0)
    for place in (slice(0, 50), slice(50, 110), slice(110, 180)):
        assert np.abs(results[0, 0, place] - mean[place]).max() < 0.02 * np.abs(given[0, :, place]).max()


def test_int8_tells_the_whole_numbers_of_a_step_exactly():
    whole = np.array([-127, -3, 0, 1, 64, 127], np.float32) * np.float32(2**-10)
    results, _ = averaged("int8", [(6,)], np.tile(whole, (1, 1, 1)))
    np.testing.assert_allclose(results[0, 0], whole, rtol=1e-6)


def test_int8_reaches_a_value_that_is_always_below_half_a_step():
    given = np.tile(np.array([1.0, 1e-3], np.float32), (2000, 2, 1))
    results, _ = averaged("int8", [(2,)], given)
    np.testing.assert_allclose(results[0].mean(0), [1.0, 1e-3], rtol=0.01)


def test_a_step_so_small_that_its_inverse_overflows():
    for largest in (1e-45, 1e-38, 5e-37, 2e-36):
        given = np.array([[[largest, -largest / 2, 0]]], np.float32)
        results, (compressor,) = averaged("int8", [(3,)], given)
        assert np.isfinite(results).all() and np.isfinite(compressor.state()["memory"]).all()
        assert np.abs(results[0, 0] - given[0, 0]).max() <= quantised._TINY


# --- top-k


def slow_largest(values, k):
    return sorted(sorted(range(len(values)), key=lambda i: (-abs(values[i]), i))[:k])


@settings(max_examples=300)
@given(st.data(), st.integers(1, 60))
def test_the_largest_are_a_slow_sorts(data, n):
    """With many equal values and zeros, and a threshold from a sample as well as without."""
    values = data.draw(st.lists(st.integers(-4, 4), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    assert topk.largest(np.array(values, np.float32), k).tolist() == slow_largest(values, k)


@pytest.mark.parametrize("kind", ["normal", "equal", "zeros", "few", "column", "sorted"])
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.97])
def test_the_largest_of_many_are_a_slow_sorts(kind, share):
    """The sample, every 10th value, tells nothing, or wrong things, of some of these."""
    n = 200_000
    values = np.random.default_rng(1).normal(size=n).astype(np.float32)
    if kind == "equal":
        values[:] = 0.5
    elif kind == "zeros":
        values[:] = 0
    elif kind == "few":
        values[np.arange(n) % 1000 != 3] = 0
    elif kind == "column":
        values[::10] *= 100
    elif kind == "sorted":
        values.sort()
    k = max(1, int(share * n))
    order = np.lexsort((np.arange(n), -np.abs(values)))
    assert np.array_equal(topk.largest(values, k), np.sort(order[:k]))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_topk_is_a_slow_loops(size):
    given = gradients(SHAPES, size, steps=5)
    results, compressors = averaged("topk:0.1", SHAPES, given)
    n = values_in(SHAPES)
    memory = np.zeros((size, n), np.float32)
    for step, result in zip(given, results[0], strict=True):
        expected = np.zeros(n, np.float32)
        for rank in range(size):
            total = step[rank] + memory[rank]
            for i in slow_largest(total.tolist(), round(0.1 * n)):
                expected[i] += total[i] / np.float32(size)
                total[i] = 0
            memory[rank] = total
        assert same_bits(result, expected)
    assert same_bits(np.array([c.state()["memory"] for c in compressors]), memory)


def test_topk_of_all_is_the_mean():
    given = gradients(SHAPES, 3)
    results, _ = averaged("topk:1", SHAPES, given)
    np.testing.assert_allclose(results[0, 0], given[0].astype(float).mean(0), rtol=1e-5, atol=1e-8)


# --- PowerSGD


def low_rank(generator, rows, columns, rank):
    return generator.normal(size=(rows, rank)) @ generator.normal(size=(rank, columns))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_powersgd_is_exact_for_matrices_up_to_its_rank(rank, size):
    """The rank is the mean's: ranks of one column space together have no more."""
    generator = np.random.default_rng(rank)
    left = generator.normal(size=(40, rank))
    matrices = np.array([left @ generator.normal(size=(rank, 30)) for _ in range(size)])
    vector = generator.normal(size=(size, 9))
    flat = np.concatenate([matrices.reshape(size, -1), vector], axis=1).astype(np.float32)
    results, compressors = averaged("powersgd:3", [(40, 30), (9,)], flat[None])
    np.testing.assert_allclose(results[0, 0], flat.mean(0), atol=1e-5)
    if size == 1:
        assert np.abs(compressors[0].state()["memory"]).max() < 1e-5


@pytest.mark.parametrize("size", [1, 3])
def test_powersgd_nears_the_best_approximation(size):
    """The same gradient each time, the memory cleared: Q converges, and the error to that of the best of that rank."""
    generator = np.random.default_rng(0)
    matrices = generator.normal(size=(size, 60, 45)).astype(np.float32)
    mean = matrices.astype(float).mean(0)
    singular = np.linalg.svd(mean, compute_uv=False)
    best = np.sqrt((singular[4:] ** 2).sum())

    def work(wire):
        compressor = compression.make("powersgd:4", [(60, 45)])
        errors = []
        for _ in range(60):
            flat = matrices[wire.rank].ravel().copy()
            compressor.average(flat, wire)
            errors.append(np.linalg.norm(flat.reshape(60, 45) - mean))
            compressor.load_state({**compressor.state(), "memory": np.zeros(flat.size, np.float32)})
        return errors

    errors = Ranks(size).run(work)[0]
    assert min(errors) >= 0.9999 * best
    assert errors[-1] <= 1.005 * best < 1.02 * best < errors[0]


def test_powersgd_takes_kernels_of_both_layouts_as_the_same_matrix():
    torchs, tensorflows = (compression.make("powersgd:4", [shape]) for shape in ((64, 32, 3, 3), (3, 3, 32, 64)))
    assert torchs.bytes_per_step(2) == tensorflows.bytes_per_step(2) == 2 * 4 * (4 * 64 // 2 + 4 * 288 // 2)


def test_powersgd_sends_as_it_is_what_it_would_not_make_smaller():
    shapes = [(8, 8), (10,), (4, 300), (1, 1), (9, 9)]  # of rank 4, only 9 × 9 has fewer values as two factors
    given = gradients(shapes, 2)
    results, compressors = averaged("powersgd:4", shapes, given)
    np.testing.assert_allclose(results[0, 0, :-81], given[0, :, :-81].astype(float).mean(0), rtol=1e-5, atol=1e-8)
    assert len(compressors[0].state()["q"]) == 4 * 9
    assert not compressors[0].state()["memory"][:-81].any() and compressors[0].state()["memory"][-81:].any()


def test_powersgd_recovers_from_a_gradient_that_left_no_direction():
    """Rows of an embedding that were never used: Q must not stay 0."""
    generator = np.random.default_rng(0)
    first = np.zeros((30, 20))
    first[0] = generator.normal(size=20)
    later = low_rank(generator, 30, 20, 2)
    given = np.array([first, np.zeros((30, 20)), later, later], np.float32).reshape(4, 1, -1)
    results, _ = averaged("powersgd:2", [(30, 20)], given)
    np.testing.assert_allclose(results[0].sum(0), given.sum((0, 1)), atol=1e-4)


@pytest.mark.parametrize("name", compression.NAMES)
def test_a_scheme_takes_one_thread(name):
    """Other threads would take the cores of a host's other workers, and BLAS' own wait busily between their tasks."""

    def work(wire):
        compressor, flat = compression.make(name, [(1024, 1024)]), np.ones(1 << 20, np.float32)
        compressor.average(flat, wire)
        every, mine = time.process_time(), time.thread_time()
        for _ in range(10):
            compressor.average(flat, wire)
        return time.process_time() - every, time.thread_time() - mine

    ((every, mine),) = Ranks(1).run(work)
    assert every < 1.3 * mine
