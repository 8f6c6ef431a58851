"""Options: what a recipe's command line accepts, and one line for what it doesn't."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit.options import RunOptions, option, parse


@dataclass(frozen=True)
class Options(RunOptions):
    momentum: float = option(0.9, "of SGD", minimum=0)
    data_dir: Path | None = option(None, "of the data")


def test_values_and_types():
    found = parse(Options, None, ["--epochs", "3", "--data-dir=x/y", "--resume", "-v", "--learning-rate", "1e-2"])
    assert found == Options(epochs=3, data_dir=Path("x/y"), resume=True, verbose=True, learning_rate=0.01)
    assert parse(Options, None, []) == Options()


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--nonsense"], ["--nonsense", "--help"]),
        (["--epoch", "3"], ["--epoch"]),  # no abbreviations: a later flag could change their meaning
        (["--batch-size", "0"], ["--batch-size is '0'", "at least 1"]),
        (["--global-batch-size", "-4"], ["--global-batch-size is '-4'", "at least 1"]),
        (["--epochs", "2.5"], ["--epochs is '2.5'", "whole number"]),
        (["--seed", str(2**32)], ["--seed", "at most 4294967295"]),
        (["--learning-rate", "0"], ["above 0"]),
        (["--learning-rate", "nan"], ["'nan'"]),
        (["--learning-rate", "inf"], ["'inf'"]),
        (
            ["--batch-size", "2", "--global-batch-size", "4"],
            ["--batch-size", "--global-batch-size", "one of them"],
        ),
        (["--batch-size=2", "--global-batch-size=4"], ["one of them"]),
        (["--epochs"], ["--epochs"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, texts, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Options, None, arguments)
    printed = capsys.readouterr().err
    assert end.value.code == 2
    assert printed.count("\n") == 1
    assert all(text in printed for text in texts), printed


def test_only_rank_0_says_it(capsys, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        parse(Options, None, ["--nonsense"])
    assert capsys.readouterr().err == ""


def test_help_names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(Options, "What it does.", ["--help"])
    printed = capsys.readouterr().out
    assert "What it does." in printed and "--momentum" in printed and "(default: 0.9)" in printed
