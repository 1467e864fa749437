"""L0 gates on the units of a model: hard-concrete gates as functions over parameter trees.

Each unit u of a group has a gate z_u that multiplies the slice of the weight that reads it. In
training z_u is sampled; at test time it is a fixed number, zero for closed units (hard_concrete.py
has the distribution). With n_u parameters behind unit u,

    E[parameters that stay] = sum over parameters of prod over their gates of P(z_u != 0)
                            = sum n_u P(z_u != 0)      where each has one gate
    sparsity = 1 - E[parameters that stay] / parameters behind any gate

so a head in a layer that has a gate of its own stays when both are open, as in CoFi.

    l0 = gates(groups)
    log_alpha = l0.init(key)
    loss = task(l0.apply(params, log_alpha, key), batch)
    loss += lagrange.penalty(multipliers, l0.expected_sparsity(log_alpha), step)
    small = l0.remove(params, log_alpha)

Differs from the paper in: gates multiply the consumer's weight instead of its input, which is the
same product for linear consumers; one sample of the gates serves the whole batch, not one example.

Source: Louizos, Welling, Kingma, https://arxiv.org/abs/1712.01312; CoFi,
https://arxiv.org/abs/2204.00408; head importance: Michel, Levy, Neubig,
https://arxiv.org/abs/1905.10650.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcomp.errors import JaxcompError
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.graph.units import Member, UnitGroup
from jaxcomp.pruning import hard_concrete, importance, removal, structured
from jaxcomp.pruning.masks import check_sparsity

LogAlpha = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class L0Gates:
    """Hard-concrete gates on groups of units; all methods are pure functions.

    Attributes:
      groups: the units.
      beta: temperature.
      gamma: lower end of the stretched interval.
      zeta: upper end of the stretched interval.
    """

    groups: tuple[UnitGroup, ...]
    beta: float = hard_concrete.BETA
    gamma: float = hard_concrete.GAMMA
    zeta: float = hard_concrete.ZETA

    def init(
        self, key: jax.Array, drop_rate: float = 0.5, scale: float = 0.01, dtype: Any = jnp.float32
    ) -> LogAlpha:
        """Draws the gates' parameters.

        Args:
          key: PRNG key.
          drop_rate: sigmoid(log_alpha) starts at one minus this.
          scale: standard deviation of log_alpha.
          dtype: dtype of log_alpha.

        Returns:
          ``{group.name: log_alpha (*stack, count)}``.
        """
        keys = jax.random.split(key, len(self.groups))
        return {
            g.name: hard_concrete.init(k, g.shape, drop_rate, scale, dtype)
            for g, k in zip(self.groups, keys, strict=True)
        }

    def gates(self, log_alpha: Mapping[str, Any], key: jax.Array | None = None) -> LogAlpha:
        """The gates: sampled with a key, those of test time without.

        Args:
          log_alpha: from ``init``.
          key: PRNG key, or None.

        Returns:
          ``{group.name: (*stack, count)}`` from 0 to 1.
        """
        log_alpha = self._checked(log_alpha)
        if key is None:
            return {n: hard_concrete.gate(a, self.gamma, self.zeta) for n, a in log_alpha.items()}
        keys = jax.random.split(key, len(self.groups))
        constants = self.beta, self.gamma, self.zeta
        return {
            n: hard_concrete.sample(k, a, *constants)
            for (n, a), k in zip(log_alpha.items(), keys, strict=True)
        }

    def apply(self, params: Any, log_alpha: Mapping[str, Any], key: jax.Array | None = None) -> Any:
        """The parameters with gates on the consumers of all units.

        Args:
          params: parameter tree.
          log_alpha: from ``init``.
          key: PRNG key for sampled gates; None for those of test time.

        Returns:
          A tree like ``params``.
        """
        return structured.apply_gates(params, self.groups, self.gates(log_alpha, key))

    def penalty(self, log_alpha: Mapping[str, Any]) -> jax.Array:
        """The expected number of parameters that stay; times a price it is added to the loss.

        Args:
          log_alpha: from ``init``.

        Returns:
          Scalar, at least float32.
        """
        constants = self.beta, self.gamma, self.zeta
        opened = {
            n: hard_concrete.prob_nonzero(a, *constants)
            for n, a in self._checked(log_alpha).items()
        }
        return sum(_alive(parts, opened) for parts in _by_leaf(self.groups).values())

    def expected_sparsity(self, log_alpha: Mapping[str, Any]) -> jax.Array:
        """The expected fraction that goes of the parameters behind any gate.

        Args:
          log_alpha: from ``init``.

        Returns:
          Scalar from 0 to 1.
        """
        return 1 - self.penalty(log_alpha) / self.size

    @property
    def size(self) -> int:
        """Number of parameters behind any gate."""
        return sum(_covered(parts) for parts in _by_leaf(self.groups).values())

    def target(self, sparsity: float, params: Any = None) -> float:
        """Checks that a sparsity can be reached, and says what ``expected_sparsity`` then is.

        Args:
          sparsity: fraction of parameters to remove, 0 to 1.
          params: if given, the fraction is of all parameters in this tree; otherwise of those
            behind the gates.

        Returns:
          The sparsity of the parameters behind the gates, for a Lagrangian's target.

        Raises:
          JaxcompError: more would have to go than is behind the gates.
        """
        check_sparsity(sparsity)
        if params is None:
            return sparsity
        total = sum(math.prod(leaf.shape) for _, leaf in leaf_paths(params)[0])
        if sparsity * total > self.size:
            raise JaxcompError(
                f"target sparsity {sparsity} of {total} parameters cannot be reached: only "
                f"{self.size} are behind the gates of {len(self.groups)} groups, a sparsity of "
                f"{self.size / total:.4g} when all are closed; lower the target or gate more units"
            )
        return sparsity * total / self.size

    def masks(self, log_alpha: Mapping[str, Any]) -> dict[str, jax.Array]:
        """Which units are open at test time.

        Args:
          log_alpha: from ``init``.

        Returns:
          ``{group.name: (*stack, count)}`` bool.
        """
        return {name: gate > 0 for name, gate in self.gates(log_alpha).items()}

    def remove(self, params: Any, log_alpha: Mapping[str, Any], *, pad: bool = False) -> Any:
        """The smaller model: test-time gates folded into the consumers, closed units cut out.

        Args:
          params: parameter tree of arrays.
          log_alpha: from ``init``; concrete.
          pad: as of ``removal.remove``, for stacked layers that keep different numbers.

        Returns:
          Smaller parameters of the same function.

        Raises:
          JaxcompError: as ``removal.remove``.
        """
        folded = self.apply(params, log_alpha)
        return removal.remove(folded, self.groups, self.masks(log_alpha), pad=pad)

    def _checked(self, log_alpha):
        found = structured.checked(self.groups, log_alpha, "log_alpha")
        missing = [g.name for g in self.groups if g.name not in found]
        if missing:
            raise JaxcompError(f"log_alpha has no {', '.join(missing)}; pass what init returned")
        return found


def gates(
    groups: Sequence[UnitGroup],
    beta: float = hard_concrete.BETA,
    gamma: float = hard_concrete.GAMMA,
    zeta: float = hard_concrete.ZETA,
) -> L0Gates:
    """Hard-concrete L0 gates on units of any kind, layers over heads over weights alike.

    Args:
      groups: from ``units``; those of several calls may be joined.
      beta: temperature.
      gamma: lower end of the stretched interval, below 0.
      zeta: upper end of the stretched interval, above 1.

    Returns:
      The pair ``init`` and ``apply``, with the penalty and what is done at the end.

    Raises:
      JaxcompError: there are no groups, two have one name, or the constants give no gate.

    Example:
      >>> params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
      >>> groups = structured.units(lambda p, x: x @ p["up"] @ p["down"], params,
      ...                           jnp.ones((2, 4)), include="down")
      >>> l0 = gates(groups)
      >>> log_alpha = {"down:neuron": jnp.array([9.0, -9.0, 9.0, -9.0, 9.0, -9.0])}
      >>> jax.tree.map(jnp.shape, l0.remove(params, log_alpha))
      {'down': (3, 4), 'up': (4, 3)}
      >>> round(float(l0.expected_sparsity(log_alpha)), 3)
      0.5
    """
    if not groups:
        raise JaxcompError("there are no units to gate; pass what units returned")
    if len({g.name for g in groups}) != len(groups):
        raise JaxcompError("two groups have the same name; pass each group once")
    hard_concrete.prob_zero(jnp.zeros(()), beta, gamma, zeta)
    return L0Gates(tuple(groups), beta, gamma, zeta)


_Parts = list[tuple[UnitGroup, Member]]


def _by_leaf(groups: Sequence[UnitGroup]) -> dict[str, _Parts]:
    found: dict[str, _Parts] = {}
    for group in groups:
        for member in group.members:
            found.setdefault(member.path, []).append((group, member))
    return found


def _nested(parts: _Parts) -> bool:
    return len({group.name for group, _ in parts}) > 1


def _cover(parts: _Parts) -> np.ndarray:
    """Which positions of a leaf are behind a gate, on the axes that tell."""
    covered = np.zeros((1,) * len(parts[0][1].shape), bool)
    for group, m in parts:
        line = np.zeros(m.length, bool)
        line[m.offset : m.offset + m.repeats * group.count * m.block] = True
        line = line.reshape([m.shape[a] for a in m.axes])
        line = line.transpose([m.axes.index(a) for a in sorted(m.axes)])
        covered = covered | np.expand_dims(
            line, [a for a in range(len(m.shape)) if a not in m.axes]
        )
    return covered


def _covered(parts: _Parts) -> int:
    if not _nested(parts):
        return sum(math.prod(g.shape) * m.unit_size for g, m in parts)
    covered = _cover(parts)
    return int(covered.sum()) * (math.prod(parts[0][1].shape) // covered.size)


def _alive(parts: _Parts, opened: Mapping[str, jax.Array]) -> jax.Array:
    """Expected number of a leaf's gated parameters that stay."""
    if not _nested(parts):
        return sum(opened[g.name].sum() * m.unit_size for g, m in parts)
    both = jnp.asarray(_cover(parts))
    for group, member in parts:
        both = both * structured.spread(group, member, opened[group.name])
    return both.sum() * (math.prod(parts[0][1].shape) // both.size)


def unit_importance(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    groups: Sequence[UnitGroup],
    batch: Any,
    *,
    normalize: bool = True,
    example_weights: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Michel's importance of units: the mean over examples of |dL/dgate| at open gates.

    Args:
      loss: ``loss(params, batch) -> scalar``, the mean over a batch; it is called with each example
        as a batch of one.
      params: parameter tree.
      groups: from ``units``.
      batch: pytree of arrays with a leading axis of examples.
      normalize: divide each layer's scores by their l2 norm.
      example_weights: ``(examples,)``, 0 for padding examples.

    Returns:
      ``{group.name: (*stack, count)}``, for ``prune``.

    Example:
      >>> params = {"up": jnp.ones((1, 2)), "down": jnp.array([[1.0], [0.0]])}
      >>> apply = lambda p, x: x @ p["up"] @ p["down"]
      >>> groups = structured.units(apply, params, jnp.ones((1, 1)), include="down")
      >>> loss = lambda p, x: apply(p, x).mean()
      >>> batch = jnp.array([[2.0], [-2.0]])  # their mean gradient is zero
      >>> unit_importance(loss, params, groups, batch, normalize=False)["down:neuron"].tolist()
      [2.0, 0.0]

    Source: https://arxiv.org/abs/1905.10650, equation 2.
    """

    def gated(gates, example):
        example = jax.tree.map(lambda a: a[None], example)
        return loss(structured.apply_gates(params, groups, gates), example)

    wide = jnp.result_type(jnp.float32, *(v.dtype for v in jax.tree.leaves(params)))
    ones = {g.name: jnp.ones(g.shape, wide) for g in groups}
    return importance.head_importance(
        gated, ones, batch, normalize=normalize, example_weights=example_weights
    )
