"""Calibration inside a shard_map: each device sees its shard of the tokens, and all are summed."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxcomp import calibration
from jaxcomp.errors import JaxcompError
from jaxcomp.graph import _compat
from jaxcomp.graph.interpret import Plain, State, interpret
from jaxcomp.graph.program import Op
from jaxcomp.graph.sites import Site, to_tokens


def statistics(op: Op, values: Sequence[Any], state: State) -> State:
    """Adds one batch to the statistics of the sites of a shard_map.

    Sums run over all devices. Where tokens are replicated over a mesh axis they count once for each
    of its devices, which multiplies all sums alike and changes no decision.

    Args:
      op: an operation of kind "shard_map".
      values: its inputs, dense.
      state: site id -> statistics.

    Returns:
      The new statistics.

    Raises:
      JaxcompError: an input whose contracted axes are sharded in a way that cannot be gathered.
    """
    (body,) = op.bodies
    axes = frozenset(op.eqn.params.get("newly_manual_axes", op.eqn.params["mesh"].axis_names))
    specs = {
        body.weights[i][0]: spec
        for i, spec in zip(body.inputs, op.eqn.params["in_specs"], strict=True)
        if i in body.weights
    }
    handler = _Gather(specs, state)

    def run(*values):
        handler.found = {}
        interpret(body, list(values), handler, {})
        return {
            i: _reduced(jax.tree.map(lambda v: _compat.vary_over(v, axes), s), tuple(sorted(axes)))
            for i, s in handler.found.items()
        }

    out_specs = {i: jax.tree.map(lambda _: P(), s) for i, s in state.items()}
    seen = _compat.shard_map(op.eqn, run, out_specs)(*values)
    return {i: calibration.merge(state[i], seen[i]) for i in state}


def _reduced(s: calibration.Statistics, axes: tuple) -> calibration.Statistics:
    low = {"minimum": jax.lax.pmin, "maximum": jax.lax.pmax, "absmax": jax.lax.pmax}
    return calibration.Statistics(
        **{
            name: None if value is None else low.get(name, jax.lax.psum)(value, axes)
            for name, value in s._asdict().items()
        }
    )


class _Gather(Plain):
    """Takes statistics of each site's shard of the input."""

    def __init__(self, specs: dict[str, Any], state: State):
        self.specs, self.state = specs, state
        self.found: State = {}

    def site(self, op, operands, leaf, state):
        """Evaluates the site as it stands and notes its input."""
        site = op.site
        if site.id in self.state:
            if site.kind != "dot_general":
                raise JaxcompError(
                    f"{site.path}: a {site.kind} inside a shard_map cannot be calibrated; use a "
                    "recipe without calibration for it, or exclude this path"
                )
            x = to_tokens(op.eqn, site, operands[1 - site.operand])
            x = _whole(site, x, self.specs[site.path])
            fill = {"minimum": jnp.inf, "maximum": -jnp.inf}
            start = calibration.Statistics(
                **{
                    name: None if v is None else jnp.full(v.shape, fill.get(name, 0.0), v.dtype)
                    for name, v in self.state[site.id]._asdict().items()
                }
            )
            self.found[site.id] = calibration.update(start, x)
        return super().site(op, operands, leaf, state)


def _whole(site: Site, x: jax.Array, spec: Any) -> jax.Array:
    """Input channels gathered from the devices that share them out."""
    spec = tuple(spec) + (None,) * (len(site.layout.leaf_shape) - len(spec))
    if any(spec[a] is not None for a in site.layout.stack_axes):
        raise JaxcompError(
            f"{site.path}: its stack axes are sharded inside a shard_map and cannot be calibrated "
            "there; use a recipe without calibration for it, or exclude this path"
        )
    split = [a for a in site.layout.in_axes if spec[a] is not None]
    if not split:
        return x
    if len(site.layout.in_axes) > 1 and split != [site.layout.in_axes[0]]:
        raise JaxcompError(
            f"{site.path}: only the first of several contracted axes may be sharded inside a "
            f"shard_map for calibration, got {spec}; exclude this path"
        )
    return jax.lax.all_gather(x, spec[split[0]], axis=x.ndim - 1, tiled=True)
