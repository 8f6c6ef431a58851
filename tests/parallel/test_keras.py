"""The keras adapter on real ranks, on both backends."""

import json
import re

import pytest

from tests.launching import WORKERS, launch, some_long

CASES = re.findall(r"@case\ndef (\w+)", (WORKERS / "keras_cases.py").read_text())
RUNS: dict[str, tuple[str, str]] = {}
STALLED = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "30", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60"}


# Long on TensorFlow: each optimizer is compiled anew; the other is of state alone.
LONG_ON_TENSORFLOW = ["every_other_optimizer_equals_one_process", "import_refuses_each_misfit_and_changes_nothing"]
SHORT_ON_TENSORFLOW = [case for case in CASES if case not in LONG_ON_TENSORFLOW]
# What Keras on torch does by itself, beside what it shares with Keras on TensorFlow, or with torch.
SHORT_ON_TORCH = [
    "options_act_on_averaged_gradients",
    "ways_to_train_are_the_same",
    "xla_is_refused_or_off",
    "mixed_precision_averages_outermost",
    "embeddings_with_repeated_and_absent_rows",
    "broadcast_covers_statistics_and_slots_but_no_random_states",
    "state_round_trips_by_stable_names",
    "what_ranks_keep_for_themselves_goes_on_where_it_was",
    "arrays_become_the_backends_tensors",
]


def run(backend, cases):
    """What the worker printed on two ranks; launched once."""
    key = f"{backend} {cases}"
    if key not in RUNS:
        environment = {"KERAS_BACKEND": backend, **STALLED}
        result = launch(2, [WORKERS / "keras_cases.py", *cases], environment=environment, timeout=560)
        RUNS[key] = (result.stdout, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr[-3000:]}")
    return RUNS[key]


@pytest.mark.parametrize("case", some_long(CASES, short=SHORT_ON_TENSORFLOW))
def test_case_on_tensorflow(case):
    cases = SHORT_ON_TENSORFLOW if case in SHORT_ON_TENSORFLOW else LONG_ON_TENSORFLOW
    printed, errors = run("tensorflow", cases)
    assert f"passed {case}\n" in printed, errors


@pytest.mark.parametrize("case", some_long(CASES, short=SHORT_ON_TORCH))
def test_case_on_torch(case):
    cases = SHORT_ON_TORCH if case in SHORT_ON_TORCH else [c for c in CASES if c not in SHORT_ON_TORCH]
    printed, errors = run("torch", cases)
    assert f"passed {case}\n" in printed, errors


def test_names_of_state_are_the_same_on_both_backends():
    of = {"tensorflow": SHORT_ON_TENSORFLOW, "torch": SHORT_ON_TORCH}
    names = [json.loads(re.search(r"names (\[.*\])", run(*each)[0])[1]) for each in of.items()]
    assert names[0] == names[1]
    assert "model/dense/kernel#2" in names[0] and "optimizer/dense/kernel/velocity#2" in names[0]


STAGED = [
    "options_act_on_averaged_gradients",
    "a_gradient_missing_on_some_ranks_is_zero_there",
    "overflow_on_one_rank_makes_all_skip",
    "compressed_gradients_agree",
]


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.long)])
def test_gradients_of_gpus_go_through_the_host_where_they_are_shared_and_in_buckets_where_not(share):
    """With Keras on torch, and a CPU in the GPU's place."""
    command = [WORKERS / "as_on_gpus.py", *(["--share"] if share else []), WORKERS / "keras_cases.py", *STAGED]
    result = launch(2, command, environment={"KERAS_BACKEND": "torch"})
    assert sorted(re.findall(r"passed (\w+)", result.stdout)) == sorted(STAGED), result.stdout + result.stderr[-3000:]


@pytest.mark.parametrize("backend", some_long(["tensorflow", "torch"], short=["tensorflow"]))
def test_one_process_without_a_launcher(backend):
    cases = [
        "callback_broadcasts_before_the_first_batch",
        "metrics_are_those_over_all_samples",
        "averages_are_weighted",
    ]
    environment = {"KERAS_BACKEND": backend}
    result = launch(1, [WORKERS / "keras_cases.py", *cases], launcher="none", environment=environment)
    assert re.findall(r"passed (\w+)", result.stdout) == [c for c in CASES if c in cases], result.stdout


@pytest.mark.long
def test_xla_that_takes_what_it_can_leaves_the_averaging_out(tmp_path):
    cases = ["options_act_on_averaged_gradients", "overflow_on_one_rank_makes_all_skip"]
    environment = {
        "KERAS_BACKEND": "tensorflow",
        "TF_XLA_FLAGS": "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=2",
        "XLA_FLAGS": f"--xla_dump_to={tmp_path}",
    }
    result = launch(2, [WORKERS / "keras_cases.py", *cases], environment=environment)
    assert re.findall(r"passed (\w+)", result.stdout) == cases, result.stdout + result.stderr[-3000:]
    assert list(tmp_path.glob("*cluster*")), "XLA compiled nothing: the test shows nothing"


def test_keras_on_torch_takes_the_cpu_where_it_is_told_to(tmp_path):
    """Keras itself would take what KERAS_TORCH_DEVICE names, as it takes a GPU where torch sees one."""
    script = tmp_path / "script.py"
    script.write_text(
        "import keras\nimport toolkit.adapters.keras as dp\nworld = dp.start(device='cpu')\n"
        "model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)])\n"
        "model.compile(dp.distribute(keras.optimizers.SGD(0.1), model), loss='mse')\n"
        "model.fit(keras.ops.ones((8, 4)), keras.ops.ones((8, 1)), verbose=0)\n"
        "print(world.device, model.variables[0].value.device)\n"
        "with keras.device('meta'):\n"
        "    early = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])\n"
        "dp.distribute(keras.optimizers.SGD(0.1), early)\n"
    )
    environment = {"KERAS_BACKEND": "torch", "KERAS_TORCH_DEVICE": "cuda"}
    result = launch(1, [script], launcher="none", environment=environment)
    assert result.stdout == "cpu cpu\n", result.stderr[-3000:]
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 2 and "is on meta and this worker computes on cpu: build the model after" in last


def test_mistakes_outside_of_a_started_job(tmp_path):
    script = tmp_path / "script.py"
    for code, text in (
        (
            "keras.backend.backend = lambda: 'jax'\nimport toolkit.adapters.keras as dp\ndp.start()",
            "jax backend",
        ),
        ("import toolkit.adapters.keras as dp\ndp.distribute(keras.optimizers.SGD(), None)", "call start()"),
    ):
        script.write_text(f"import keras\n{code}\n")
        result = launch(1, [script], launcher="none", environment={"KERAS_BACKEND": "tensorflow"})
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode != 0 and "rror: " in last and text in last, result.stderr
