"""Arrays in .npy files come back as they are, mapped; what is none of them is one line."""

import io
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from toolkit import datasets, npy
from toolkit.errors import UsageError


def npy_bytes(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), **options)
    return file.getvalue()


def refusal(call, *args):
    with pytest.raises(UsageError) as caught:
        call(*args)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("npy") / "x.npy"


@settings(max_examples=200)
@given(
    array=st.sampled_from(["?", "u1", "i2", "i8", "f2", "f4", "f8"]).flatmap(
        lambda name: npst.arrays(name, npst.array_shapes(min_dims=1, max_dims=5, max_side=6))
    ),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
)
def test_every_array_comes_back(place, array, version):
    place.write_bytes(npy_bytes(array, version=version))
    found = npy.mapped(place)
    assert found.dtype == array.dtype and found.shape == array.shape
    assert found.tobytes() == array.tobytes()
    assert isinstance(found, np.memmap) and not found.flags.writeable and found.flags.c_contiguous


GOOD = npy_bytes(np.arange(12, dtype=np.float32).reshape(3, 4))
REFUSED = {
    "empty": (b"", "is no whole .npy file of numbers"),
    "text": (b"1,2,3\n" * 50, "is no whole .npy file of numbers"),
    "a zip, as np.savez writes": (b"PK\x03\x04" + bytes(200), "is no whole .npy file of numbers"),
    "header cut": (GOOD[:60], "is no whole .npy file of numbers"),
    "data cut": (GOOD[:-1], "is no whole .npy file of numbers"),
    "two arrays": (GOOD + GOOD, "has 352 bytes but its header announces 3 x 4 values of float32, 176 bytes"),
    "objects": (npy_bytes([{}, None], allow_pickle=True), "Python objects"),
    "no samples": (npy_bytes(np.zeros((0, 28, 28))), "holds no samples, its shape is (0, 28, 28)"),
    "a number": (npy_bytes(5.0), "holds no samples, its shape is ()"),
    "Fortran order": (npy_bytes(np.asfortranarray(np.ones((3, 4)))), "is in Fortran order"),
    "other byte order": (npy_bytes(np.ones(4, ">f4")), "holds values of >f4"),
    "text values": (npy_bytes(["a", "b"]), "holds values of <U1"),
    "fields": (npy_bytes(np.zeros(3, "f4,i4")), "holds values of"),
    "complex": (npy_bytes(np.ones(3, complex)), "holds values of complex128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path):
    data, text = REFUSED[case]
    (tmp_path / "x.npy").write_bytes(data)
    message = refusal(npy.mapped, tmp_path / "x.npy")
    assert repr(str(tmp_path / "x.npy")) in message and text in message


def test_what_is_no_file(tmp_path):
    assert "can't be read (No such file or directory)" in refusal(npy.mapped, tmp_path / "x.npy")
    assert "is a directory or device" in refusal(npy.mapped, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "is a directory or device" in refusal(npy.mapped, tmp_path / "pipe")
    (tmp_path / "two\nlines").write_bytes(b"")
    assert "two\\nlines" in refusal(npy.mapped, tmp_path / "two\nlines")


def test_shapes_beyond_all_memory(tmp_path):
    for shape in ((1 << 40, 1 << 40), (1 << 62, 4), (-3, 4), (1 << 70,), (0, 1 << 62, 1 << 62)):
        file = io.BytesIO()
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        (tmp_path / "x.npy").write_bytes(file.getvalue() + bytes(48))
        refusal(npy.mapped, tmp_path / "x.npy")


@settings(max_examples=500)
@given(data=st.data())
def test_any_damage_is_one_line_or_an_array(place, data):
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
    place.write_bytes(bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))]))
    try:
        assert npy.mapped(place).nbytes == 48
    except UsageError as error:
        assert len(str(error).splitlines()) == 1


def write_digits(directory, **changes):
    arrays = {
        "train_x": np.random.default_rng(0).random((6, 28, 28), np.float32),
        "train_y": np.arange(6),
        "test_x": np.zeros((2, 28, 28), np.float32),
        "test_y": np.array([0, 9]),
        **changes,
    }
    for name, array in arrays.items():
        if array is not None:
            np.save(directory / f"{name}.npy", array)
    return arrays


def test_digits_in_npy_files(tmp_path):
    arrays = write_digits(tmp_path)
    train, test = datasets.digits(tmp_path)
    for part, split in (("train", train), ("test", test)):
        np.testing.assert_array_equal(split.x, arrays[f"{part}_x"])
        np.testing.assert_array_equal(split.y, arrays[f"{part}_y"])
    assert isinstance(train.x, np.memmap) and test.x.flags.writeable
    fold = train.take(np.array([4, 1]))
    assert type(fold.x) is np.ndarray and fold.y.tolist() == [4, 1]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"train_y": np.arange(5)},
            "holds 6 rows in train_x.npy and 5 in train_y.npy: write both from the same samples",
        ),
        ({"train_x": None}, "train_x.npy' can't be read (No such file or directory)"),
        ({"test_y": None}, "test_y.npy' can't be read (No such file or directory)"),
        ({"train_x": np.zeros((6, 28, 28))}, "holds 6 x 28 x 28 values of float64 but n x 28 x 28 values of float32"),
        ({"train_x": np.zeros((6, 784), np.float32)}, "holds 6 x 784 values of float32 but n x 28 x 28"),
        ({"test_y": np.array([0, 9], np.uint8)}, "test_y.npy' holds 2 values of uint8 but n values of int64"),
        ({"train_y": np.arange(5, 11)}, "train_y.npy' holds labels of 5 to 10 but digits are 0 to 9"),
    ],
)
def test_digits_that_are_none(changes, text, tmp_path):
    write_digits(tmp_path, **changes)
    assert text in refusal(datasets.digits, tmp_path)


@given(data=st.data())
def test_shifted_images_are_cut_from_padded_ones(data):
    array = npst.arrays(np.float32, npst.array_shapes(min_dims=3, max_dims=3, max_side=6))
    images, most = data.draw(array), data.draw(st.integers(1, 8))
    height, width = images.shape[1:]
    moves = [np.random.default_rng(i).integers(0, 2 * most, 2, endpoint=True) for i in range(len(images))]
    padded = [np.pad(image, most) for image in images]
    expected = [p[y : y + height, x : x + width] for p, (y, x) in zip(padded, moves, strict=True)]
    found = datasets.shifted(images, (np.random.default_rng(i) for i in range(len(images))), most)
    assert found.dtype == images.dtype and found.tobytes() == np.stack(expected).tobytes()
