"""The synthetic-data recipes: the models are those of the literature and alike, workers train one, times are right."""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.launching import ROOT, WORKERS, launch
from toolkit import throughput
from toolkit.adapters import Adapter
from toolkit.errors import RunFailed, UsageError
from toolkit.options import parse
from toolkit.synthetic import SyntheticOptions, workload
from toolkit.world import World

SHORT = ["--num-warmup-batches", "3", "--num-batches-per-iter", "2", "--num-iters", "3"]
FLAVOURS = {
    "torch": ("torch", {}),
    "tensorflow": ("tensorflow", {}),
    "keras on tensorflow": ("keras", {"KERAS_BACKEND": "tensorflow"}),
    "keras on torch": ("keras", {"KERAS_BACKEND": "torch"}),
}
IN_SHORT = [("torch", "transformer"), ("keras on tensorflow", "resnet50")]
ALL = [(flavour, model) for flavour in FLAVOURS for model in ("resnet50", "transformer")]
# ResNet-50 as torchvision counts it, and the smallest GPT-2 as its 124 million.
LITERATURE = {"resnet50": 25_557_032, "transformer": 124_439_808}


def results(flavour, size, tmp_path, *arguments):
    framework, environment = FLAVOURS[flavour]
    file = tmp_path / "results.json"
    command = [f"recipes/synthetic_{framework}.py", *SHORT, "--json", file, *arguments]
    launcher = "none" if size == 1 else "mpirun"
    result = launch(size, command, launcher=launcher, environment=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(file.read_text()), result.stdout


@pytest.mark.parametrize(
    ("flavour", "model"), [pair if pair in IN_SHORT else pytest.param(*pair, marks=pytest.mark.long) for pair in ALL]
)
def test_two_workers_train_one_model_and_rank_0_tells_how_fast(flavour, model, tmp_path):
    began = time.perf_counter()
    found, printed = results(flavour, 2, tmp_path, "--model", model)
    most = time.perf_counter() - began
    assert (found["model"], found["size"], found["workers"], found["device"]) == (model, "small", 2, "cpu")
    assert found["losses"][1] < found["losses"][0], "the same batch again and again"
    per_iteration = 2 * 2 * (32 if model == "resnet50" else 8 * 64)
    assert len(found["rates"]) == 3 and sum(per_iteration / rate for rate in found["rates"]) < most
    assert found["total"]["median"] == pytest.approx(np.median(found["rates"]))
    assert found["per_worker"]["median"] == pytest.approx(found["total"]["median"] / 2)
    assert "gpu_memory_megabytes" not in found
    lines = printed.splitlines()
    assert len(lines) == 1 + 3 + 3 and lines[-1].startswith("all workers hold the same weights; loss "), printed
    unit = {"resnet50": "images", "transformer": "tokens"}[model]
    assert re.fullmatch(
        rf"{unit}/s on 2 worker\(s\): median [\d,.]+, mean [\d,.]+ \+- [\d,.]+, from .* to .*", lines[-2]
    )


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("flavour", "model"), ALL)
def test_mixed_precision(flavour, model, precision, tmp_path):
    found, _ = results(flavour, 2, tmp_path, "--model", model, "--precision", precision, "--batch-size", "4")
    assert found["losses"][1] < found["losses"][0] and found["precision"] == precision


@pytest.mark.long
@pytest.mark.parametrize(
    ("flavour", "model"),
    [*(pair for pair in ALL if pair[0] in ("torch", "tensorflow")), ("keras on torch", "resnet50")],
)
def test_compiled(flavour, model, tmp_path):
    """Before and after one step: later ones of so small a batch amplify rounding."""
    two_steps = ["--num-warmup-batches", "1", "--num-batches-per-iter", "1", "--num-iters", "1", "--model", model]
    plain, _ = results(flavour, 2, tmp_path, *two_steps)
    found, _ = results(flavour, 2, tmp_path, *two_steps, "--compile")
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-3) and found["compile"] is True


@pytest.mark.long
def test_keras_on_tensorflow_has_no_compiler_for_it():
    result = launch(1, ["recipes/synthetic_keras.py", *SHORT, "--compile"], launcher="none")
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("error: jit_compile=True")


def computed(framework, tmp_path, *sizes):
    file = tmp_path / f"{framework}.npz"
    result = launch(1, [WORKERS / "synthetic_models.py", framework, file, *sizes], launcher="none")
    assert result.returncode == 0, result.stderr[-3000:]
    return np.load(file)


def test_the_same_weights_compute_the_same_in_torch_and_tensorflow(tmp_path):
    torch, tensorflow = computed("torch", tmp_path, "full"), computed("tensorflow", tmp_path)
    for model, count in LITERATURE.items():
        assert torch[f"parameters/{model}/full"] == count
        wanted = tensorflow[model]
        assert np.ptp(wanted) > 0.1
        np.testing.assert_allclose(torch[model], wanted, atol=1e-4 * np.abs(wanted).max(), err_msg=model)


@pytest.mark.long
def test_tensorflows_full_models_have_the_same_parameters(tmp_path):
    found = computed("tensorflow", tmp_path, "full")
    assert {model: found[f"parameters/{model}/full"] for model in LITERATURE} == LITERATURE


def test_kerass_models_are_tensorflows():
    """To the letter, as both are built of Keras' layers."""
    texts = [(ROOT / "recipes" / f"synthetic_{name}.py").read_text() for name in ("tensorflow", "keras")]
    models = [
        text[text.index("def convolution") : text.index("def main")].replace("tf.keras.", "keras.") for text in texts
    ]
    assert models[0] == models[1]


class Alone(Adapter):
    """One worker, in this process; of the contract, what a measurement asks for."""

    def gather(self, value, *, all_groups=False):
        return [value]

    def average(self, values, weight=1.0):
        return dict(values)

    def digest(self, model, optimizer=None):
        return {}

    def usage(self):
        return {"gpu_memory_megabytes": 12.0}


def measured(step, *arguments):
    options = parse(SyntheticOptions, None, [*SHORT, *map(str, arguments)])
    work = workload(options, World())
    return throughput.measure(step, None, None, options=options, world=World(), adapter=Alone(), work=work)


def test_rates_are_those_of_the_steps_after_the_warm_up(monkeypatch):
    calls = []
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: sum(calls)))

    def step():
        calls.append(30 if len(calls) < 3 else 10)  # seconds
        return 5 - len(calls)

    found = measured(step, "--batch-size", 6)
    assert len(calls) == 3 + 2 * 3 and found["losses"] == [4, -4]
    assert found["rates"] == [0.6] * 3, "6 images in 10 s"
    assert found["gpu_memory_megabytes"] == 12


def test_a_loss_that_is_not_finite_is_no_result(capsys):
    with pytest.raises(RunFailed, match="--learning-rate"):
        measured(lambda: float("nan"))
    assert "on 1 worker" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--model", "vgg"], ["--model is 'vgg'", "resnet50 or transformer"]),
        (["--batch-size", "0"], ["--batch-size is '0'", "at least 1"]),
        (["--num-iters", "0"], ["--num-iters", "at least 1"]),
        (["--epochs", "1"], ["unknown option --epochs"]),
    ],
)
def test_bad_options_are_one_line(arguments, texts, capsys):
    with pytest.raises(SystemExit):
        parse(SyntheticOptions, None, arguments)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(text in said for text in texts)


@pytest.mark.parametrize("place", [".", "none/file"])
def test_a_file_that_could_not_be_written_is_refused_before_the_measurement(place, tmp_path, capsys):
    with pytest.raises(UsageError, match="^--json is .*: give the path of a file"):
        measured(pytest.fail, "--json", tmp_path / place)
    assert not capsys.readouterr().out
