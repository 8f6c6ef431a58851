"""`hvdkit checkpoint export` of real runs, read by the frameworks' own loaders in a process of their own."""

import json

import numpy as np
import pytest
import safetensors.numpy

from tests.launching import launch, some_long

# Export needs neither Horovod nor MPI: they can't be imported here.
EXPORT = """
import resource, sys
if sys.argv[-1] == "full":  # a disk that takes 20 kB a file
    sys.argv.pop()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.modules.update({name: None for name in ("horovod", "mpi4py")})
from toolkit.cli import main
sys.exit(main(["checkpoint", "export", *sys.argv[1:]]))
"""
# Each ends with {name: array} of the weights and "predicted", of the loaded model and of a plain one of the recipe's
# shape that was given the checkpoint's arrays.
TORCH = """
import sys, numpy as np, safetensors.numpy, torch
from torch import nn
sys.modules["toolkit"] = None
file, saved, out = sys.argv[1:]
class Flat(nn.Module):
    def forward(self, x):
        return x.flatten(1)
def build():
    pool, relu = nn.MaxPool2d(2), nn.ReLU()
    names = {"conv1": 0, "conv2": 3, "fc1": 7, "fc2": 9}
    layers = nn.Sequential(nn.Conv2d(1, 10, 5), relu, pool, nn.Conv2d(10, 20, 5), relu, pool, Flat(),
                           nn.Linear(320, 50), relu, nn.Linear(50, 10))
    return layers, {f"{name}.{kind}": f"{i}.{kind}" for name, i in names.items() for kind in ("weight", "bias")}
x = torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))
loaded = torch.load(file, weights_only=True)
arrays = {n.removeprefix("model/"): torch.from_numpy(a) for n, a in safetensors.numpy.load_file(saved).items()
          if n.startswith("model/")}
for kind, state in (("loaded", loaded), ("expected", arrays)):
    model, names = build()
    model.load_state_dict({names[n]: t for n, t in state.items()})
    with torch.no_grad():
        np.savez(f"{out}/{kind}.npz", predicted=model(x), **{n: t.numpy() for n, t in state.items()})
"""
KERAS = """
import sys, numpy as np, safetensors.numpy, keras
from keras import layers
sys.modules["toolkit"] = None
file, saved, out = sys.argv[1:]
def build():
    return keras.Sequential([keras.Input((28, 28, 1)), layers.Conv2D(10, 5, activation="relu"), layers.MaxPooling2D(2),
        layers.Conv2D(20, 5, activation="relu"), layers.MaxPooling2D(2), layers.Flatten(),
        layers.Dense(50, activation="relu"), layers.Dropout(0.0), layers.Dense(10)])
arrays = safetensors.numpy.load_file(saved)
names = [f"model/{layer}/{kind}{number}" for layer in ("conv2d", "dense") for number in ("", "#2")
         for kind in ("kernel", "bias")]
plain = build()
plain.set_weights([arrays[n] for n in names])
if file.endswith(".keras"):
    loaded = keras.models.load_model(file)
else:
    loaded = build()
    loaded.load_weights(file)
x = np.random.default_rng(0).random((7, 28, 28, 1), "float32")
for kind, model in (("loaded", loaded), ("expected", plain)):
    np.savez(f"{out}/{kind}.npz", predicted=model.predict(x, verbose=0),
             **{n: w for n, w in zip(names, model.get_weights())})
"""
FLAVOURS = {
    "torch": ("torch", {}, ".pt"),
    "tensorflow": ("tensorflow", {}, ".keras"),
    "keras on tensorflow": ("keras", {"KERAS_BACKEND": "tensorflow"}, ".weights.h5"),
    "keras on torch": ("keras", {"KERAS_BACKEND": "torch"}, ".keras"),
}


@pytest.mark.parametrize("flavour", some_long(FLAVOURS, short=[f for f in FLAVOURS if f != "keras on torch"]))
def test_the_frameworks_own_loader_gives_the_checkpoints_bits(flavour, tmp_path):
    framework, environment, suffix = FLAVOURS[flavour]
    command = [f"recipes/cnn_{framework}.py", "--max-steps", "3", "--audit", "--output", tmp_path / "run"]
    assert launch(1, command, launcher="none", environment=environment).returncode == 0
    saved, file = tmp_path / "run/step-00000003/state.safetensors", tmp_path / f"model{suffix}"
    if suffix != ".keras":  # a process the less
        result = launch(1, ["-c", EXPORT, tmp_path / "run", "--output", file, "full"], launcher="none")
        assert result.returncode == 2 and result.stderr == f"error: --output {file} can't be written: File too large.\n"
        assert [p.name for p in tmp_path.iterdir()] == ["run"]
    result = launch(1, ["-c", EXPORT, tmp_path / "run", "--output", file], launcher="none")
    assert result.returncode == 0 and result.stdout == f"{file}: 8 tensors of {saved.parent}\n", result.stderr
    assert not result.stderr, result.stderr
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == [file.name]
    code = TORCH if framework == "torch" else KERAS
    result = launch(1, ["-c", code, file, saved, tmp_path], launcher="none", environment=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    loaded, expected = (dict(np.load(tmp_path / f"{kind}.npz")) for kind in ("loaded", "expected"))
    state = safetensors.numpy.load_file(saved)
    state = {n.removeprefix("model/" if suffix == ".pt" else ""): a for n, a in state.items() if n[:6] == "model/"}
    assert loaded.keys() == expected.keys() == {*state, "predicted"}
    for name, array in expected.items():
        assert loaded[name].dtype == array.dtype and loaded[name].tobytes() == array.tobytes(), name
        assert name == "predicted" or array.tobytes() == state[name].tobytes(), name


SPECIAL = """
import sys, numpy as np, torch
from types import SimpleNamespace
import toolkit.adapters.torch as dp
from toolkit.options import RunOptions, parse
from toolkit.run import Run
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.tied = nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.last = nn.Linear(4, 1).to(torch.bfloat16)
    def forward(self, x):
        return self.last(self.tied(self.norm(self.first(x))).to(torch.bfloat16)).float()

def train():
    options = parse(RunOptions, "")
    world = dp.start(**options.start)
    model = Net()
    optimizer = dp.distribute(torch.optim.Adam(model.parameters(), lr=0.01), model)
    x = np.random.default_rng(0).normal(size=(60, 4)).astype("f4")
    data = SimpleNamespace(x=x, y=x.sum(1, keepdims=True))
    with Run(options, world, dp, model, optimizer, 60) as run:
        for _ in run.epochs():
            for batch in run.batches(data):
                optimizer.zero_grad()
                x, y = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
                loss = (model(x) - y).square().mean() * batch.weight
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
            run.end_epoch()
        torch.save(model.state_dict(), f"{options.output}/rank{world.rank}.pt")
    dp.stop()

if __name__ == "__main__":
    train()
"""


def test_batchnorm_bfloat16_and_a_tied_parameter(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "special.py").write_text(SPECIAL)
    run = tmp_path / "run"
    result = launch(2, [tmp_path / "special.py", "--max-steps", "3", "--audit", "--output", run])
    assert result.returncode == 0, result.stderr[-3000:]
    shown = launch(1, ["-m", "toolkit.cli", "checkpoint", "show", run], launcher="none").stdout
    result = launch(1, ["-c", EXPORT, run, "--output", tmp_path / "model.pt"], launcher="none")
    assert result.returncode == 0, result.stderr
    ranks = [torch.load(run / f"rank{r}.pt", weights_only=True) for r in range(2)]
    means = {n: (ranks[0][n].double() + ranks[1][n]).div(2).float() for n in ("norm.running_mean", "norm.running_var")}
    assert not torch.equal(ranks[0]["norm.running_mean"], means["norm.running_mean"])
    expected, found = {**ranks[0], **means}, torch.load(tmp_path / "model.pt", weights_only=True)
    assert found.keys() == expected.keys() and found["last.weight"].dtype == torch.bfloat16
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    namespace = {"__name__": "special"}
    exec(compile(SPECIAL.replace("import toolkit.adapters.torch as dp", ""), "special", "exec"), namespace)
    x, outputs = torch.randn(5, 4), []
    for state in (expected, found):
        model = namespace["Net"]().eval()
        model.load_state_dict(state)
        assert model.tied.weight is model.first.weight
        outputs.append(model(x))
    assert torch.equal(*outputs)
    # What ranks keep for themselves is one line, with how far the statistics lie apart.
    far = max((ranks[0][n] - ranks[1][n]).abs().max().item() for n in means)
    own = shown.splitlines()[-1]
    assert own.startswith("each rank's own: 2 rank(s); random states of numpy, python, torch; BatchNorm"), own
    assert float(own.split("apart in ")[1].split(": ")[1].split(" ")[0]) == pytest.approx(far, rel=1e-2)


OWN_MODELS = """
import json, sys
from pathlib import Path
import keras, numpy as np
from toolkit import checkpoint
from toolkit.adapters import _keras_state
from toolkit.errors import UsageError
from toolkit.export import export
directory, L = Path(sys.argv[1]), keras.layers

class Simple(keras.Model):  # Keras makes up a configuration for this one, which only this process could build
    def __init__(self):
        super().__init__()
        self.dense = L.Dense(2)
    def call(self, x):
        return self.dense(x)
class Subclassed(Simple):
    def __init__(self, anything):
        super().__init__()
class Scale(L.Layer):
    def call(self, x):
        return 2 * x
def loss(y, predicted):
    return (y - predicted) ** 2
def branches():
    a, b = keras.Input((4,)), keras.Input((4,))
    shared = L.Dense(4)
    x, y = shared(a), L.Dense(4)(shared(b))
    inner = keras.Sequential([L.Dense(4), L.BatchNormalization(), L.Dense(4, dtype="bfloat16"), L.Dropout(0.5)])
    inner.trainable = False
    model = keras.Model([b, a], [L.Dense(4)(inner(y)), L.Add()([x, inner(x)])])
    model.compile("adam", loss)
    return model

models = {
    "Simple": Simple(), "Subclassed": Subclassed(object()), "branches": branches(),
    "Scale": keras.Sequential([keras.Input((4,)), Scale(), L.Dense(1)]),
    "Lambda": keras.Sequential([keras.Input((4,)), L.Lambda(lambda x: x), L.Dense(1)]),
}
models["Simple"](np.ones((1, 4))), models["Subclassed"](np.ones((1, 4)))
answers = {}
for name, model in models.items():
    for i, weight in enumerate(model.weights):
        weight.assign(np.random.default_rng(i).random(weight.shape))
    manifest = {"framework": "keras", **_keras_state.describe(model)}
    path = checkpoint.write(directory / name, 1, _keras_state.export_state(model), manifest, 1)
    file = directory / f"{name}.keras"
    try:
        answers[name] = export(checkpoint.read(path), file)
        loaded = keras.models.load_model(file)
        x = [np.random.default_rng(i).random((3, 4), "float32") for i in range(2)]
        answers[name] = [np.array_equal(a, b) for a, b in zip(model.predict(x), loaded.predict(x))]
        assert [w.dtype for w in loaded.weights] == [w.dtype for w in model.weights] and not loaded.compiled
    except UsageError as error:
        answers[name] = str(error)
print("answers", json.dumps(answers))
"""


def test_keras_models_of_ones_own_are_refused_and_others_come_back(tmp_path):
    result = launch(1, ["-c", OWN_MODELS, tmp_path], launcher="none", environment={"KERAS_BACKEND": "torch"})
    assert "answers " in result.stdout, result.stderr[-3000:]
    answers = json.loads(result.stdout.split("answers ")[1])
    assert answers.pop("branches") == [True, True]
    for name, answer in answers.items():
        assert isinstance(answer, str) and "\n" not in answer and "import_state" in answer, (name, answer)
    assert "'Simple'" in answers["Simple"] and "'Scale'" in answers["Scale"] and "ambda" in answers["Lambda"]
    assert "not in the checkpoint" in answers["Subclassed"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["branches.keras"]
