"""The torch adapter on real ranks."""

import re

import pytest

from tests.launching import WORKERS, launch, some_long

CASES = re.findall(r"@case\ndef (\w+)", (WORKERS / "torch_cases.py").read_text())
OVERLAP = re.findall(r"@case\ndef (\w+)", (WORKERS / "overlap_torch.py").read_text())
RUNS: dict[int, tuple[str, str]] = {}


@pytest.fixture(params=some_long([1, 2, 3], short=[1, 3]))
def run(request):
    """What the worker printed with so many ranks; each size is launched once."""
    size = request.param
    if size not in RUNS:
        result = launch(size, [WORKERS / "torch_cases.py"], launcher="none" if size == 1 else "mpirun")
        RUNS[size] = (result.stdout, f"exit code {result.returncode}\n{result.stdout[-6000:]}\n{result.stderr[-3000:]}")
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


FLAT = ["the_environment_is_heard_where_nothing_is_asked_for"]  # which is about who adds up on a CPU
# Those in which gradients come in another way than by plain backward passes.
SHORT = [
    "accumulation_is_the_mean_over_the_global_batch",
    "flush_applies_the_tail_as_a_mean",
    "loss_scaling_averages_before_it_looks_for_overflow",
    "mixed_precision_unscales_averages_clips_and_steps_as_one_process",
    "gradients_set_by_hand_are_averaged_in_step",
    "a_closure_that_sets_gradients_by_hand_is_averaged",
    "a_rank_whose_last_pass_reaches_nothing_counts_as_zero",
    "a_new_optimizer_takes_over_the_old_ones_parameters",
    "channels_last_and_bfloat16_models_work",
]


def in_buckets(size, worker, *cases, options=(), environment=None):
    """Run cases on the way that a GPU's gradients take."""
    command = [WORKERS / "as_on_gpus.py", *options, WORKERS / worker, *cases]
    result = launch(size, command, environment=environment, timeout=200)
    found = re.findall(r"passed (\w+)", result.stdout)
    assert sorted(found) == sorted(cases), f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"


@pytest.mark.parametrize("size", some_long([2, 4], short=[2]))
def test_gradients_travel_in_buckets_while_the_backward_pass_goes_on(size):
    in_buckets(size, "overlap_torch.py", *OVERLAP)


def test_what_is_carried_through_the_host_in_nccls_place_is_the_same():
    """By which tests/gpu has two workers on one GPU send buckets."""
    in_buckets(2, "overlap_torch.py", *OVERLAP[:3], options=["--carried"])


@pytest.mark.parametrize("cases", some_long(["short", "all"], short=["short"]))
def test_what_holds_for_one_buffer_holds_for_buckets(cases):
    in_buckets(2, "torch_cases.py", *(SHORT if cases == "short" else CASES))


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 4])
def test_reducers_cases_hold_for_buckets(size):
    source = (WORKERS / "reducer_cases.py").read_text()
    own = re.findall(r'case\(\w+, "(\w+)"\)', (WORKERS / "reducer_torch.py").read_text())
    cases = [each for each in re.findall(r"@case\ndef (\w+)", source) + own if each not in FLAT]
    command = [WORKERS / "as_on_gpus.py", WORKERS / "reducer_cases.py", "torch", 1, *cases]
    result = launch(size, command, timeout=400)
    assert sorted(re.findall(r"passed (\w+)$", result.stdout, re.MULTILINE)) == sorted(cases), result.stderr[-3000:]


@pytest.mark.long
def test_a_model_that_is_compiled_to_machine_code():
    in_buckets(
        2,
        "torch_cases.py",
        "a_model_that_is_compiled_before_or_after_distribute",
        environment={"HVDKIT_TEST_COMPILER": "inductor"},
    )
