"""`moe-inspect` and `python -m moe_inspect`."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 an error that the user can fix, 2 usage, 3 a
    gate failed, 130 interrupted."""
    gc.set_threshold(100_000)  # of what is imported nothing is garbage
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        # glibc would give the memory of each freed array back to the system, and get it again
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**26)
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal's encoding lacks
    from moe_inspect.text import abandon

    code = _run()
    try:
        sys.stdout.flush()
    except OSError:  # reported already
        abandon(sys.stdout)
    if "torch" not in sys.modules:  # whose libraries check at exit that nothing of theirs is left
        gc.freeze()  # nothing is looked through for garbage at exit
    sys.exit(code)


def _run() -> int:
    from moe_inspect.cli import UsageError, app
    from moe_inspect.cli.emit import to_stdout
    from moe_inspect.errors import MoeInspectError, missing_package
    from moe_inspect.text import first_line, print_stderr

    try:
        code = app(standalone_mode=False, prog_name="moe-inspect")
        with to_stdout():  # help is written by typer
            sys.stdout.flush()
        return code or 0
    except UsageError as error:
        text = io.StringIO()
        error.message = error.message.replace("Value error, ", "")  # pydantic's
        error.show(text)
        for line in text.getvalue().splitlines():
            print_stderr(line)
        return error.exit_code
    except MoeInspectError as error:
        print_stderr(f"error: {error}")
        return 1
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("moe_inspect"):
            raise
        print_stderr(f"error: {missing_package(error.name)}")
        return 1
    except OSError as error:  # a disk or network error that no command handles
        print_stderr(
            "error: "
            f"{f'{error.filename}: ' if error.filename is not None else ''}{first_line(error)}"
        )
        return 1
    except KeyboardInterrupt:
        return 130


def _open_closed_streams() -> None:
    """Replaces standard streams that the caller closed (`>&-`): they are None, and the next file
    that is opened would get their descriptor. Writing to stdout then fails, stderr is discarded."""
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            setattr(
                sys, name, os.fdopen(os.open(os.devnull, flags), "r" if name == "stdin" else "w")
            )


if __name__ == "__main__":
    main()
