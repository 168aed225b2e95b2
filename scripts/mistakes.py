"""What the user got wrong, told apart from what we did by its class; and errors put into a line."""

import difflib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import fire

__all__ = ["Mistake", "causes", "command", "likely", "reason"]


class Mistake(ValueError):  # noqa: N818 (the mistake is the user's)
    """What a user got wrong: the message says what arrived and what would do, and the command line shows it alone.

    Any other error is ours, and shows its traceback.
    """


def causes(error: BaseException) -> Iterator[BaseException]:
    """Walk from an error back through those that it was raised from, itself first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def reason(error: BaseException) -> str:
    """Put an error into one line: of MONAI's long ones, the last that names an error."""
    *_, error = causes(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror:" in line]
    return (telling or lines or [type(error).__name__])[-1]


def likely(name: str, choices: Iterable[str]) -> str:
    """Ask whether the choice that a name is like was meant; say nothing where it is like none."""
    near = difflib.get_close_matches(name.lower(), choices, n=1, cutoff=0.7)
    return f": did you mean {near[0]}?" if near else ""


def command(commands: Callable[..., Any] | Mapping[str, Any], arguments: Sequence[str] | None = None) -> None:
    """Be the command line of a module, at its end.

    A user's mistake, also one that led to another error, and a file that cannot be read or written end it with the
    message alone; errors of ours show their traceback.

    Args:
        commands: a function or a class, or several by name.
        arguments: default: those of the command line.
    """
    try:
        fire.Fire(commands, command=arguments)
    except Exception as error:
        mistake = next((cause for cause in causes(error) if isinstance(cause, Mistake)), None)
        if mistake is None and not isinstance(error, OSError):
            raise
        sys.exit(f"error: {mistake or error}")
