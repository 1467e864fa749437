"""What an algorithm sees: one weight at a time, its statistics, and the steps of a recipe.

A recipe is a tuple of steps. A step is a frozen config (``Step`` and its subclasses, one beside
each algorithm); ``run(step, layers)`` is the algorithm, found by the step's type. The layers
handed to it read the same input (an input group: q, k and v of an attention), so that a transform
of the input can be shared among them. Nothing here knows a model or a graph.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import msgspec
import numpy as np

from jaxcomp.calibration import Statistics


class Step(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="algorithm"
):
    """One algorithm of a recipe, with the weights it applies to.

    Attributes:
      include: globs over weight paths (``re:`` for a regular expression) that the step applies to.
      exclude: globs that it leaves alone, stronger than ``include``.
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def needs(self) -> frozenset[str]:
        """What the algorithm reads, out of {hessian, absmax, absmean, sumsq, range}."""
        return frozenset()

    def by_matrix(self) -> bool:
        """Whether each matrix of a stack is treated as if it were alone, so that it can be."""
        return False

    def overwrites_hessian(self) -> bool:
        """Whether the algorithm takes a Hessian that is yet to be summed, to compute in its place.

        Then it may get ``calibration.Unsummed``, on one CPU, if no other step sees the layers.
        """
        return False


class Activation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the input of a matmul is quantized when the model runs.

    Attributes:
      format: the element type, "int8", "int4", "e4m3" or "e5m2".
      granularity: one scale a token, or one for the whole tensor.
      dynamic: scales computed at each call, or frozen from calibration (``granularity="tensor"``
        only).
      symmetric: without a zero point, or (int only, static or dynamic) with one.
    """

    format: Literal["int8", "int4", "e4m3", "e5m2"] = "int8"
    granularity: Literal["token", "tensor"] = "token"
    dynamic: bool = True
    symmetric: bool = True


class Error(float):
    """A relative error that knows relative to what, so that those of slices make one.

    Attributes:
      lost: squared, the error itself.
      whole: squared, what it is relative to.
    """

    lost: float
    whole: float

    @classmethod
    def of(cls, lost: float, whole: float) -> "Error":
        """The root of ``lost / whole``, of ``lost`` where the whole is nothing.

        Example:
          >>> Error.of_all([Error.of(1.0, 3.0), Error.of(0.0, 1.0)])
          0.5
        """
        error = cls(math.sqrt(max(lost, 0.0) / (whole if whole > 0 else 1.0)))
        error.lost, error.whole = lost, whole
        return error

    @classmethod
    def of_all(cls, errors: Sequence["Error"]) -> "Error":
        """That of several together."""
        return cls.of(sum(e.lost for e in errors), sum(e.whole for e in errors))


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A matrix that is made each time it is asked for, and by whoever asked let go.

    Attributes:
      read: makes it, always the same.
      shape: its shape.
      stored: the same values in the dtype in which they are stored, a view of host memory, where
        there is one.
    """

    read: Callable[[], jax.Array]
    shape: tuple[int, ...]
    stored: np.ndarray | None = None


class _Weight:
    """The field of a layer that gives an array where it was set to a ``Deferred``."""

    def __get__(self, layer: Any, owner: Any = None) -> jax.Array:
        if layer is None:  # The class has no default.
            raise AttributeError("weight")
        held = layer.held_weight
        return held.read() if isinstance(held, Deferred) else held

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)["weight"] = value


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight on its way through the steps of a recipe.

    Attributes:
      path: name of the weight, for errors.
      weight: ``(*stack, out, in)`` float, what the next step is to approximate. Earlier steps have
        already changed it: multiplied by a smoothing scale, zeroed by a mask. Where it was given as
        a ``Deferred``, each access reads it anew, so that of an input group only that weight is in
        memory which is computed with.
      statistics: of this layer's input, leaves with the same leading ``stack``; None when the
        recipe needs none. Already transformed by ``input_scale``.
      mask: bool ``(*stack, out, in)``, True where a pruning step kept the weight. Later steps keep
        it.
      input_scale: ``(*stack, in)``: the layer's input is to be multiplied by it (``weight`` has
        been divided by it), the same for all layers of the group. None means one everywhere.
      parts: the compressed weight so far as a tuple of format parts approximating ``weight``
        (without ``input_scale``), or None before any step made one.
      activation: how the input is to be quantized at run time, set with ``parts``.
      original_dtype: dtype of the dense leaf.
      metrics: numbers for the report (for instance {"error": relative output error}).
      is_last: whether no further step sees the layer: then its parts are all that is read of it,
        and nothing else need stay in memory.
    """

    path: str
    weight: jax.Array = _Weight()
    statistics: Statistics | None = None
    mask: jax.Array | None = None
    input_scale: jax.Array | None = None
    parts: tuple[Any, ...] | None = None
    activation: Any = None
    original_dtype: Any = None
    metrics: dict = dataclasses.field(default_factory=dict)
    is_last: bool = False

    def replace(self, **changes) -> "Layer":
        """Returns a copy with some fields replaced."""
        return dataclasses.replace(self, **{"weight": self.held_weight, **changes})

    @property
    def held_weight(self) -> Any:
        """The weight, or the ``Deferred`` that makes it."""
        return vars(self)["weight"]

    @property
    def stored_weight(self) -> Any:
        """The weight in any float dtype, if that spares a copy: for who converts it by rows."""
        held = self.held_weight
        return self.weight if getattr(held, "stored", None) is None else held.stored

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*stack, out, in)``."""
        return tuple(self.held_weight.shape)

    def map_weight(self, function: Callable[[jax.Array], jax.Array]) -> "Layer":
        """The layer with a function of its weight, which keeps the shape.

        Args:
          function: is given the weight, in the dtype in which it is stored if that spares a copy.

        Returns:
          The layer.
        """
        held = self.held_weight
        if not isinstance(held, Deferred):
            return self.replace(weight=function(held))
        read = held.read if held.stored is None else lambda: held.stored
        return self.replace(weight=Deferred(lambda: function(read()), held.shape))


@functools.singledispatch
def run(step: Step, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Applies one step to the layers of one input group.

    Args:
      step: the algorithm's config; its type chooses the algorithm.
      layers: layers that read the same input and that the step's rules name, at least one.

    Returns:
      The same layers in the same order, changed.
    """
    raise NotImplementedError(f"no algorithm is defined for a step of type {type(step).__name__}")
