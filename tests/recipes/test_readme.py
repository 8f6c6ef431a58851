"""The scripts in README and docs run as they stand, on two ranks, and leave both with the same weights."""

import re

import pytest

from tests.launching import ROOT, launch, some_long


def scripts(file):
    return re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.S)


CHECK = """
digests = dp.gather(dp.digest(model, optimizer))
if any(other != digests[0] for other in digests):
    raise SystemExit("the ranks' weights differ")
dp.stop()"""


RUNS = {"torch": ("torch", ""), "tensorflow": ("tensorflow", "")}
RUNS |= {f"keras on {backend}": ("keras", backend) for backend in ("tensorflow", "torch")}


def launch_checked(file, run, tmp_path, *arguments):
    adapter, backend = RUNS[run]
    (script,) = (text for text in scripts(file) if f"toolkit.adapters.{adapter} " in text)
    (end,) = re.findall(r"\n( *)dp\.stop\(\)", script)
    script = script.replace(f"\n{end}dp.stop()", CHECK.replace("\n", f"\n{end}"))
    (tmp_path / "script.py").write_text(script)
    environment = {"KERAS_BACKEND": backend or "tensorflow"}
    result = launch(2, [tmp_path / "script.py", *arguments], cwd=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("run", RUNS)
def test_script_of_the_readme(run, tmp_path):
    launch_checked("README.md", run, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("model.")]


@pytest.mark.parametrize("run", some_long(RUNS, short=["torch", "keras on tensorflow"]))
def test_script_on_ones_own_data(run, tmp_path):
    printed = launch_checked("docs/data.md", run, tmp_path, "--epochs", "2", "--audit")
    assert printed.count("1000 samples, 0 missed, 0 repeated") == 2


EACH = [pytest.param(run, marks=[] if run == "torch" else [pytest.mark.long]) for run in RUNS]


@pytest.mark.parametrize("run", EACH)
def test_script_of_mixed_precision(run, tmp_path):
    """On CPUs, where it trains in float16 too."""
    launch_checked("docs/gpus.md", run, tmp_path)


@pytest.mark.parametrize("file", ["README.md", "docs/data.md", "docs/gpus.md"])
def test_there_is_a_script_for_each_framework(file):
    assert len(scripts(file)) == 3


@pytest.mark.parametrize(
    ("arguments", "taken_out", "named"),
    [
        (["--folds", "3"], "", "have it loop over each_fold()"),
        (
            ["--accumulation-steps", "2"],
            ", accumulation_steps=options.accumulation_steps",
            "the optimizer accumulates 1",
        ),
    ],
)
def test_a_flag_that_the_script_leaves_out_is_refused(arguments, taken_out, named, tmp_path):
    (script,) = (text for text in scripts("docs/data.md") if "toolkit.adapters.torch " in text)
    (tmp_path / "script.py").write_text(script.replace(taken_out, ""))
    result = launch(1, [tmp_path / "script.py", *arguments], launcher="none", cwd=tmp_path)
    assert result.returncode == 2 and named in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "runs").exists()
