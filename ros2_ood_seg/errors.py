"""The errors that a caller can cause, and so can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something that came from outside cannot be used: an image, a file, a setting.

    The message is one line that names the value and what is allowed. The command line prints it and exits with 2;
    the node logs it, counts the frame and goes on.
    """


class WeightsError(InputError):
    """A weights file is missing, damaged or of another model; the message says what was expected and where to get it."""


class ProcessError(RuntimeError):
    """Another process that was started to help failed, for a reason that lies in it or in the machine, not in the input."""


@contextmanager
def naming(what: str) -> Iterator[None]:
    """What cannot be used within is said to be of ``what``, of which there are many.

    Raises:
        InputError: The one that was raised within, which now begins with ``what``.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def os_error_text(error: OSError) -> str:
    """A full disk, a folder that cannot be written: in one line with the file, where it is known."""
    # NumPy's way to say that an array does not fit on the disk.
    if error.errno is None and "requested and" in str(error):
        return f"an array cannot be written, the disk is full ({error} values)"
    where = f"'{error.filename}': " if error.filename else ""
    return f"{where}{error.strerror or error}"
