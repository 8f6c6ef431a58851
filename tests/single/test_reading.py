"""Batches cut in bulk, by a thread and into used memory are those of `array[indices]`, to the bit."""

import mmap
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from toolkit import reading
from toolkit.errors import UsageError
from toolkit.reading import Rows, read
from toolkit.sharding import Part, Sharding

pytestmark = pytest.mark.timeout(120)
SLOW, FAST = -1.0, float("inf")  # every cut counts as slow, so that the thread begins; or none
DTYPES = ["f4", ">f4", "f8", "i8", "u1", "?", "c16", "U3", "M8[s]", [("a", "u1"), ("b", "f4")], "O"]
LAYOUTS = {
    "plain": lambda array, place: array,
    "fortran": lambda array, place: np.asfortranarray(array),
    "strided": lambda array, place: np.repeat(array, 2, axis=0)[::2],
    "reversed": lambda array, place: array[::-1],
    "read-only": lambda array, place: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
    "mapped": lambda array, place: saved(array, place),
    "mapped, a part of it": lambda array, place: saved(np.concatenate([array, array]), place)[len(array) :],
    "masked": lambda array, place: np.ma.array(array),
}


def saved(array, place):
    np.save(place, array)
    return np.load(place, mmap_mode="r")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("arrays") / "x.npy"


@pytest.fixture
def settings_of_reading(monkeypatch):
    def put(slow=FAST, recycled=0):
        monkeypatch.setattr(reading, "_SLOW", slow)
        monkeypatch.setattr(reading, "_RECYCLED", recycled)

    return put


def threads():
    return [t for t in threading.enumerate() if t.name == "hvdkit-reader"]


def parts_of(samples, batch, epoch=0):
    return list(Sharding(samples, batch, 1).parts(epoch, 0))


def same(found, expected):
    assert type(found) is type(expected) and found.dtype == expected.dtype and found.shape == expected.shape
    assert found.flags.c_contiguous == expected.flags.c_contiguous
    assert found.tobytes() == expected.tobytes()  # NaN included


@settings(max_examples=400)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=npst.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5),
    rows=st.integers(1, 9),
    layout=st.sampled_from(sorted(LAYOUTS)),
    data=st.data(),
)
def test_cuts_are_those_of_numpy(place, dtype, shape, rows, layout, data):
    values = np.random.default_rng(rows).integers(0, 99, (rows, *shape[1:]))
    array = values.astype(dtype) if dtype != "O" else np.frompyfunc(lambda v: (v,), 1, 1)(values)
    if dtype == "O" and layout in ("read-only", "mapped", "mapped, a part of it"):
        return
    array = LAYOUTS[layout](array, place)
    of = Rows(array)
    recycled, reading._RECYCLED = reading._RECYCLED, 0
    try:
        cuts = data.draw(st.lists(st.lists(st.integers(-rows, rows - 1), min_size=1, max_size=12), max_size=6))
        for indices in (np.array(cut, np.int64) for cut in cuts):
            expected = np.asarray(array)[indices] if isinstance(array, np.memmap) else array[indices]
            for found in (of.cut(indices), of.cut_again(indices)):
                if dtype == "O":
                    assert found.tolist() == expected.tolist()
                else:
                    same(found, expected)
                assert found.flags.writeable and not np.shares_memory(found, array)
            of.announce(indices % rows)
        with pytest.raises(IndexError):
            of.cut_again(np.array([0, rows]))
    finally:
        reading._RECYCLED = recycled


@pytest.mark.parametrize("kind", ["in memory", "mapped"])
@pytest.mark.parametrize("slow", [SLOW, FAST], ids=["by the thread", "here"])
@settings(max_examples=60)
@given(samples=st.integers(1, 60), batch=st.integers(1, 20), kept=st.lists(st.booleans(), min_size=60, max_size=60))
def test_batches_come_in_order_and_stay_as_they_are(place, kind, slow, samples, batch, kept):
    """Also those that the loop keeps, or of which it keeps a view alone, while others' memory is used again."""
    x = np.arange(samples * 12, dtype=np.float32).reshape(samples, 3, 4)
    y = np.arange(samples)
    parts = parts_of(samples, batch)
    expected = [(x[part.indices], y[part.indices]) for part in parts]
    x = saved(x, place) if kind == "mapped" else x
    before = reading._SLOW, reading._RECYCLED
    reading._SLOW, reading._RECYCLED = slow, 0
    try:
        views, began = [], False
        for i, (part, x_cut, y_cut) in enumerate(read(x, y, parts, samples)):
            began = began or bool(threads())
            assert part is parts[i]
            same(x_cut, expected[i][0])
            same(y_cut, expected[i][1])
            views.append((x_cut[..., np.newaxis], memoryview(y_cut)) if kept[i] else None)
            x_cut = y_cut = None
    finally:
        reading._SLOW, reading._RECYCLED = before
    assert len(views) == len(parts) and not threads()
    if slow == FAST or len(parts) >= 6:  # of fewer, the thread may have ended by the time that it is looked for
        assert began == (slow == SLOW)
    for view, (x_expected, y_expected) in zip(views, expected, strict=True):
        if view is not None:
            same(view[0][..., 0], x_expected)
            same(np.asarray(view[1]), y_expected)


def test_the_memory_of_large_batches_is_used_again(settings_of_reading):
    settings_of_reading(SLOW, recycled=1 << 20)
    x, y = np.ones((400, 1 << 14), np.float32), np.zeros(400)  # batches of 2.5 MiB
    tracemalloc.start()
    try:
        places = {cut.ctypes.data for _, cut, _ in read(x, y, parts_of(400, 40), 400)}
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(places) <= 4 and peak < 4.5 * 40 * x[0].nbytes


@pytest.mark.parametrize("slow", [SLOW, FAST], ids=["by the thread", "here"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 7])
def test_an_error_comes_at_its_batch(settings_of_reading, slow, at):
    settings_of_reading(slow)
    x = np.arange(80)

    def parts():
        for i, part in enumerate(parts_of(80, 8)):
            if i == at:
                raise OSError("the disk is gone")
            yield part

    broken = parts_of(80, 8)
    broken[at] = Part(np.array([5, 80]), 1.0)
    for given_parts, kind, text in ((parts(), OSError, "the disk is gone"), (broken, IndexError, "80")):
        cuts, taken = read(x, x, given_parts, 80), 0
        with pytest.raises(kind, match=text):
            for part, cut, _ in cuts:
                np.testing.assert_array_equal(cut, x[part.indices])
                taken += 1
        assert taken == at and not threads()


@pytest.mark.parametrize("slow", [SLOW, FAST], ids=["by the thread", "here"])
def test_what_is_made_of_a_cut_is_made_where_it_is_cut(settings_of_reading, slow):
    settings_of_reading(slow)
    x, y, makers = np.arange(80.0), np.arange(80), []

    def make(part, x_cut, y_cut):
        makers.append(threading.current_thread().name)
        if part.indices[0] == last:
            raise ValueError("can't be made")
        return x_cut + 1, (part.weight, y_cut)

    parts = parts_of(80, 8)
    last, taken = parts[-1].indices[0], 0
    with pytest.raises(ValueError, match="can't be made"):
        for part, x_made, (weight, y_made) in read(x, y, parts, 80, make):
            np.testing.assert_array_equal(x_made, x[part.indices] + 1)
            np.testing.assert_array_equal(y_made, part.indices)
            assert weight == part.weight
            taken += 1
    assert taken == 9 and len(makers) == 10 and not threads()
    assert makers.count("hvdkit-reader") == (8 if slow == SLOW else 0)


def test_a_cut_that_is_quick_of_which_something_is_made_slowly(settings_of_reading):
    settings_of_reading(0.05)
    began = []

    def make(part, x_cut, y_cut):
        time.sleep(0.06)
        return x_cut, y_cut

    for _ in read(np.arange(80.0), np.arange(80), parts_of(80, 8), 80, make):
        began.append(bool(threads()))
    assert began[:3] == [False, False, True]


def test_memory_is_used_again_of_which_nothing_was_kept(settings_of_reading):
    """As where a GPU has a copy."""
    settings_of_reading(SLOW, recycled=1)
    places = []

    def make(part, x_cut, y_cut):
        places.append(x_cut.ctypes.data)
        return x_cut.copy(), y_cut.copy()

    x = np.arange(800).reshape(80, 10)
    kept = [(part, x_made) for part, x_made, _ in read(x, np.arange(80), parts_of(80, 8), 80, make)]
    assert all(np.array_equal(x_made, x[part.indices]) for part, x_made in kept)
    assert len(set(places)) == 1


@pytest.mark.parametrize("taken", [1, 2, 3, 5])
def test_a_loop_that_ends_early_leaves_no_thread(settings_of_reading, taken):
    settings_of_reading(SLOW)
    x = np.arange(800)
    cuts = read(x, x, parts_of(800, 8), 800)
    for _ in range(taken):
        next(cuts)
    assert len(threads()) == (taken > 2)
    cuts.close()
    assert not threads()


def test_the_end_does_not_wait_for_a_disk_without_answer(settings_of_reading, monkeypatch):
    settings_of_reading(SLOW)
    monkeypatch.setattr(reading, "_LAST_CUT", 0.01)
    answer = threading.Event()

    def parts():
        yield from parts_of(80, 8)[:4]
        answer.wait(60)
        yield Part(np.array([0]), 1.0)

    x = np.arange(80)
    cuts = read(x, x, parts(), 80)
    try:
        for _ in range(3):
            next(cuts)
        cuts.close()
        [left] = threads()
        assert left.daemon  # so the process can end
    finally:
        answer.set()
    left.join(60)
    assert not threads()


class Asked:
    """No numpy array: rows are asked for, by the thread that made it alone."""

    def __init__(self, array):
        self.array, self.thread = array, threading.current_thread()

    def __len__(self):
        return len(self.array)

    def __getitem__(self, indices):
        assert threading.current_thread() is self.thread
        return self.array[indices]


def test_other_data_is_read_in_the_loops_thread(settings_of_reading):
    settings_of_reading(SLOW)
    x, y = np.arange(80.0), np.arange(80)
    for data in (SimpleNamespace(x=Asked(x), y=y), SimpleNamespace(x=x, y=Asked(y)), SimpleNamespace(x=x[::-1], y=y)):
        expected = np.asarray(data.x.array if isinstance(data.x, Asked) else data.x)
        for part, x_cut, y_cut in read(data.x, data.y, parts_of(80, 8), 80):
            np.testing.assert_array_equal(x_cut, expected[part.indices])
            np.testing.assert_array_equal(y_cut, y[part.indices])
            assert not threads()


@pytest.mark.parametrize(("rows", "name"), [((9, 10), "x"), ((10, 9), "y")])
def test_data_that_is_too_short_is_refused(rows, name):
    with pytest.raises(
        UsageError, match=rf"^the data has 9 rows in {name} and the run 10: give Run\(…\) its length\.$"
    ):
        read(np.zeros(rows[0]), np.zeros(rows[1]), [], 10)


@pytest.mark.parametrize("layout", ["whole", "a part", "one row", "with an offset"])
def test_where_rows_lie_in_the_file(layout, tmp_path):
    array = np.random.default_rng(0).random((50, 7, 11), dtype=np.float32)
    found = saved(array, tmp_path / "x.npy")
    if layout == "with an offset":
        found = np.memmap(tmp_path / "x.npy", np.float32, "r", found.offset + 3 * 308, (40, 7, 11))
        array = array[3:43]
    elif layout != "whole":
        part = slice(13, 14) if layout == "one row" else slice(13, 40)
        found, array = found[part], array[part]
    of = Rows(found)
    assert isinstance(of._map, mmap.mmap) and of.mapped_bytes == 308
    for i, row in enumerate(array):
        begin = of._begin + i * of.mapped_bytes
        assert of._map[begin : begin + of.mapped_bytes] == row.tobytes()
    asked = []
    of._map = SimpleNamespace(madvise=lambda advice, begin, length: asked.append((advice, begin, begin + length)))
    indices = np.random.default_rng(1).permutation(len(array))[:9]
    of.announce(indices)
    assert {advice for advice, _, _ in asked} == {mmap.MADV_WILLNEED}
    assert all(begin % mmap.PAGESIZE == 0 for _, begin, _ in asked)
    for begin in of._begin + indices * 308:
        assert any(first <= begin and begin + 308 <= last for _, first, last in asked)
