"""What the processes of a distributed run tell each other outside of their computations.

They use the key-value store of ``jax.distributed``: a collective on the devices would have to be
in order with those of the computations that go on meanwhile, and hangs where one process raised.
"""

import collections
import collections.abc
import itertools
import json
from typing import Any

import jax

from jaxcomp.errors import JaxcompError

_TIMEOUT = 3600  # Seconds. Of a process that died jax.distributed tells much earlier.
# How many calls each set of processes has made together.
_numbers: dict[tuple[int, ...], Any] = collections.defaultdict(itertools.count)


class Together:
    """One call that several processes make, in the same order as their other such calls.

    Attributes:
      processes: those that take part, ascending.
      index: this process.
    """

    def __init__(
        self,
        doing: str,
        processes: collections.abc.Sequence[int] | None = None,
        error: type[JaxcompError] = JaxcompError,
    ) -> None:
        """Takes the next number, the same on all processes.

        Args:
          doing: what they do, for errors: "process 3 could not ``doing``".
          processes: who takes part, None for all.
          error: what ``step`` raises where another process failed.
        """
        self.index = jax.process_index()
        self.processes = tuple(range(jax.process_count()) if processes is None else processes)
        who = "-".join(map(str, self.processes))
        self._key = f"jaxcomp/together/{who}/{next(_numbers[self.processes])}"
        self._doing, self._error = doing, error

    @property
    def rank(self) -> int:
        """This process's position among those that take part."""
        return self.processes.index(self.index)

    @property
    def first(self) -> bool:
        """Whether this is the first process, which writes what belongs to all."""
        return self.index == self.processes[0]

    def step(self, name: str, work: collections.abc.Callable[[], Any]) -> list[Any]:
        """Does work and waits for that of the others.

        Args:
          name: of the step, another for each of a call.
          work: returns something JSON-able.

        Returns:
          What it returned on each process, in the order of ``processes``.

        Raises:
          JaxcompError: it failed on another process.
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
            for index in self.processes
        ]

    def _tell(self, name: str, told: dict[str, Any]) -> None:
        if len(self.processes) > 1:
            _client().key_value_set(f"{self._key}/{name}/{self.index}", json.dumps(told))

    def _hear(self, name: str, index: int) -> Any:
        key = f"{self._key}/{name}/{index}"
        told = json.loads(_client().blocking_key_value_get(key, _TIMEOUT * 1000))
        if "error" in told:
            raise self._error(f"process {index} could not {self._doing}: {told['error']}")
        return told["value"]


def told(
    doing: str, processes: collections.abc.Sequence[int], work: collections.abc.Callable[[], Any]
) -> Any:
    """Does work that needs no other process; where it fails on one, all others hear of it.

    Else they would wait in their next exchange for what never comes, until the process ends.

    Args:
      doing: as of ``Together``.
      processes: those that each do such work.
      work: what this one does.

    Returns:
      What it returned here.

    Raises:
      JaxcompError: it failed on another process.
      BaseException: what it raised on this one.
    """
    found: list[Any] = []
    Together(doing, processes).step("work", lambda: found.append(work()))
    return found[0]


def _client() -> Any:
    # JAX has no public way to it; orbax takes the same.
    from jax._src import distributed

    return distributed.global_state.client
