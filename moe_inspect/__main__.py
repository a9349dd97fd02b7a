"""`moe-inspect` and `python -m moe_inspect`."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line; every way it can end has its exit code (0, 1, 2, 3, 130)."""
    from moe_inspect.cli.app import app
    from moe_inspect.errors import MoeInspectError

    try:
        app()
    except MoeInspectError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
