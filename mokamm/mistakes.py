"""Whose fault an exception is: a user's mistake is told in one message, anything else keeps its traceback.

Each floor has an error of its own (encoders and adapters may not import data); the commands ask here for all of them.
"""

from __future__ import annotations

import sys

from data.schema import UserError
from encoders.errors import EncoderError


def is_users(error: BaseException) -> bool:
    """Whether the message is complete. Imports nothing: no AdapterError was raised before its module (torch) is there."""
    routing = sys.modules.get("mokamm.routing")
    known = (UserError, EncoderError, *([routing.AdapterError] if routing else []))
    return isinstance(error, known)


def tell(error: Exception) -> int:
    """Tell a user's mistake on standard error; the exit code that it has. Anything else is raised again."""
    if not is_users(error):
        raise error
    print(f"error: {error}", file=sys.stderr)
    return 2
