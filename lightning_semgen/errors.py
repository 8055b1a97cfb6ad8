"""The one error that a user can cause; the command prints it as one sentence."""


class UserError(ValueError):
    """What is wrong, where, and what to do."""
