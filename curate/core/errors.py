"""The one exception for bad input; every other one is a bug."""


class UserError(ValueError):
    """Bad input: the message says what was wrong, what would work and which setting to change.

    Commands print it as one sentence and exit with status 2; every other exception is a bug and keeps its traceback.
    """
