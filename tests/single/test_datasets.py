import gzip
import os
import struct
import sys
import tracemalloc
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from toolkit import datasets
from toolkit.datasets import read_idx
from toolkit.errors import UsageError

TYPES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
MIB = 1 << 20


def header(code: int, *shape: int) -> bytes:
    return struct.pack(f">4B{len(shape)}I", 0, 0, code, len(shape), *shape)


def idx_bytes(array: np.ndarray) -> bytes:
    return header(TYPES[array.dtype.name], *array.shape) + array.astype(array.dtype.newbyteorder(">")).tobytes()


def refusal(call, *args) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


@contextmanager
def peak_below(limit_bytes: int):
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit_bytes, f"{peak} bytes at the peak, {limit_bytes} allowed"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("idx") / "file"


arrays = st.sampled_from(sorted(TYPES)).flatmap(
    lambda name: npst.arrays(name, npst.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=6))
)


@settings(max_examples=500, deadline=None)
@given(array=arrays, gzipped=st.booleans())
def test_every_array_comes_back(scratch, array, gzipped):
    data = idx_bytes(array)
    scratch.write_bytes(gzip.compress(data, 1) if gzipped else data)
    result = read_idx(scratch)
    assert result.dtype == array.dtype and result.dtype.isnative
    assert result.shape == array.shape
    assert result.tobytes() == array.tobytes()  # NaN included
    assert result.flags.c_contiguous and result.flags.writeable


def test_all_64_dimensions_are_read_and_gzip_in_two_members(tmp_path):
    array = np.arange(6, dtype=np.int32).reshape(2, 3, *[1] * 62)
    data = idx_bytes(array)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(data[:17]) + gzip.compress(data[17:]))
    np.testing.assert_array_equal(read_idx(path), array)


def test_a_large_file_is_read_in_little_more_than_its_own_size(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20_000, 28, 28), dtype=np.uint8)
    for name, data in (("plain", idx_bytes(array)), ("gzipped", gzip.compress(idx_bytes(array), 1))):
        path = tmp_path / name
        path.write_bytes(data)
        del data
        with peak_below(int(1.3 * array.nbytes) + 3 * MIB):
            result = read_idx(path)
        np.testing.assert_array_equal(result, array)


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
DAMAGES = {
    "empty": (b"", "begins with the bytes ''"),
    "three bytes": (GOOD[:3], "begins with the bytes '00 00 08'"),
    "not zero": (b"\x01" + GOOD[1:], "begins with the bytes '01 00 08 03'"),
    "little-endian": (GOOD[3::-1] + GOOD[4:], "begins with the bytes '03 08 00 00'"),
    "a picture": (b"\x89PNG\r\n\x1a\n", "begins with the bytes '89 50 4e 47'"),
    "unknown type": (b"\0\0\x0a" + GOOD[3:], "a type of 08, 09, 0b, 0c, 0d, 0e"),
    "no dimensions": (header(0x08) + b"\x07", "announces 0 dimensions but 1 to 64 can be read"),
    "65 dimensions": (header(0x08, *[1] * 65) + b"\x07", "announces 65 dimensions"),
    "header cut": (GOOD[:15], "ends within its header, which has 16 bytes for 3 dimensions"),
    "data missing": (
        GOOD[:16],
        "holds 0 bytes of data but its header announces 2 x 3 x 4 values of uint8, 24 bytes",
    ),
    "data cut": (GOOD[:-1], "holds 23 bytes of data but its header announces 2 x 3 x 4"),
    "data left": (GOOD + b"\0", "25 bytes of data but its header announces 2 x 3 x 4"),
    "other type": (b"\0\0\x0b" + GOOD[3:], "announces 2 x 3 x 4 values of int16, 48 bytes"),
    "wraps to the size in 64 bits": (
        header(0x08, 1 << 31, 1 << 31, 4),
        "announces 2147483648 x 2147483648 x 4 values of uint8, more than any memory holds",
    ),
    "empty, yet too large a shape": (header(0x08, 0, 1 << 31, 1 << 31, 4), "more than any memory holds"),
    "claims gigabytes": (header(0x0E, 1 << 31, 1 << 20) + bytes(100), "holds 100 bytes of data"),
    "claims just fit": (header(0x08, (1 << 32) - 1, (1 << 31) - 1) + bytes(100), "holds 100 bytes of data"),
}


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_one_line_and_takes_no_memory(tmp_path, damage, gzipped):
    data, expected = DAMAGES[damage]
    path = tmp_path / "images\n of\tmine"
    path.write_bytes(gzip.compress(data) if gzipped else data)
    with peak_below(4 * MIB):
        message = refusal(read_idx, path)
    assert expected in message
    assert repr(str(path)) in message


@pytest.mark.parametrize("announced", [16 * MIB - 1, 16 * MIB + 1])
def test_a_plain_files_length_is_compared_before_it_is_read(tmp_path, announced):
    path = tmp_path / "file"
    path.write_bytes(header(0x08, announced) + bytes(16 * MIB))
    with peak_below(4 * MIB):
        assert f"holds {16 * MIB} bytes of data" in refusal(read_idx, path)


GZIPPED = gzip.compress(GOOD)
GZIP_DAMAGES = {
    "magic only": GZIPPED[:2],
    "header cut": GZIPPED[:7],
    "stream cut": GZIPPED[: len(GZIPPED) // 2],
    "checksum cut": GZIPPED[:-5],
    "checksum wrong": GZIPPED[:-8] + b"\0\0\0\0" + GZIPPED[-4:],
    "length wrong": GZIPPED[:-4] + b"\0\0\0\0",
    "stream damaged": GZIPPED[:10] + b"\xff\xff" + GZIPPED[12:],
    "method unknown": GZIPPED[:2] + b"\x07" + GZIPPED[3:],
    "something after it": GZIPPED + b"more",
}


@pytest.mark.parametrize("damage", GZIP_DAMAGES)
def test_gzip_damage_is_named_in_one_line(tmp_path, damage):
    path = tmp_path / "file.gz"
    path.write_bytes(GZIP_DAMAGES[damage])
    assert f"{str(path)!r} is a damaged gzip file (" in refusal(read_idx, path)


@pytest.mark.parametrize("announced", [0, 100, 3 * MIB])
def test_a_gzip_bomb_is_left_as_soon_as_it_is_too_long(tmp_path, announced):
    path = tmp_path / "bomb.gz"
    deflate = zlib.compressobj(9, zlib.DEFLATED, 31)
    pieces = [deflate.compress(header(0x08, announced))]
    pieces += [deflate.compress(bytes(MIB)) for _ in range(512)]
    path.write_bytes(b"".join(pieces) + deflate.flush())
    with peak_below(8 * MIB):
        message = refusal(read_idx, path)
    assert f"holds at least {announced + 1} bytes of data" in message


def test_gzip_within_gzip_is_refused(tmp_path):
    path = tmp_path / "file.gz.gz"
    path.write_bytes(gzip.compress(GZIPPED))
    assert "begins with the bytes '1f 8b" in refusal(read_idx, path)


def test_what_is_no_readable_file_is_refused(tmp_path):
    assert "(No such file or directory)" in refusal(read_idx, tmp_path / "absent")
    assert "is a directory or device" in refusal(read_idx, tmp_path)
    assert "is a directory or device" in refusal(read_idx, Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    assert "is a directory or device" in refusal(read_idx, tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "Too many levels of symbolic links" in refusal(read_idx, tmp_path / "loop")


@contextmanager
def without_root():
    """Give up root's right to read everything, where the tests run as root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_without_permission_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(GOOD)
    path.chmod(0)
    with without_root():
        assert "can't be read (Permission denied)" in refusal(read_idx, path)


@st.composite
def mutated_files(draw) -> bytes:
    """A good file, plain or gzipped, with some of its bytes changed, cut out or put in."""
    data = idx_bytes(draw(arrays))
    stage = draw(st.sampled_from(["plain", "gzip, then damage", "damage, then gzip"]))
    if stage == "gzip, then damage":
        data = gzip.compress(data, 1, mtime=0)
    for _ in range(draw(st.integers(1, 4))):
        # The first bytes decide most, so half of the damage is there.
        at = draw(st.one_of(st.integers(0, 24), st.integers(0, len(data))))
        removed = draw(st.sampled_from([0, 1, 4, len(data)]))
        data = data[:at] + draw(st.binary(max_size=8)) + data[at + removed :]
    return gzip.compress(data, 1) if stage == "damage, then gzip" else data


random_files = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=100).map(lambda rest: b"\0\0" + rest),
    st.binary(max_size=100).map(lambda rest: b"\x1f\x8b\x08" + rest),
    st.builds(
        lambda code, shape, rest: header(code, *shape) + rest,
        st.sampled_from(sorted(TYPES.values())),
        st.lists(st.integers(0, (1 << 32) - 1) | st.integers(0, 3), max_size=6),
        st.binary(max_size=50),
    ),
)


@settings(max_examples=4000, deadline=None)
@given(data=mutated_files() | random_files)
def test_no_file_does_more_than_be_refused(scratch, data):
    scratch.write_bytes(data)
    with peak_below(4 * MIB):
        try:
            result = read_idx(scratch)
        except UsageError as error:
            assert len(str(error).splitlines()) == 1
            return
    content = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    assert idx_bytes(result) == content


def test_digits_are_scikit_learns_enlarged():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = datasets.digits()
    assert (len(train), len(test)) == (1437, 360)
    assert train.x.dtype == test.x.dtype == np.float32
    assert train.y.dtype == test.y.dtype == np.int64
    expected = np.zeros((1797, 28, 28), np.float32)
    for row in range(24):
        for column in range(24):
            expected[:, row + 2, column + 2] = source.images[:, row // 3, column // 3] / 16
    found = [(x.tobytes(), y) for split in (train, test) for x, y in zip(split.x, split.y, strict=True)]
    assert sorted(found) == sorted((x.tobytes(), y) for x, y in zip(expected, source.target, strict=True))
    # The order that every process, machine and numpy version must have.
    np.testing.assert_array_equal(train.x[:6], expected[[1081, 1707, 927, 713, 262, 182]])
    assert np.bincount(test.y).min() > 20


@pytest.fixture
def mnist(tmp_path) -> Path:
    """A small data set in files like MNIST's."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 7), ("t10k", 3)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(np.arange(count, dtype=np.uint8) + 3))
    return tmp_path


@pytest.mark.parametrize("joint", "-.")
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnists_files_are_read_under_each_name(mnist, joint, suffix):
    raw = {path.name: path.read_bytes() for path in mnist.iterdir()}
    for name, data in raw.items():
        (mnist / name).unlink()
        data = gzip.compress(data) if suffix else data
        (mnist / (name.replace("-idx", f"{joint}idx") + suffix)).write_bytes(data)
    for split, part in zip(datasets.digits(mnist), ("train", "t10k"), strict=True):
        pixels = np.frombuffer(raw[f"{part}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28)
        assert (split.x.dtype, split.y.dtype) == (np.float32, np.int64)
        np.testing.assert_array_equal(split.x, (pixels / 255).astype(np.float32))
        np.testing.assert_array_equal(split.y, np.arange(len(pixels)) + 3)
        assert len(split) == len(pixels)


IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
WRONG_FILES = {
    "too few labels": (LABELS, np.zeros(2, np.uint8), "holds 3 images but"),
    "label 10": (LABELS, np.array([0, 10, 9], np.uint8), "holds the label 10 but labels are 0 to 9"),
    "labels in two dimensions": (LABELS, np.zeros((3, 1), np.uint8), "holds 3 x 1 values of uint8 but n of"),
    "labels of 4 bytes": (LABELS, np.zeros(3, np.int32), "holds 3 values of int32"),
    "no labels": (LABELS, np.zeros(0, np.uint8), "n at least 1"),
    "narrow images": (
        IMAGES,
        np.zeros((3, 28, 27), np.uint8),
        "holds 3 x 28 x 27 values of uint8 but n x 28 x 28",
    ),
    "flat images": (IMAGES, np.zeros((3, 784), np.uint8), "holds 3 x 784 values"),
    "floating-point images": (IMAGES, np.zeros((3, 28, 28), np.float32), "values of float32"),
    "no images": (IMAGES, np.zeros((0, 28, 28), np.uint8), "holds 0 x 28 x 28 values"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_what_is_not_mnist_is_refused(mnist, case):
    name, array, expected = WRONG_FILES[case]
    (mnist / name).write_bytes(idx_bytes(array))
    message = refusal(datasets.digits, mnist)
    assert expected in message
    assert name in message


def test_a_directory_that_is_not_mnists_is_refused(mnist, tmp_path):
    absent = tmp_path / "absent"
    assert f"{str(absent)!r} can't be read as a directory (No such file" in refusal(datasets.digits, absent)
    assert "(Not a directory)" in refusal(datasets.digits, mnist / IMAGES)
    (mnist / LABELS).unlink()
    expected = "holds none of t10k-labels-idx1-ubyte, t10k-labels.idx1-ubyte, t10k-labels-idx1-ubyte.gz, "
    assert expected in refusal(datasets.digits, mnist)
    mnist.chmod(0)
    try:
        with without_root():
            assert "(Permission denied)" in refusal(datasets.digits, mnist)
    finally:
        mnist.chmod(0o700)


def test_diabetes_is_standardised():
    source = pytest.importorskip("sklearn.datasets").load_diabetes(scaled=False)
    split = datasets.diabetes()
    assert (split.x.shape, split.y.shape, len(split)) == ((442, 10), (442, 1), 442)
    for found, column in zip(np.hstack([split.x, split.y]).T, [*source.data.T, source.target], strict=True):
        assert found.dtype == np.float32
        assert abs(found.mean(dtype=np.float64)) < 1e-6
        assert abs(found.std(dtype=np.float64) - 1) < 1e-6
        assert np.corrcoef(found, column)[0, 1] > 1 - 1e-6


def test_least_squares_is_where_the_gradient_vanishes():
    generator = np.random.default_rng(0)
    x, noise = generator.normal(2, 3, (50, 4)), generator.normal(size=(50, 2))
    y = x @ generator.normal(size=(4, 2)) + [5, -7] + noise
    weights, bias = datasets.least_squares(x, y)
    assert (weights.shape, bias.shape, weights.dtype, bias.dtype) == ((2, 4), (2,), np.float64, np.float64)
    residual = x @ weights.T + bias - y
    np.testing.assert_allclose(x.T @ residual, 0, atol=1e-9)
    np.testing.assert_allclose(residual.sum(axis=0), 0, atol=1e-9)


def test_least_squares_computes_in_float64():
    generator = np.random.default_rng(0)
    # Offset by 1000: in float32 the weights would be wrong in the third digit.
    x = (generator.normal(size=(200, 3)) + 1000).astype(np.float32)
    y = (x.astype(np.float64) @ [[1.0], [2.0], [3.0]] - 6000 + 4).astype(np.float32)
    weights, _ = datasets.least_squares(x, y)
    normal = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    expected = np.linalg.solve(normal.T @ normal, normal.T @ y.astype(np.float64))
    np.testing.assert_allclose(weights, expected.T, rtol=1e-6)


@pytest.mark.parametrize("load", [datasets.digits, datasets.diabetes])
def test_without_scikit_learn_the_extra_is_named(monkeypatch, load):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install 'hvdkit[recipes]'" in refusal(load)


def generators(count):
    return [np.random.default_rng(i) for i in range(count)]


def test_shifted_images_are_the_rolled_ones_with_zeros_coming_in():
    images = np.arange(1, 4 * 36 + 1, dtype=np.float32).reshape(4, 6, 6)
    moved = datasets.shifted(images, generators(4), 2)
    assert moved.shape == images.shape and moved.dtype == images.dtype
    for image, found, generator in zip(images, moved, generators(4), strict=True):
        down, right = 2 - generator.integers(0, 4, 2, endpoint=True)
        expected = np.zeros((10, 10), np.float32)
        expected[2:8, 2:8] = image
        assert np.array_equal(found, np.roll(expected, (down, right), (0, 1))[2:8, 2:8])
    assert datasets.shifted(images, iter([]), 0) is images


def test_noise_is_each_rows_own():
    x = np.zeros((3, 5), np.float32)
    noisy = datasets.with_noise(x, generators(3), 0.5)
    expected = [0.5 * g.standard_normal(5, np.float32) for g in generators(3)]
    assert noisy.dtype == np.float32 and np.array_equal(noisy, np.array(expected, np.float32))
    assert datasets.with_noise(x, iter([]), 0.0) is x


def test_take():
    data = datasets.diabetes()
    some = data.take(np.array([5, 2]))
    assert len(some) == 2 and np.array_equal(some.x, data.x[[5, 2]]) and np.array_equal(some.y, data.y[[5, 2]])
    assert len(data.take([])) == 0
