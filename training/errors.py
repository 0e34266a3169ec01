"""The root of the errors a user can mend."""


class TrainingError(ValueError):
    """Names what was given, what is allowed and what to do; the command line prints it and exits with 2."""
