"""Errors that a user can act on."""


class JaxcompError(ValueError):
    """Wrong input or use: the message says what, where, which rule, and what to do."""


class RecipeError(JaxcompError):
    """A recipe that cannot be parsed, or that does not fit the model."""


class ModelError(JaxcompError):
    """A model folder, checkpoint or configuration that cannot be read."""


class DataError(JaxcompError):
    """Calibration or evaluation data that cannot be used."""


class OutOfMemoryError(JaxcompError):
    """More memory was asked for than there is: which weight, how much, and what to change."""
