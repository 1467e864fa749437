"""The programs that serve a model, as functions of shapes that are split over a mesh.

``decode`` makes one token for each sequence of a batch; ``prefill`` reads a chunk of the prompt of
one sequence in each data-parallel group. Both get the key-value cache as a donated argument.

The mesh has the axes "data", "heads" and "length". Sequences are split over "data", weights over
the other two together, which are named for what they split of the cache: where there are more
devices than key-value heads, "heads" takes as many as divide these, and each head's positions are
split over "length". Attention then exchanges among the few devices of one head only.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp import matmul, models, sharding
from jaxcomp.dispatch import dispatch
from jaxcomp.errors import JaxcompError
from jaxcomp.formats import is_compressed, nbits
from jaxcomp.functional import functional
from jaxcomp.graph import trace
from jaxcomp.graph.trace import leaf_paths
from jaxcomp.models.cache import Split as CacheSplit
from jaxcomp.models.cache import init_cache
from jaxcomp.planner.abstract import compressed_shapes
from jaxcomp.planner.shapes import config_from
from jaxcomp.recipe import Recipe

PHASES = ("decode", "prefill")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is served.

    Attributes:
      model: name, for errors.
      fields: of the model's ``config.json``.
      recipe: YAML text, or None for bfloat16 weights.
      batch: sequences decoded at once.
      context: positions of the cache.
      chunk: prompt tokens that a prefill step reads.
      new_tokens: of a request's context, what is generated; the rest is its prompt.
      cache_dtype: of keys and values, as of ``init_cache``.
    """

    model: str
    fields: dict[str, Any]
    recipe: str | None
    batch: int
    context: int
    chunk: int
    new_tokens: int
    cache_dtype: str = "bfloat16"

    @property
    def prefill_steps(self) -> int:
        """Chunks of a request's prompt."""
        return -(-(self.context - self.new_tokens) // self.chunk)


class Split(NamedTuple):
    """How the mesh is used.

    Attributes:
      data: devices that each hold all weights and a part of the sequences.
      heads: devices over which key-value heads are split.
      length: devices over which the positions of a head are split.
    """

    data: int
    heads: int
    length: int

    @property
    def model(self) -> int:
        """Devices over which each weight is split."""
        return self.heads * self.length

    @property
    def cache(self) -> str:
        """How "heads" and "length" split the cache."""
        if self.length > 1 and self.heads > 1:
            return f"{self.heads} heads x {self.length} length"
        return "length" if self.length > 1 else "heads"

    def __str__(self) -> str:
        return f"data {self.data} x model {self.model}, cache by {self.cache}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the mesh."""
        return self.data, self.heads, self.length


AXES = ("data", "heads", "length")


class Serving:
    """A model on shapes: its parameters, their sharding, and its steps."""

    def __init__(self, workload: Workload):
        self.workload = workload
        self.config = config_from(workload.fields, workload.model)
        self.dense, params = functional(models.build(self.config, scan=True, dtype=jnp.bfloat16))
        self.dense_params = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params
        )
        self.params = self.dense_params
        self.rules = models.partition_rules(self.config, tensor=AXES[1:], scan=True)
        if workload.recipe is not None:
            tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
            graph = trace(self.dense, self.dense_params, tokens)
            recipe = Recipe.loads(workload.recipe)
            self.params = compressed_shapes(graph, self.dense_params, recipe)

    @functools.cached_property
    def integer_weights(self) -> set[str]:
        """Weights whose inputs become integers, which an integer matrix unit can multiply."""
        found = {path: leaf for path, leaf in leaf_paths(self.params)[0] if is_compressed(leaf)}
        kinds = {p: {q.spec.format for q in matmul.quantizers(leaf)} for p, leaf in found.items()}
        return {path for path, formats in kinds.items() if formats and formats <= {"int8", "int4"}}

    def specs(self, split: Split, mesh: Any) -> Any:
        """The PartitionSpec of every array of the parameters.

        Raises:
          JaxcompError: the mesh does not divide a weight or its groups.
        """
        return sharding.specs(self.params, self.rules, mesh)

    def weight_bytes(self, split: Split, only: str | None = None) -> int:
        """Bytes of weights on one device; of one leaf, if its path is given."""
        mesh = jax.sharding.AbstractMesh(split.shape, AXES)
        specs = self.specs(split, mesh)

        def nbytes(x, spec):
            shape = NamedSharding(mesh, spec).shard_shape(x.shape)
            return math.prod(shape) * x.dtype.itemsize

        sizes = jax.tree.map(nbytes, self.params, specs)
        return sum(
            sum(jax.tree.leaves(leaf))
            for path, leaf in leaf_paths(sizes)[0]
            if only in (None, path)
        )

    def cache(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of the key-value cache of ``batch`` sequences."""
        work = self.workload
        make = functools.partial(
            init_cache, self.config.cache_shape, batch, work.context, work.cache_dtype
        )
        return jax.eval_shape(make)

    def expert_shares(self, path: str, tokens: int) -> tuple[float, float]:
        """How much of a weight one token multiplies, and so many tokens read; 1 without experts.

        Tokens go to experts evenly and each by itself, which is what training aims at.
        """
        if "/experts/" not in path:
            return 1.0, 1.0
        share = self.config.num_experts_per_tok / self.config.num_experts
        return share, 1 - (1 - share) ** tokens

    def ideal_bytes(self, split: Split) -> float:
        """Bytes of weights on one device if all arrays of them were divided."""
        return nbits(self.params) / 8 / split.model

    def sequences(self, split: Split, phase: str) -> int:
        """Sequences in a step: all that are decoded, or one prompt in each data-parallel group."""
        return self.workload.batch if phase == "decode" else split.data

    def share(self, split: Split, phase: str) -> float:
        """How many steps of a phase a request takes of the time of all devices.

        A decode step serves the whole batch, a prefill step one prompt in each data-parallel group.
        """
        work = self.workload
        steps = work.new_tokens if phase == "decode" else work.prefill_steps
        return steps / self.sequences(split, phase)

    def cache_bytes(self, split: Split, phase: str = "decode") -> int:
        """Bytes of a step's cache on one device; while decoding that is all of it."""
        cache = self.cache(self.sequences(split, phase))
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
        return total // (split.data * split.model)

    def layer_cache(self, split: Split, phase: str) -> tuple[int, ...]:
        """Shape of the keys that one layer keeps for a data-parallel group, of a device's heads."""
        _, heads, size = self.config.cache_shape
        sequences = self.sequences(split, phase) // split.data
        return sequences, self.workload.context, heads // split.heads, size

    def unfit(self, split: Split) -> str | None:
        """Why a split is not possible, or None."""
        w = self.workload
        _, heads, _ = self.config.cache_shape
        if w.batch % split.data:
            return f"data {split.data} does not divide the batch of {w.batch}"
        if heads % split.heads:
            return f"{split.heads} devices do not divide {heads} key-value heads"
        if w.context % split.length:
            return f"{split.length} devices do not divide the context of {w.context}"
        try:
            self.weight_bytes(split)
        except JaxcompError as error:
            return str(error)
        return None

    def weight_shapes(self) -> set[tuple[int, ...]]:
        """Shapes of one layer's matrices and of the arrays that stand for compressed ones."""
        found = set()
        for params in (self.dense_params, self.params):
            for path, leaf in leaf_paths(params)[0]:
                stacked = path.startswith(f"{self.config.LAYERS}/")
                for array in jax.tree.leaves(leaf):
                    shape = tuple(array.shape)
                    found.add(shape[1:] if stacked else shape)
        return {shape for shape in found if len(shape) > 1 and np.prod(shape) > 2**20}

    def step(self, phase: str, split: Split, mesh: jax.sharding.Mesh) -> tuple[Any, tuple, Any]:
        """A step to compile.

        Args:
          phase: one of ``PHASES``.
          split: how the mesh is used.
          mesh: of ``split.shape``, with the axes ``AXES``.

        Returns:
          The jitted function, its arguments as shapes with shardings, and the choices of
          implementations for compressed weights.
        """
        batch = self.sequences(split, phase)
        length = 1 if phase == "decode" else self.workload.chunk
        by = PartitionSpec("data", "length", "heads")

        def placed(shape, spec):
            return jax.ShapeDtypeStruct(
                shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec)
            )

        cache = self.cache(batch)
        cache = {
            name: placed(x, PartitionSpec() if name == "length" else PartitionSpec(None, *by))
            for name, x in cache.items()
        }
        cache["split"] = CacheSplit(by)
        tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
        tokens = placed(tokens, PartitionSpec("data"))

        # What a server would hold: packed weights in the layout that the kernels read.
        apply = dispatch(self.dense, sharding=self.rules, mesh=mesh)
        params = jax.tree.map(placed, self.params, self.specs(split, mesh))
        prepared = jax.eval_shape(lambda p: apply.prepare(p, tokens, None, cache), params)
        params = jax.tree.map(placed, prepared, sharding.specs(prepared, self.rules, mesh))

        def step(params, tokens, cache):
            logits, cache = apply(params, tokens, None, cache)
            return jnp.argmax(logits[:, -1], -1).astype(jnp.int32), cache

        # The cache stays on the device from step to step: in the order that suits the program.
        kept = jax.tree.map(lambda x: Format(Layout.AUTO, x.sharding), cache)
        function = jax.jit(
            step,
            donate_argnums=2,
            in_shardings=(None, None, kept),
            out_shardings=(NamedSharding(mesh, PartitionSpec("data")), kept),
        )
        choices = ()
        if any(is_compressed(leaf) for _, leaf in leaf_paths(params)[0]):
            choices = apply.report(params, tokens, None, cache)
        return function, (params, tokens, cache), choices
