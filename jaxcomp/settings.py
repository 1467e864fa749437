"""Settings of an experiment: a small YAML file, with overrides from outside.

``python examples/qat.py steps=300 learning_rate=1.0e-3`` or, for a notebook, the environment
variable ``JAXCOMP_SETTINGS="steps=2"``.
"""

import os
import pathlib
import sys
import types
from collections.abc import Sequence

import msgspec

from jaxcomp.errors import DataError
from jaxcomp.rules import close_names

VARIABLE = "JAXCOMP_SETTINGS"


def read_settings(
    path: str | os.PathLike, arguments: Sequence[str] | None = None
) -> types.SimpleNamespace:
    """Reads settings from YAML and applies ``key=value`` overrides.

    Args:
      path: a file that holds a mapping; if it is not found as given, it is looked for in the folder
        that holds the library's repository.
      arguments: overrides, their values in YAML. None takes those of the environment variable
        JAXCOMP_SETTINGS (separated by spaces) and, unless a notebook runs, the command line's.

    Returns:
      The settings as attributes.

    Raises:
      DataError: the file is missing or no mapping, or an override is malformed or of no setting.

    Example:
      >>> import tempfile
      >>> file = pathlib.Path(tempfile.mkdtemp(), "s.yaml")
      >>> _ = file.write_text("steps: 100")
      >>> read_settings(file, ["steps=2"]).steps
      2
    """
    path = pathlib.Path(path)
    if not path.exists() and not path.is_absolute():
        path = pathlib.Path(__file__).parents[1] / path
    try:
        values = msgspec.yaml.decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"settings {path}: {error.strerror or error}.") from error
    except msgspec.DecodeError as error:
        raise DataError(f"settings {path}: not valid YAML: {error}.") from error
    if not isinstance(values, dict):
        raise DataError(f"settings {path}: must be a mapping of names to values.")
    if arguments is None:
        arguments = os.environ.get(VARIABLE, "").split()
        if "ipykernel" not in sys.modules and "pytest" not in sys.modules:
            arguments += sys.argv[1:]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise DataError(f"settings {path}: {argument!r} is no override; write name=value.")
        if key not in values:
            raise DataError(
                f"settings {path}: there is no {key!r}; the closest are "
                f"{', '.join(close_names(key, values))}."
            )
        where = f"settings {path}: {argument!r}"
        values[key] = _like(values[key], msgspec.yaml.decode(value), where)
    return types.SimpleNamespace(**values)


def _like(default: object, value: object, where: str) -> object:
    """An override in the type of the value it replaces; null may become anything."""
    if isinstance(default, float) and isinstance(value, (int, str)):
        try:
            return float(value)  # YAML reads 1e-3 as a string.
        except ValueError:
            pass
    if default is not None and value is not None and type(value) is not type(default):
        raise DataError(f"{where}: must be of type {type(default).__name__}, as {default!r}.")
    return value
