"""The one exception that stands for a user's mistake."""


class UsageError(ValueError):
    """Something the user gave can't be used.

    Its text is one line: what was found, what is accepted, what to do. Uncaught, it ends the job
    with that line and exit code 2 instead of a traceback.
    """
