"""The one exception whose message is meant for the user."""


class UserError(Exception):
    """Something the user has to fix: one line that names the file, the record, what is wrong and
    what to do."""


class NotServedError(UserError):
    """A source of data cannot serve a task."""


def first_line(error: BaseException) -> str:
    """The type and the first line of an error, for the inside of a UserError."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
