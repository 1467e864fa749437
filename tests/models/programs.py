"""Programs of the reference models that are compiled for TPUs ahead of time."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxcomp.functional import functional
from jaxcomp.models import Attending, BertConfig, LlamaConfig, build, partition_rules
from jaxcomp.models.cache import Split, init_cache
from jaxcomp.sharding import specs

# Tokens, and positions of a cache: no other sizes are these.
LENGTH, ROOM = 640, 896
# Windows of its own for some layers of a loop, and heads that share keys.
LLAMA = LlamaConfig(
    512, 256, 384, 2, 8, 4, 128, max_position_embeddings=1024, sliding_windows=(None, 200)
)
BERT = BertConfig(512, 256, 384, 1, 4, max_position_embeddings=1024)
SPEC = PartitionSpec("data", None, "model")


def _params(config, mesh, shapes):
    rules = partition_rules(config, scan=True)
    return jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        specs(shapes, rules, mesh),
    )


def _tokens(mesh, rows=2, length=LENGTH, dtype=jnp.int32):
    where = NamedSharding(mesh, PartitionSpec("data"))
    return jax.ShapeDtypeStruct((rows, length), dtype, sharding=where)


def training(mesh, remat=False):
    """Gradients of a loss of a model whose layers are in a loop, split as ``SPEC`` says."""
    model = build(LLAMA, scan=True, dtype=jnp.bfloat16, attention=Attending(spec=SPEC))
    model.remat = remat
    apply, shapes = functional(model)
    loss = jax.grad(lambda params, tokens: jnp.square(apply(params, tokens)).mean())
    return loss, [_params(LLAMA, mesh, shapes), _tokens(mesh)]


def prompt(mesh, dtype="bfloat16", told=True, by=("data", None, "model"), empty=True):
    """A prompt that is read into a cache, or continues it; ``told`` how the cache lies."""
    apply, shapes = functional(build(LLAMA, scan=True, dtype=jnp.bfloat16))
    made = lambda: init_cache(LLAMA.cache_shape, 2, ROOM, dtype, empty=empty)  # noqa: E731
    held = jax.eval_shape(made)

    def placed(x):
        spec = PartitionSpec(None, *by) if x.ndim else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    cache = jax.tree.map(placed, held) | ({"split": Split(PartitionSpec(*by))} if told else {})
    read = lambda params, tokens, cache: apply(params, tokens, None, cache)  # noqa: E731
    return read, [_params(LLAMA, mesh, shapes), _tokens(mesh), cache]


def encoder(mesh):
    """An encoder's hidden states of padded sequences."""
    apply, shapes = functional(build(BERT, dtype=jnp.bfloat16))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    return apply, [shapes, _tokens(mesh), _tokens(mesh)]
