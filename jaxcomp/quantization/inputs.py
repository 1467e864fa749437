"""Inputs of matmuls while a model is trained: ranges observed, learned, or taken as they come.

A dynamic input needs no state. A static one has moving averages of its range ("ema" of the
extremes or of percentiles), or a range that is trained ("learned": LSQ, LSQ+; "pact").
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxcomp.errors import RecipeError
from jaxcomp.quantization.activation import activation_scales
from jaxcomp.quantization.lsq import initial_input_scale, learned_input_qparams, lsq_input
from jaxcomp.quantization.pact import pact, pact_qparams
from jaxcomp.quantization.ste import fake_quantize_input
from jaxcomp.step import Activation

# Percentiles sort; of larger inputs this many evenly spaced values stand for all.
_SORTED = 2**16


def check_share(where: str, percentile: float) -> None:
    """Raises a ``RecipeError`` for a percentile that leaves no range."""
    if not 50 < percentile <= 100:
        raise RecipeError(
            f"{where}: percentile {percentile} must be above 50 and at most 100, as 99.9"
        )


@dataclasses.dataclass(frozen=True)
class InputQuantizer:
    """How an input is quantized while the model is trained.

    Attributes:
      activation: the element type and granularity.
      observer: where a static range comes from: "ema", "percentile", "learned" or "pact".
      percentile: of the magnitudes (of both ends where asymmetric), in percent.
      momentum: of the moving averages.
    """

    activation: Activation
    observer: str = "ema"
    percentile: float = 99.9
    momentum: float = 0.95

    def check(self, where: str) -> None:
        """Raises a ``RecipeError`` that begins with ``where`` for options that do not fit."""
        if self.observer != "ema" and self.activation.dynamic:
            raise RecipeError(
                f'{where}: observer="{self.observer}" is about a static range; use an activation '
                'with dynamic=False and granularity="tensor"'
            )
        check_share(where, self.percentile)
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"{where}: momentum {self.momentum} must be from 0 to below 1")

    @property
    def observes(self) -> bool:
        """Whether it keeps moving averages."""
        return not self.activation.dynamic and self.observer in ("ema", "percentile")

    @property
    def learns(self) -> bool:
        """Whether its range is trained."""
        return not self.activation.dynamic and self.observer in ("learned", "pact")

    def seen(self, x: jax.Array) -> dict[str, jax.Array]:
        """What one batch is like.

        Args:
          x: the input, any shape.

        Returns:
          Scalars, float32 or wider: "low" and "high" of its range, "mean" magnitude, and "seen",
          which is 1.
        """
        x = jax.lax.stop_gradient(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.observer != "percentile":
            low, high = x.min(), x.max()
        else:
            flat = x.reshape(-1)
            step = max(1, flat.size // _SORTED)
            while math.gcd(step, flat.size) > 1:  # So that it comes by every channel.
                step += 1
            flat = flat[::step]
            share = self.percentile / 100
            if self.activation.symmetric:
                high = jnp.quantile(jnp.abs(flat), share)
                low = -high
            else:
                low, high = jnp.quantile(flat, jnp.array([1 - share, share]))
        return {
            "low": low,
            "high": high,
            "mean": jnp.abs(x).mean(),
            "seen": jnp.ones((), x.dtype),
        }

    def start(self, seen: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Where a learned range starts, from what ``seen`` gave (stacked or not)."""
        if self.observer == "pact":
            return {"alpha": jnp.maximum(-seen["low"], seen["high"])}
        return initial_input_scale(seen["low"], seen["high"], seen["mean"], self.activation)

    def qparams(self, learned: Mapping | None, seen: Mapping | None) -> tuple:
        """Scale and zero point (None if symmetric) of a static input, stacked as its state is."""
        if self.observer == "pact":
            return pact_qparams(self.activation, learned["alpha"])
        if self.observer == "learned":
            return learned_input_qparams(self.activation, learned)
        return activation_scales(seen["low"], seen["high"], self.activation)

    def apply(
        self, x: jax.Array, axes: Sequence[int], learned: Mapping | None, ranges: Mapping | None
    ) -> tuple[jax.Array, dict[str, jax.Array] | None]:
        """Quantizes an input, with a straight-through gradient.

        The range is the one that comes in, so the value is what a converted model computes; only a
        range that has seen nothing is taken from the input itself.

        Args:
          x: the input.
          axes: the features of a token.
          learned: parameters of a learned range.
          ranges: moving averages.

        Returns:
          The quantized input, and the averages with this input in them.
        """
        if self.activation.dynamic:
            return fake_quantize_input(x, self.activation, axes), ranges
        if self.observer == "pact":
            return pact(x, self.activation, learned["alpha"]), ranges
        if self.observer == "learned":
            return lsq_input(x, self.activation, learned), ranges
        now, first = self.seen(x), ranges["seen"] == 0
        use = {k: jnp.where(first, now[k], ranges[k]) for k in ("low", "high")}
        q = fake_quantize_input(x, self.activation, axes, *self.qparams(None, use))
        moved = {k: self.momentum * use[k] + (1 - self.momentum) * now[k] for k in use}
        moved = {k: jnp.where(first, now[k], moved[k]) for k in moved} | {"seen": now["seen"]}
        return q, moved
