"""The error of a network that has no meaning on volumes."""


class LiftingError(RuntimeError):
    """An operation of a lifted 2D network that cannot be carried over to volumes.

    The message names the module path, the operation and the shapes.
    """
