"""Promises of how errors end: a user's mistake in one line, a bug of ours with its traceback."""

import pytest
from conftest import train

from scripts.mistakes import Mistake, causes, command, reason


def fails(error):
    def call():
        raise error

    return call


def test_a_command_says_a_mistake_alone_and_shows_a_bug_whole():
    with pytest.raises(SystemExit, match="error: give a folder"):
        command({"run": fails(Mistake("give a folder"))}, ["run"])
    wrapped = RuntimeError("MONAI failed")
    wrapped.__cause__ = Mistake("give a folder")
    for error in (wrapped, FileNotFoundError("give a folder")):
        with pytest.raises(SystemExit, match="error: give a folder"):
            command({"run": fails(error)}, ["run"])
    with pytest.raises(ValueError, match="a bug"):
        command({"run": fails(ValueError("a bug"))}, ["run"])


def test_a_mistake_is_found_behind_what_was_raised_from_it_and_not_behind_a_bug_on_the_way():
    outer, bug = RuntimeError("MONAI failed"), ValueError("a bug while a mistake was handled")
    outer.__cause__ = Mistake("of the user")
    bug.__context__ = Mistake("of the user")
    assert [type(error) for error in causes(outer)] == [RuntimeError, Mistake]
    assert [type(error) for error in causes(bug)] == [ValueError]
    assert reason(outer) == "of the user"


@pytest.mark.slow
def test_a_value_error_of_our_own_code_shows_its_traceback_on_the_command_line_too(tmp_path):
    overlay = tmp_path / "bug.yaml"
    overlay.write_text(
        "loss_function:\n"
        "  _target_: scripts.networks.random_masking\n"
        "  valid: $torch.ones(1, 8, dtype=torch.bool)\n"
        "  mask_ratio: 0.5\n"
        "  seeds: [1, 2] # one too many: a mistake of whoever calls it, not of the user\n"
    )
    result = train("train.yaml", "small.yaml", str(overlay), output_dir=tmp_path / "out")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "seeds has 2 entries for a batch of 1 volumes" in result.stderr
    assert "\nerror:" not in result.stderr
