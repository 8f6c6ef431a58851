"""The torch adapter on real ranks."""

import re

import pytest

from tests.launching import WORKERS, launch

CASES = re.findall(r"@case\ndef (\w+)", (WORKERS / "torch_cases.py").read_text())
RUNS: dict[int, tuple[str, str]] = {}


@pytest.fixture(params=[1, 2, 3])
def run(request):
    """What the worker printed with so many ranks; each size is launched once."""
    size = request.param
    if size not in RUNS:
        result = launch(size, [WORKERS / "torch_cases.py"], launcher="none" if size == 1 else "mpirun")
        RUNS[size] = (result.stdout, f"exit code {result.returncode}\n{result.stderr[-3000:]}")
    return (size, *RUNS[size])


def test_a_call_before_start_is_one_line():
    code = "import torch, toolkit.adapters.torch as dp; m = torch.nn.Linear(1, 1); "
    for call in (
        "dp.distribute(torch.optim.SGD(m.parameters()), m)",
        "dp.broadcast_state(m)",
        "dp.average({'a': 1.0})",
    ):
        result = launch(1, ["-c", f"{code}{call}"], launcher="none")
        assert result.returncode != 0 and "UsageError: Horovod is not started: call start()" in result.stderr


@pytest.mark.parametrize("case", CASES)
def test_case(case, run):
    size, printed, errors = run
    if size == 1 and case == "control_without_distribute_ranks_part":
        return
    assert f"passed {case}\n" in printed, errors
