"""SR-STE: N:M sparsity learned from scratch, with dense weights behind the sparse ones.

    forward:  w~ = mask(w) * w,  the n of every m consecutive inputs of largest |w|
    update:   w <- w - lr * (g(w~) + strength * (1 - mask) * w)

The gradient at the masked weights passes straight through to the dense ones; the second term pulls
dropped weights to zero and so keeps the mask from flipping. ``strength=0`` is plain STE.

The parameters are the masked weights; the dense values of dropped weights live in the optimizer's
state (``latent_weights`` puts them together).

Differs from the paper in: any optimizer may follow, where the paper has SGD; the first step is
dense; ties are broken in order.

Source: Zhou et al., https://arxiv.org/abs/2102.04010.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxcomp.errors import JaxcompError
from jaxcomp.pruning import masks
from jaxcomp.pruning.method import Method, check_number, keep_highest, wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRSTE(Method):
    """Keeps the n largest of every m consecutive inputs, chosen anew from dense weights.

    Attributes:
      n: weights kept of each block.
      m: consecutive inputs in a block.
      strength: of the pull of dropped weights to zero, lambda_W.
    """

    n: int = 2
    m: int = 4
    strength: float = 2e-4
    latent: ClassVar[bool] = True

    def check(self, layouts, schedule):
        """Checks that blocks divide the inputs; there is no schedule of sparsities."""
        if schedule is not None:
            raise JaxcompError("SRSTE: takes no schedule of sparsities; n and m set the sparsity")
        check_number("SRSTE: strength", self.strength)
        for layout in layouts:
            masks.check_nm(self.n, self.m, layout.input_size, layout.path)

    def gradient(self, gradient, weight, mask):
        """The dense gradient, and the pull to zero of dropped weights."""
        pull = jnp.where(mask, 0, self.strength * wide(weight))
        return (wide(gradient) + pull).astype(gradient.dtype)

    def select(self, weights, sparsity, count):
        """The n largest of each block of dense weights."""
        scores = [jnp.abs(wide(w.value)) for w in weights]
        return keep_highest([w.layout for w in weights], scores, None, nm=(self.n, self.m))
