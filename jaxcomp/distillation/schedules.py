"""How much the teacher counts, step by step, and a teacher that is the student's own average.

    annealed_weight   linear from ``initial`` to ``peak`` in the warm-up, then linear to ``end``

    EMA teacher       m_0 = p_0,  m_t = d m_{t-1} + (1 - d) p_t
    debiased          m_t = d m_{t-1} + (1 - d) p_t from m = 0,  teacher = m_t / (1 - d^(t + 1))

Both start with the student itself as teacher. FitNets anneals the weight of the teacher; mean
teachers, BYOL and self-distillation in general use the average. Born-again training needs no
helper: the trained student's parameters are the next teacher's.

Source: FitNets https://arxiv.org/abs/1412.6550; mean teachers https://arxiv.org/abs/1703.01780;
born-again networks https://arxiv.org/abs/1805.04770.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcomp.errors import JaxcompError


def annealed_weight(
    peak: float,
    end: float,
    steps: int,
    warmup_steps: int = 0,
    initial: float = 0.0,
) -> optax.Schedule:
    """Weight of the teacher's loss: a linear warm-up to the peak, then linear to the end.

    Args:
      peak: weight after the warm-up; at step 0 if there is none.
      end: weight from step ``steps`` on.
      steps: number of steps, the warm-up counted.
      warmup_steps: steps of the warm-up.
      initial: weight at step 0 of a warm-up.

    Returns:
      A schedule: step to weight.

    Raises:
      JaxcompError: the schedule is shorter than its warm-up, or a number is out of its range.

    Example:
      >>> weight = annealed_weight(1.0, 0.5, steps=30, warmup_steps=10)
      >>> [float(weight(step)) for step in (0, 5, 10, 20, 30, 40)]
      [0.0, 0.5, 1.0, 0.75, 0.5, 0.5]
    """
    if warmup_steps < 0 or steps < 1:
        raise JaxcompError(
            f"steps {steps} must be at least 1 and warmup_steps {warmup_steps} at least 0"
        )
    if steps < warmup_steps:
        raise JaxcompError(
            f"a schedule of {steps} steps is shorter than its warm-up of {warmup_steps}; lengthen "
            "the one or shorten the other"
        )
    if min(peak, end, initial) < 0:
        raise JaxcompError(f"weights {peak}, {end} and {initial} must not be negative")
    if steps == warmup_steps:
        parts = [optax.linear_schedule(initial, peak, warmup_steps), optax.constant_schedule(end)]
        return optax.join_schedules(parts, [steps])
    fall = optax.linear_schedule(peak, end, steps - warmup_steps)
    if not warmup_steps:
        return fall
    rise = optax.linear_schedule(initial, peak, warmup_steps)
    return optax.join_schedules([rise, fall], [warmup_steps])


class EMAState(NamedTuple):
    """What an EMA teacher carries.

    Attributes:
      average: the running average, float32 at least.
      count: number of parameters averaged, int32.
    """

    average: Any
    count: jax.Array


class EMATeacher(NamedTuple):
    """A teacher that is the student's exponential moving average: pure functions.

    Attributes:
      init: ``params -> state``.
      update: ``(params, state) -> state``, after each step of the student.
      params: ``(state, like=None) -> params`` of the teacher; with the dtypes of ``like``, such as
        the student's, if given.
    """

    init: Callable[[Any], EMAState]
    update: Callable[[Any, EMAState], EMAState]
    params: Callable[..., Any]


def _is_float(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def ema_teacher(decay: float, debias: bool = False) -> EMATeacher:
    """A teacher that follows the student as an exponential moving average of its parameters.

    Sums are kept in float32 at least, as 0.999 of a bfloat16 rounds back to it. Leaves that are not
    floating are the student's latest.

    Args:
      decay: d, 0 (the student itself) to 1 (excluded).
      debias: whether to start from 0 and divide by 1 - dⁿ, so that the first parameters count no
        more than later ones.

    Returns:
      ``init``, ``update`` and ``params``.

    Raises:
      JaxcompError: decay is out of its range.

    Example:
      >>> ema = ema_teacher(0.5)
      >>> state = ema.update({"w": jnp.array(3.0)}, ema.init({"w": jnp.array(1.0)}))
      >>> ema.params(state)["w"].item()
      2.0
    """
    if not 0 <= decay < 1:
        raise JaxcompError(f"decay {decay} must be at least 0 and below 1")

    def wide(leaf):
        return jnp.asarray(leaf).astype(jnp.result_type(leaf, jnp.float32))

    def init(params: Any) -> EMAState:
        factor = 1 - decay if debias else 1.0
        average = jax.tree.map(lambda p: wide(p) * factor if _is_float(p) else p, params)
        return EMAState(average, jnp.ones((), jnp.int32))

    def update(params: Any, state: EMAState) -> EMAState:
        def step(p, m):
            return decay * m + (1 - decay) * wide(p) if _is_float(p) else p

        return EMAState(jax.tree.map(step, params, state.average), state.count + 1)

    def params(state: EMAState, like: Any = None) -> Any:
        def read(m):
            return m / (1 - jnp.asarray(decay, m.dtype) ** state.count) if _is_float(m) else m

        average = jax.tree.map(read, state.average) if debias else state.average
        if like is None:
            return average
        return jax.tree.map(lambda m, p: jnp.asarray(m).astype(jnp.result_type(p)), average, like)

    return EMATeacher(init, update, params)
