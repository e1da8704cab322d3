"""`senet` and `python -m senet`: run a command, turn errors into one line and an exit code.

Exit codes: 0 success; 1 a failure outside the program (full disk, NaN loss, unreadable images);
2 bad input; 130 stopped by Ctrl-C; 143 stopped by SIGTERM. What nobody foresaw keeps its traceback.

Without the extra `train` the command says so, with exit code 2.
"""

import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from senet.errors import SenetError, StopSignal, UserError
from senet.support import extras

try:
    from cyclopts import CycloptsError, UnknownOptionError

    from senet.cli import COMMANDS, app
    from senet.cli.elsewhere import told_otherwise
    from senet.cli.options import config_place
except ModuleNotFoundError as error:
    if (remedy := extras.remedy(error)) is None:
        raise
    print(f"senet: the command needs more than the core: {remedy}", file=sys.stderr)
    raise SystemExit(2) from error

LEAST_WIDTH = 4  # in a narrower one cyclopts never gets to the end of a help page
NAMES = {command.__name__ for command in COMMANDS}
BAD_INPUT = 2
FAILURE = 1
INTERRUPTED = 130


def _raised_here(traceback: TracebackType | None) -> bool:
    """Whether the exception was raised by a line of this package, and not by a library."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and str(
        traceback.tb_frame.f_globals.get("__name__", "")
    ).startswith("senet.")


def _too_large(error: Exception) -> bool:
    """Whether a library says of a number that no size of a tensor, or no memory, is as large."""
    if isinstance(error, OverflowError | MemoryError):
        return True
    said = ("overflow", "allocate memory", "not enough memory")
    text = str(error).lower()
    return isinstance(error, RuntimeError | TypeError) and any(part in text for part in said)


def exit_code(error: Exception) -> int | None:
    """Exit code of an error a user can act on; None for one that needs its traceback.

    ValueError and TypeError count as bad input where this package raised them: a library's come
    from a mistake of ours.
    """
    if isinstance(error, CycloptsError | UserError):
        return BAD_INPUT
    if isinstance(error, ImportError) and extras.remedy(error):
        return BAD_INPUT
    if isinstance(error, SenetError):
        return FAILURE
    if _too_large(error):
        return BAD_INPUT
    if isinstance(
        error, FileNotFoundError | FileExistsError | PermissionError | NotADirectoryError
    ):
        return BAD_INPUT
    if isinstance(error, OSError):
        return BAD_INPUT if error.errno == errno.ENAMETOOLONG else FAILURE
    if isinstance(error, ValueError | TypeError) and _raised_here(error.__traceback__):
        return BAD_INPUT
    return None


def message(error: Exception) -> str:
    """The error on one line."""
    if isinstance(error, ImportError):
        return extras.remedy(error) or str(error)
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
        return f"{error.strerror}{named}"
    text = " ".join(str(error).split())
    if not isinstance(error, SenetError) and _too_large(error):
        first = str(error).partition("\n")[0]
        return f"a number is too large for this machine, give smaller ones: {first}"
    return text


@contextmanager
def _warnings_in_one_line(command: str) -> Iterator[None]:
    """Show warnings as `senet COMMAND: warning: …`, once, without file and source line."""
    former = warnings.showwarning
    shown: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            print(f"{command}: warning: {text}", file=file or sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = former


def _open_streams() -> None:
    """Have a stream that is closed (`>&-`), None in Python, lead nowhere.

    The next file to be opened would get its number, and what libraries print.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: PTH123, SIM115


def _forget_no_width() -> None:
    """Take COLUMNS for unknown where nothing could be printed in it."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns) < LEAST_WIDTH:
        del os.environ["COLUMNS"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: command and flags; those of the process by default.
    """
    _open_streams()
    _forget_no_width()
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    command = f"senet {tokens[0]}" if tokens and tokens[0] in NAMES else "senet"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        command += f" [rank {os.environ.get('RANK', '?')}]"
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that it cannot say are written out
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _warnings_in_one_line(command):
            result = app(
                tokens, exit_on_error=False, print_error=False, result_action="return_value"
            )
            sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        print(f"{command}: {str(interrupt) or 'stopped'}", file=sys.stderr)
        return interrupt.number + 128 if isinstance(interrupt, StopSignal) else INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone; nothing may be flushed to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        text = message(error)
        if isinstance(error, UnknownOptionError):
            text = told_otherwise(error, tokens[0]) or text
        print(f"{command}: {config_place(tokens, text)}{text}", file=sys.stderr)
        return code
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
