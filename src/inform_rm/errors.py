"""The one exception type that means "the caller can mend this"."""


class InputError(ValueError):
    """Wrong use or bad input: the message names the argument or file, the value, the rule and the way out.

    The command line prints the message without a traceback and exits with code 2. Every other exception is a failure
    while running (exit code 1).
    """
