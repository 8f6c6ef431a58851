"""The one exception with which a stage of the build ends."""


class BuildError(Exception):
    """A stage failed. The text says what was found, where to look and what to do, in a few lines."""
