"""The README's scripts run as they stand, on two ranks, and leave both with the same weights."""

import re

import pytest

from tests.launching import ROOT, launch

SCRIPTS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
CHECK = """
digests = dp.gather(dp.digest(model, optimizer))
if any(other != digests[0] for other in digests):
    raise SystemExit("the ranks' weights differ")
dp.stop()"""


RUNS = {"torch": ("torch", ""), "tensorflow": ("tensorflow", "")}
RUNS |= {f"keras on {backend}": ("keras", backend) for backend in ("tensorflow", "torch")}


@pytest.mark.parametrize("run", RUNS)
def test_script(run, tmp_path):
    adapter, backend = RUNS[run]
    (script,) = (text for text in SCRIPTS if f"toolkit.adapters.{adapter} " in text)
    assert script.count("\ndp.stop()") == 1
    (tmp_path / "script.py").write_text(script.replace("\ndp.stop()", CHECK))
    result = launch(2, [tmp_path / "script.py"], cwd=tmp_path, environment={"KERAS_BACKEND": backend or "tensorflow"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("model.")]


def test_there_is_a_script_for_each_framework():
    assert len(SCRIPTS) == 3
