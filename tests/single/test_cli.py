"""`hvdkit` itself: what all of its commands do alike."""

import pytest

from toolkit import launch
from toolkit.cli import main

FORGOTTEN = {
    "launch": ["python", "mine.py", "--epochs", "1"],
    "verify": ["-np", "2", "python", "mine.py", "--epochs=1"],
    "tune": ["python", "mine.py", "--epochs", "1"],
    "plan": ["python", "mine.py", "--epochs", "1"],
    "restart": ["mpirun", "-np", "2", "python", "mine.py", "--output", "x"],
}


@pytest.mark.parametrize("command", FORGOTTEN)
def test_a_forgotten_separator_is_named(command, capsys):
    words = FORGOTTEN[command]
    assert main([command, *words]) == 2
    said = capsys.readouterr()
    unknown = "-np" if command == "restart" else words[-1 if command == "verify" else 2]
    assert said.err.startswith(f"error: {unknown} is no option of hvdkit {command}: put -- before the script's command")
    assert f"hvdkit {command} … -- " in said.err and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("words", [["--epochs", "1", "--", "python", "mine.py"], ["--epochs", "1"]])
def test_an_option_that_is_none_is_not_the_scripts(words, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["launch", *words])
    assert raised.value.code == 2 and "unrecognized arguments: --epochs" in capsys.readouterr().err


def test_control_c_as_the_command_is_printed(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", interrupted)
    assert main(["launch", "-np", "1", "--", "true"]) == 130
    assert capsys.readouterr().err == ""
