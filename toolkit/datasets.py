"""The recipes' data: real, small, the same in every process, and without a download; or files of the user's."""

from __future__ import annotations

import gzip
import math
import os
import stat
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from toolkit import npy
from toolkit.errors import UsageError

# The third byte of an IDX file, and the values it announces (big-endian).
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MOST_DIMENSIONS = 64  # numpy's limit
_GZIP_MAGIC = b"\x1f\x8b"
_PIECE_BYTES = 1 << 20

_SPLIT_SEED = 0
_TRAIN_SHARE = 0.8


@dataclass(frozen=True, eq=False)
class Split:
    """Samples to train on or to test with; `len()` is their number.

    `Split(*npy.pair(directory, "train"))` is of `train_x.npy` and `train_y.npy`, which need not fit in memory.

    Attributes:
        x: inputs, first axis the sample.
        y: targets, first axis the sample.
    """

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: np.ndarray) -> Split:
        """The samples of these indices, in this order; in memory, also those of mapped files."""
        return Split(self.x[indices], self.y[indices])


def shifted(images: np.ndarray, generators: Iterable[np.random.Generator], most: int) -> np.ndarray:
    """Augmented images: each moved by up to `most` pixels in both directions, zeros coming in.

    Args:
        images: shape (n, height, width).
        generators: a random stream for each image; not touched where `most` is 0.
        most: pixels, at least 0.
    """
    if most == 0:
        return images
    number, height, width = images.shape
    padded = np.zeros((number, height + 2 * most, width + 2 * most), images.dtype)
    padded[:, most:-most, most:-most] = images
    moves = [g.integers(0, 2 * most, 2, endpoint=True) for _, g in zip(images, generators, strict=True)]
    y, x = np.transpose(moves)
    return sliding_window_view(padded, (height, width), (1, 2))[np.arange(number), y, x]


def with_noise(x: np.ndarray, generators: Iterable[np.random.Generator], deviation: float) -> np.ndarray:
    """Augmented features: normal noise of this standard deviation added.

    Args:
        x: shape (n, features).
        generators: a random stream for each row; not touched where `deviation` is 0.
        deviation: in units of x, at least 0.
    """
    if deviation == 0:
        return x
    noise = np.stack([generator.standard_normal(x.shape[1], x.dtype) for generator in generators])
    return x + x.dtype.type(deviation) * noise


def digits(data_dir: Path | None = None) -> tuple[Split, Split]:
    """Handwritten digits to train on and to test with.

    Without `data_dir` these are scikit-learn's 1,797 digits of 8x8 pixels, each pixel repeated 3 times
    in both directions and a border of 2 added. 1,437 of them are for training and 360 for testing, in
    the order of one permutation that is the same in every process and with every numpy version. With
    `data_dir` they are MNIST's training and test set, in the order of its files, or those of .npy files.

    Args:
        data_dir: directory with MNIST's four IDX files, plain or gzipped: `train-images-idx3-ubyte`,
            `train-labels-idx1-ubyte`, `t10k-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, each also as
            `train-images.idx3-ubyte` and so on. Or with `train_x.npy`, `train_y.npy`, `test_x.npy` and `test_y.npy`
            of the types and shapes below; the training samples are mapped, so that they need not fit in memory.

    Returns:
        (train, test); x is float32 of shape (n, 28, 28) with values 0 … 1, y is int64 of shape (n,) with
        values 0 … 9. A framework's axis for the single channel is still to be added.

    Raises:
        UsageError: the directory or a file is missing, unreadable, damaged or not what MNIST's file is;
            scikit-learn is needed and missing.
    """
    if data_dir is not None and npy.is_in(data_dir):
        training, test = (_digits_in_npy(data_dir, part) for part in ("train", "test"))
        # In memory, as it is evaluated in one piece; and torch takes no read-only array without a warning.
        return training, Split(np.array(test.x), np.array(test.y))
    if data_dir is not None:
        return _mnist(data_dir, "train"), _mnist(data_dir, "t10k")
    data = _sklearn_datasets().load_digits()
    images = data.images.repeat(3, axis=1).repeat(3, axis=2)
    x = (np.pad(images, ((0, 0), (2, 2), (2, 2))) / 16).astype(np.float32)
    y = data.target.astype(np.int64)
    # RandomState, because numpy promises never to change its stream; default_rng's may change.
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(y))
    whole = Split(x, y)
    first, rest = np.split(order, [int(_TRAIN_SHARE * len(y))])
    return whole.take(first), whole.take(rest)


def diabetes() -> Split:
    """Scikit-learn's 442 diabetes patients: 10 features, and how far the disease went in a year.

    All samples are for training, because what is learned is compared with `least_squares` of them.

    Returns:
        x is float32 of shape (442, 10), y is float32 of shape (442, 1); each column has mean 0 and
        standard deviation 1 (divisor n).

    Raises:
        UsageError: scikit-learn is missing.
    """
    data = _sklearn_datasets().load_diabetes(scaled=False)
    return Split(_standardised(data.data), _standardised(data.target[:, None]))


def least_squares(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias with the smallest sum of squared errors, in closed form (numpy.linalg.lstsq).

    Args:
        x: inputs, shape (n, features).
        y: targets, shape (n, outputs).

    Returns:
        (weights, bias), float64, of shapes (outputs, features) and (outputs,), as `initial_weights.linear`
        lays them out: `y ≈ x @ weights.T + bias`.
    """
    columns = np.column_stack([np.asarray(x, np.float64), np.ones(len(x))])
    solution = np.linalg.lstsq(columns, np.asarray(y, np.float64), rcond=None)[0]
    return solution[:-1].T, solution[-1]


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file, plain or gzipped (told by the content, not by the name).

    The format is MNIST's own, as https://www.fon.hum.uva.nl/praat/manual/IDX_file_format.html quotes it.
    What the header announces takes no memory before the file is seen to hold it.

    Args:
        path: the file.

    Returns:
        A writable C-contiguous array in native byte order: uint8, int8, int16, int32, float32 or float64.

    Raises:
        UsageError: the file is missing, unreadable, not IDX, or not exactly as long as its header says.
    """
    name = _quoted(path)
    try:
        # Before open(), which waits for a writer if this is a named pipe.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{name} is a directory or device, not a file: give the path of an IDX file")
        with open(path, "rb") as file:
            gzipped = file.read(2) == _GZIP_MAGIC
            file.seek(0)
            if not gzipped:
                return _read_array(file, os.fstat(file.fileno()).st_size, name)
            with gzip.GzipFile(fileobj=file) as inflated:
                return _read_array(inflated, None, name)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UsageError(f"{name} is a damaged gzip file ({error}): download it again") from error
    except OSError as error:
        raise UsageError(f"{name} can't be read ({error.strerror}): give a readable IDX file") from error


def _read_array(file: BinaryIO | gzip.GzipFile, size: int | None, name: str) -> np.ndarray:
    """Read header and values; `size` is the file's length in bytes where it is known beforehand."""
    dtype, shape = _read_header(file, name)
    announced = dtype.itemsize * math.prod(shape)
    found = announced if size is None else size - file.tell()
    body = bytearray()
    if found == announced:
        # In pieces, because a read takes its whole memory first; one byte too many shows a longer file,
        # and its absence makes gzip check the checksum.
        while piece := file.read(min(_PIECE_BYTES, announced + 1 - len(body))):
            body += piece
        found = len(body)
    if found != announced:
        more = "at least " if size is None and found > announced else ""
        raise UsageError(
            f"{name} holds {more}{found} bytes of data but its header announces "
            f"{' x '.join(map(str, shape))} values of {dtype.name}, {announced} bytes: download it again"
        )
    return np.frombuffer(body, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def _read_header(file: BinaryIO | gzip.GzipFile, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Read type and shape, and leave the file at the first value."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES:
        raise UsageError(
            f"{name} begins with the bytes '{magic.hex(' ')}' but an IDX file with '00 00', a type of "
            f"{', '.join(f'{code:02x}' for code in _IDX_TYPES)}, and the number of dimensions: "
            "give a file in IDX format"
        )
    dimensions = magic[3]
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise UsageError(
            f"{name} announces {dimensions} dimensions but 1 to {_MOST_DIMENSIONS} can be read: download it again"
        )
    fields = file.read(4 * dimensions)
    if len(fields) < 4 * dimensions:
        raise UsageError(
            f"{name} ends within its header, which has {4 + 4 * dimensions} bytes "
            f"for {dimensions} dimensions: download it again"
        )
    dtype = np.dtype(_IDX_TYPES[magic[2]])
    shape = tuple(np.frombuffer(fields, ">u4").tolist())
    # Without the zeros, as numpy counts: an empty array must have a possible shape too.
    if dtype.itemsize * math.prod(length or 1 for length in shape) > sys.maxsize:
        raise UsageError(
            f"{name} announces {' x '.join(map(str, shape))} values of {dtype.name}, "
            "more than any memory holds: download it again"
        )
    return dtype, shape


def _digits_in_npy(data_dir: Path, part: str) -> Split:
    x, y = npy.pair(data_dir, part)
    for which, array, dtype, inner, what in (
        ("x", x, np.float32, (28, 28), "n x 28 x 28 values of float32"),
        ("y", y, np.int64, (), "n values of int64"),
    ):
        if array.dtype != dtype or array.shape != (len(array), *inner):
            raise UsageError(
                f"{_quoted(Path(data_dir, f'{part}_{which}.npy'))} holds {' x '.join(map(str, array.shape))} values of "
                f"{array.dtype} but {what} are needed: write the samples so with np.save"
            )
    if y.min() < 0 or y.max() > 9:
        raise UsageError(
            f"{_quoted(Path(data_dir, f'{part}_y.npy'))} holds labels of {y.min()} to {y.max()} but digits are 0 to 9: "
            "give labels of 0 to 9"
        )
    return Split(x, y)


def _mnist(data_dir: Path, part: str) -> Split:
    """Read and check one part of MNIST, `train` or `t10k`."""
    images_path = _mnist_file(data_dir, f"{part}-images", "idx3-ubyte")
    labels_path = _mnist_file(data_dir, f"{part}-labels", "idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    for path, array, inner, what in (
        (images_path, images, (28, 28), "n x 28 x 28"),
        (labels_path, labels, (), "n"),
    ):
        if array.dtype != np.uint8 or array.shape != (len(array), *inner) or len(array) == 0:
            raise UsageError(
                f"{_quoted(path)} holds {' x '.join(map(str, array.shape))} values of {array.dtype} "
                f"but {what} of uint8 are needed, n at least 1: put MNIST's own file there"
            )
    if len(images) != len(labels):
        raise UsageError(
            f"{_quoted(images_path)} holds {len(images)} images but {_quoted(labels_path)} holds "
            f"{len(labels)} labels: take both files from the same data set"
        )
    if labels.max() > 9:
        raise UsageError(
            f"{_quoted(labels_path)} holds the label {labels.max()} but labels are 0 to 9: put MNIST's own file there"
        )
    return Split(np.divide(images, 255, dtype=np.float32), labels.astype(np.int64))


def _mnist_file(data_dir: Path, stem: str, kind: str) -> Path:
    """The first spelling of a file's name that the directory has, plain before gzipped."""
    try:
        present = set(os.listdir(data_dir))
    except OSError as error:
        raise UsageError(
            f"{_quoted(data_dir)} can't be read as a directory ({error.strerror}): give one that "
            "holds MNIST's four IDX files or .npy files, or none to train on scikit-learn's digits"
        ) from error
    names = [f"{stem}{joint}{kind}{suffix}" for suffix in ("", ".gz") for joint in "-."]
    for name in names:
        if name in present:
            return Path(data_dir, name)
    raise UsageError(f"{_quoted(data_dir)} holds none of {', '.join(names)}: put MNIST's file there, or train_x.npy")


def _sklearn_datasets() -> Any:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise UsageError(
            f"scikit-learn, which ships the data, can't be imported ({' '.join(str(error).split())}): "
            "run pip install 'hvdkit[recipes]'"
        ) from error
    return sklearn.datasets


def _standardised(values: np.ndarray) -> np.ndarray:
    return ((values - values.mean(axis=0)) / values.std(axis=0)).astype(np.float32)


def _quoted(path: Path) -> str:
    """The path as messages show it: on one line whatever characters it has."""
    return repr(os.fspath(path))
