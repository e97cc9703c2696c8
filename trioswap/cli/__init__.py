"""The command line: arguments in, exit codes out.

    0  done, or stopped cleanly
    1  the world said no: a port in use, no daemon there, an unknown model; or a bug of ours, with its traceback
    2  the user's mistake: bad arguments, a bad configuration

Every expected error is text on standard error.  What a command needs is imported inside
it, so that `trioswap --version` imports nothing but click.
"""

from trioswap.cli import offline, serving, talking  # their commands
from trioswap.cli.base import main

__all__ = ["main", "offline", "serving", "talking"]
