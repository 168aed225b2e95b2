"""What the user got wrong, told apart from what we did by its class; and errors put into a line."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["Mistake", "causes", "reason"]


class Mistake(ValueError):  # noqa: N818 (the mistake is the user's)
    """What a user got wrong: the message says what arrived and what would do, and the command line shows it alone.

    Any other error is ours, and shows its traceback.
    """


def causes(error: BaseException) -> Iterator[BaseException]:
    """Walk from an error back through what led to it, itself first."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def reason(error: BaseException) -> str:
    """Put an error into one line: of MONAI's long ones, the last that names an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "rror:" in line]
    return (telling or lines or [type(error).__name__])[-1]
