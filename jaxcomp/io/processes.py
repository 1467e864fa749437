"""What the processes of a distributed run tell each other while they save together.

They use the key-value store of ``jax.distributed``: a collective on the devices would have to be
in order with those of the training that goes on meanwhile, and hangs where one process raised.
"""

import collections.abc
import itertools
import json
from typing import Any

import jax

from jaxcomp.io.arrays import CheckpointError

_TIMEOUT = 3600  # Seconds. Of a process that died jax.distributed tells much earlier.
_numbers = itertools.count()


class Together:
    """One call that all processes make, in the same order as their other such calls."""

    def __init__(self) -> None:
        """Takes the next number, the same on all processes."""
        self._key = f"jaxcomp/together/{next(_numbers)}"
        self.index, self.count = jax.process_index(), jax.process_count()

    @property
    def first(self) -> bool:
        """Whether this is the first process, which writes what belongs to all."""
        return self.index == 0

    def step(self, name: str, work: collections.abc.Callable[[], Any]) -> list[Any]:
        """Does work and waits for that of the others.

        Args:
          name: of the step.
          work: returns something JSON-able.

        Returns:
          What it returned on each process.

        Raises:
          CheckpointError: it failed on another process.
          BaseException: what it raised on this one, after the others were told.
        """
        try:
            told = {"value": work()}
        except BaseException as error:
            self._tell(name, {"error": f"{type(error).__name__}: {error}"})
            raise
        self._tell(name, told)
        return [
            told["value"] if index == self.index else self._hear(name, index)
            for index in range(self.count)
        ]

    def _tell(self, name: str, told: dict[str, Any]) -> None:
        if self.count > 1:
            _client().key_value_set(f"{self._key}/{name}/{self.index}", json.dumps(told))

    def _hear(self, name: str, index: int) -> Any:
        key = f"{self._key}/{name}/{index}"
        told = json.loads(_client().blocking_key_value_get(key, _TIMEOUT * 1000))
        if "error" in told:
            raise CheckpointError(f"process {index} could not save: {told['error']}")
        return told["value"]


def _client() -> Any:
    # JAX has no public way to it; orbax takes the same.
    from jax._src import distributed

    return distributed.global_state.client
