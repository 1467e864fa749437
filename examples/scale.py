# notebook: 06_scale
# %% [markdown]
# # From one device to a slice
#
# A model is compressed on a mesh, written without gathering it, read onto another mesh, and served
# there. On a TPU or GPU the mesh is made of the real devices; on a CPU of virtual ones, which are
# asked for before JAX is imported. `docs/scale.md` explains each step.
#
# It runs in the folder of the repository. In Colab, first:
#
#     !git clone <this repository> jaxcomp && pip install -e './jaxcomp[tpu]'
#     %cd jaxcomp
#
# The sizes are in `configs/examples/scale.yaml`; on the command line, or in the environment
# variable JAXCOMP_SETTINGS, they can be overridden: `python examples/scale.py model_parallel=4`.

# %%
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")  # CPU only

import pathlib
import tempfile
import time

import jax
import numpy as np
from jax.sharding import AxisType

import jaxcomp as jc
from jaxcomp import data, demo, evaluation
from jaxcomp.settings import read_settings

s = read_settings("configs/examples/scale.yaml")

# %% [markdown]
# ## Several hosts
#
# On a slice of several hosts every host runs the same program, and one line comes before all else:
# `jax.distributed.initialize()`. After it `jax.devices()` is all devices of the slice.
#
#     gcloud compute tpus tpu-vm ssh SLICE --worker=all \
#         --command="cd jaxcomp && python examples/scale.py distributed=true"
#
# (`docs/scale.md` has the commands that make a slice.)
#
# Whether a model fits, and how fast it could be at best, can be asked of the TPU's compiler first,
# on any machine: `jaxcomp plan llama-3-70b --recipe w4a16_gptq --topology v5e:4x4`.

# %%
if s.distributed:
    jax.distributed.initialize()
devices = jax.device_count()
if devices % s.model_parallel:
    raise SystemExit(f"model_parallel={s.model_parallel} does not divide {devices} devices")
shape = (devices // s.model_parallel, s.model_parallel)
mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
print(f"{devices} x {jax.devices()[0].device_kind}: data {shape[0]} x model {shape[1]}")

# %% [markdown]
# ## The model and its text
#
# The model that ships with jaxcomp, and Python's own source, which it knows.

# %%
folder = demo.tinylm()  # any supported model's folder works
model = jc.models.load(folder)


def windows(name, samples):
    options = {"length": s.length, "batch_size": s.batch_size, "samples": samples}
    return data.batches(folder / name, model.tokenizer, **options)


calibration = windows("calibration.txt", s.calibration)
held_out = windows("heldout.txt", s.held_out)
print(f"perplexity: dense {evaluation.perplexity(model.apply, model.params, held_out):.2f}")

# %% [markdown]
# ## Compress
#
# The batches are split over all devices, and so are the rows of each weight while it is compressed.
# With a journal a run that was killed goes on where it was.

# %%
recipe = jc.presets.get(s.recipe)
start = time.time()
result = jc.compress(model.apply, model.params, recipe, calibration, mesh=mesh, progress=False)
bits = result.report.bits_per_weight
print(f"compressed to {bits:.2f} bits a weight in {time.time() - start:.0f} s")

# %% [markdown]
# ## Place, save, load
#
# The rules say how a *dense* weight is split: Megatron's columns and rows over "model". What each
# part of a compressed weight needs follows from them. A checkpoint is written shard by shard and
# can be read onto any mesh, here one without a data axis; each host reads its own parts alone.

# %%
rules = jc.models.partition_rules(model.config, tensor="model")
placed = jc.shard(result, mesh, rules)
kernel = placed.params["layers"]["0"]["mlp"]["down_proj"]["kernel"]
for array in jax.tree.leaves(kernel):
    print("down_proj:", array.dtype, array.shape, "->", array.addressable_shards[0].data.shape)

scratch = tempfile.TemporaryDirectory()
output = pathlib.Path(s.output or scratch.name) / "model"
jc.save(output, placed)
row = jax.make_mesh(
    (1, s.model_parallel),
    mesh.axis_names,
    axis_types=mesh.axis_types,
    devices=jax.devices()[: s.model_parallel],
)
loaded = jc.load(output, mesh=row, rules=rules).params

# %% [markdown]
# ## Serve
#
# Under plain `jax.jit`. `sharding=` tells kernels that read packed weights how the mesh splits
# them.

# %%
run = jax.jit(jc.dispatch(model.apply, sharding=rules, mesh=row))
tokens = held_out[0][0]
apart = np.abs(run(loaded, tokens) - jc.dispatch(model.apply)(result.params, tokens)).max()
print(f"logits apart from those of one device: {apart:.0e}")
print(f"perplexity: {s.recipe} {evaluation.perplexity(run, loaded, held_out):.2f}")
for name, params in {"dense": model.params, s.recipe: loaded}.items():
    print(f"{name}: {jc.nbits(params) / 8e6:.2f} MB")
scratch.cleanup()
