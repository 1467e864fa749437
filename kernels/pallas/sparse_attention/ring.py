"""Attention of a sequence that is split over devices: keys and values go round in a ring.

Each device holds some consecutive queries, and the keys and values of the same positions. In step t
it has those of the device t before it, attends to them, and passes them on. What the steps find is
merged by log-sum-exps:

    lse = log sum_t exp(lse_t),   out = sum_t exp(lse_t - lse) out_t

so no device ever holds more than two parts of the keys. Backward they go round once more, and their
gradients with them; a step's attention is computed again from

    d_out_t = w_t d_out,   d_lse_t = w_t (d_lse + d_out . (out_t - out)),   w_t = exp(lse_t - lse).

What a mask leaves of each pair of parts is known before: nothing is computed for an empty pair, and
the ring stops where no device needs a further part.

Source: Liu et al., Ring Attention, arXiv 2310.01889. Differs from the paper in: 1. masks are any,
and decide which pairs are computed; 2. no overlap is written out, it is left to the compiler.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxcomp.kernels.sparse_attention.rules import Mask, full
from jaxcomp.kernels.sparse_attention.shifts import is_empty, part

# (q, {"k", "v", ..}, fixed operands, mask) -> (out, lse) on one device.
Local = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which attention each device computes in each step.

    Attributes:
      axis: the mesh axis that splits the sequence.
      masks: the different ones that pairs of parts have; the first is empty.
      which: int (devices, steps), the mask of a device in a step, an index of ``masks``.
    """

    axis: str
    masks: tuple[Mask, ...]
    which: np.ndarray

    @property
    def devices(self) -> int:
        """Devices in the ring."""
        return self.which.shape[0]

    @property
    def steps(self) -> int:
        """Parts of the keys that a device sees, its own included."""
        return self.which.shape[1]


def plan(mask: Mask, axis: str, devices: int, queries: int, keys: int) -> Plan:
    """Finds what a mask leaves of each pair of parts.

    Args:
      mask: of the whole sequence.
      axis: the mesh axis.
      devices: of it.
      queries: of the whole sequence, a multiple of ``devices``.
      keys: likewise.

    Returns:
      The plan.

    Example:
      >>> from jaxcomp.kernels.sparse_attention import causal, window
      >>> plan(causal(), "x", 4, 512, 512).which.tolist()
      [[1, 0, 0, 0], [1, 2, 0, 0], [1, 2, 2, 0], [1, 2, 2, 2]]
      >>> plan(window(100, causal=True), "x", 4, 512, 512).steps
      2
    """
    mask = mask.bind(queries, keys)
    q_size, k_size = queries // devices, keys // devices
    masks: dict[Mask, int] = {}
    which = np.zeros((devices, devices), np.int32)
    for device in range(devices):
        for step in range(devices):
            other = (device - step) % devices
            here = part(mask, (device * q_size, q_size), (other * k_size, k_size))
            if not is_empty(here):
                which[device, step] = masks.setdefault(here, len(masks) + 1)
    needed = np.nonzero(which.any(axis=0))[0]
    steps = int(needed.max(initial=0)) + 1
    return Plan(axis, (~full(), *masks), which[:, :steps])


def attention(
    local: Local,
    plan: Plan,
    q: jax.Array,
    moving: dict[str, jax.Array],
    fixed: dict[str, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Attention of a device's queries to the keys of all devices, inside a shard_map.

    Args:
      local: attention of queries to keys that are both at hand.
      plan: the same for all devices.
      q: the device's queries (batch, queries, heads, head_dim).
      moving: what belongs to keys: "k", "v", and what else has their positions.
      fixed: what belongs to queries.

    Returns:
      Outputs (batch, queries, heads, value_dim) of q's dtype, and float32 log-sum-exps (batch,
      heads, queries), -inf for a query that looks at nothing.
    """
    # Quantized keys and values are constants.
    names = () if "k_scale" in moving else ("k", "v")
    trained = {name: moving[name] for name in names}
    rest = {name: x for name, x in moving.items() if name not in names}
    return _ring(local, plan, q, trained, rest, fixed)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring(local, plan, q, trained, rest, fixed):
    def add(step, moving, sums):
        out, lse = _pair(local, plan, step, q, moving["trained"], moving["rest"], fixed)
        top, total, summed = sums
        after = jnp.maximum(top, lse)
        fade, weight = share(top, after), share(lse, after)
        summed = summed * by_query(fade) + out * by_query(weight)
        return after, total * fade + weight, summed

    shape = (q.shape[0], q.shape[2], q.shape[1])
    sums = (
        jnp.full(shape, -jnp.inf, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*q.shape[:3], (trained | rest)["v"].shape[-1]), jnp.float32),
    )
    moving = {"trained": trained, "rest": rest}
    sums = add(0, moving, sums)

    def advance(carry, step):
        moving, sums = carry
        moving = _shift(plan, moving)
        return (moving, add(step, moving, sums)), None

    (_, sums), _ = jax.lax.scan(advance, (moving, sums), jnp.arange(1, plan.steps))
    top, total, summed = sums
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
    return (summed / by_query(safe)).astype(q.dtype), lse


def _forward(local, plan, q, trained, rest, fixed):
    out, lse = _ring(local, plan, q, trained, rest, fixed)
    return (out, lse), (q, trained, rest, fixed, out, lse)


def _backward(local, plan, saved, cotangents):
    q, trained, rest, fixed, out, lse = saved
    d_out, d_lse = (x.astype(jnp.float32) for x in cotangents)
    d_lse = jnp.where(jnp.isneginf(lse), 0.0, d_lse)

    def add(step, moving, dq, gradients):
        def pair(q, trained):
            return _pair(local, plan, step, q, trained, moving["rest"], fixed)

        (out_t, lse_t), pullback = jax.vjp(pair, q, moving["trained"])
        weight = share(lse_t, lse)
        apart = jnp.einsum("bqhd,bqhd->bhq", d_out, out_t - out.astype(jnp.float32))
        d_pair = d_out * by_query(weight), weight * (d_lse + apart)
        more = pullback(d_pair)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), (dq, gradients), more)

    moving = {"trained": trained, "rest": rest}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (q, trained))
    dq, gradients = add(0, moving, *zeros)

    def advance(carry, step):
        moving, dq, gradients = carry
        moving, gradients = _shift(plan, (moving, gradients))
        return (moving, *add(step, moving, dq, gradients)), None

    carry = (moving, dq, gradients)
    (_, dq, gradients), _ = jax.lax.scan(advance, carry, jnp.arange(1, plan.steps))
    # The gradients are where the last step's keys are, and belong to where those came from.
    gradients = _shift(plan, gradients, 1 - plan.steps)
    dq, gradients = jax.tree.map(lambda a, b: a.astype(b.dtype), (dq, gradients), (q, trained))
    return dq, gradients, *(jax.tree.map(_nothing, x) for x in (rest, fixed))


_ring.defvjp(_forward, _backward)


def _pair(local, plan, step, q, trained, rest, fixed):
    """A step's outputs and log-sum-exps in float32.

    ``step`` is 0, or traced and any later one: the step of a device's own keys has masks that no
    other has, and only what is needed is compiled.
    """
    steps = plan.which[:, :1] if isinstance(step, int) else plan.which[:, 1:]
    needed, which = np.unique(steps, return_inverse=True)

    def empty(q, trained):
        out = jnp.zeros((*q.shape[:3], (trained | rest)["v"].shape[-1]), jnp.float32)
        return out, jnp.full((q.shape[0], q.shape[2], q.shape[1]), -jnp.inf, jnp.float32)

    def masked(mask, q, trained):
        out, lse = local(q, trained | rest, fixed, mask)
        return out.astype(jnp.float32), lse.astype(jnp.float32)

    branches = [functools.partial(masked, plan.masks[i]) if i else empty for i in needed]
    branches = branches or [empty]  # There is no later step.
    if len(branches) == 1:
        return branches[0](q, trained)
    which = jnp.asarray(which.reshape(steps.shape), jnp.int32)
    at = jax.lax.axis_index(plan.axis), 0 if isinstance(step, int) else step - 1
    return jax.lax.switch(which[at], branches, q, trained)


def share(lse: jax.Array, of: jax.Array) -> jax.Array:
    """exp(lse - of), and 0 where nothing was allowed: there both may be -inf."""
    none = jnp.isneginf(lse)
    return jnp.where(none, 0.0, jnp.exp(jnp.where(none, 0.0, lse - of)))


def by_query(x: jax.Array) -> jax.Array:
    """(batch, heads, queries) beside (batch, queries, heads, dim)."""
    return jnp.moveaxis(x, 1, 2)[..., None]


def _shift(plan: Plan, tree, by: int = 1):
    """Passes arrays on to the device so many places further on."""
    if by % plan.devices == 0:
        return tree
    pairs = [(device, (device + by) % plan.devices) for device in range(plan.devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, plan.axis, pairs), tree)


def _nothing(x: jax.Array):
    """The cotangent of what has none: ids, and scales of codes."""
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.zeros_like(x)
    return np.zeros(x.shape, jax.dtypes.float0)
