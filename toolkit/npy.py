"""Arrays in numpy's .npy files, mapped: of a file that is larger than the memory, what is used is read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np

from toolkit.errors import UsageError

_NUMBERS = "biuf"  # numpy's kinds: bool, int, unsigned, float


def mapped(path: Path) -> np.ndarray:
    """The array in a .npy file, as `np.save` writes it, mapped for reading.

    The file must stay as it is while the array is in use: the kernel ends a process that reads beyond the end of a
    file that was cut.

    Args:
        path: the file.

    Returns:
        A read-only C-contiguous array of numbers or bools in native byte order, at least 1 row; shape (n, …).

    Raises:
        UsageError: the file is missing, unreadable, no .npy file, not exactly as long as its header says, or holds
            something else.
    """
    name = repr(os.fspath(path))
    try:
        # Before open(), which waits for a writer if this is a named pipe.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UsageError(f"{name} is a directory or device, not a file: give the path of a .npy file")
        with np.errstate(over="ignore"):
            array = np.lib.format.open_memmap(path, "r")
        size = os.path.getsize(path)
    except OSError as error:
        raise UsageError(f"{name} can't be read ({error.strerror}): give a readable .npy file") from error
    except UsageError:
        raise
    except Exception as error:  # numpy reads the header by Python's tokenizer and parser, with their errors
        text = " ".join(str(error).split())
        raise UsageError(f"{name} is no whole .npy file of numbers ({text}): write it with np.save") from error
    shape = " x ".join(map(str, array.shape))
    if array.offset + array.nbytes != size:
        raise UsageError(
            f"{name} has {size} bytes but its header announces {shape} values of {array.dtype}, "
            f"{array.offset + array.nbytes} bytes: write one array to a file with np.save"
        )
    if array.ndim == 0 or len(array) == 0:
        raise UsageError(f"{name} holds no samples, its shape is {array.shape}: give an array of one row a sample")
    if array.dtype.kind not in _NUMBERS or not array.dtype.isnative:
        raise UsageError(
            f"{name} holds values of {array.dtype} but numbers in this machine's byte order are needed: "
            "convert it, such as by np.save(path, array.astype(np.float32))"
        )
    if not array.flags.c_contiguous:
        raise UsageError(
            f"{name} is in Fortran order, in which a sample's values lie all over the file: "
            "write it with np.save(path, np.ascontiguousarray(array))"
        )
    return array


def pair(directory: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """`<part>_x.npy` and `<part>_y.npy` in a directory, mapped; see `mapped`.

    Raises:
        UsageError: see `mapped`; the two have different numbers of rows.
    """
    x, y = (mapped(Path(directory, f"{part}_{which}.npy")) for which in "xy")
    if len(x) != len(y):
        raise UsageError(
            f"{os.fspath(directory)!r} holds {len(x)} rows in {part}_x.npy and {len(y)} in {part}_y.npy: "
            "write both from the same samples"
        )
    return x, y


def is_in(directory: Path) -> bool:
    """Whether a directory has training data of this kind."""
    return any(os.path.lexists(os.path.join(directory, f"train_{which}.npy")) for which in "xy")
