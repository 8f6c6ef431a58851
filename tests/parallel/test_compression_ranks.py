"""Compression on real ranks of MPI: the same bits on each, and what ranks as threads of one process compute."""

import numpy as np
import pytest

from tests.launching import WORKERS, launch, some_long
from tests.parallel.workers.compression_cases import BROKEN, SCHEMES, average_all
from tests.rank_threads import Ranks

SUMMED_BY_MPI = ("none", "powersgd", "powersgd:1")  # in an order of its own


@pytest.mark.parametrize("size", some_long([1, 2, 3], short=[3]))
def test_ranks_of_mpi_compute_what_threads_do(size, tmp_path):
    result = launch(size, [WORKERS / "compression_cases.py", tmp_path])
    assert result.returncode == 0, result.stderr[-3000:]
    found = [dict(np.load(tmp_path / f"{size}-{rank}.npz")) for rank in range(size)]
    for rank, expected in enumerate(Ranks(size).run(average_all)):
        for name in SCHEMES:
            mean, state = found[rank][name], found[rank][f"{name} state"]
            finite = np.isfinite(mean).all(1)
            assert finite.tolist() == [step != BROKEN or size == 1 for step in range(len(mean))]
            assert mean[finite].tobytes() == found[0][name][finite].tobytes()
            if name in SUMMED_BY_MPI and size > 2:
                np.testing.assert_allclose(mean, expected[name], rtol=1e-4, atol=1e-5)
                np.testing.assert_allclose(state, expected[f"{name} state"], rtol=1e-4, atol=1e-4)
            else:
                assert mean[finite].tobytes() == expected[name][finite].tobytes()
                assert state.tobytes() == expected[f"{name} state"].tobytes()
