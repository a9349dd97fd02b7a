"""The one exception a user ever sees."""


class MoeInspectError(Exception):
    """Something the user can mend: the message names the thing, the value and the way out. The CLI prints it as one line
    and exits with 1. What only we can mend is an assert or another exception, and keeps its traceback."""
