"""``compress(mesh=..)`` over several processes gives what one process gives.

The scripts that run in the processes take their models and data from here.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcomp as jc
from jaxcomp import evaluation
from jaxcomp.models import Llama, LlamaConfig
from tests import processes
from tests.io.test_checkpoint_together import contents
from tests.test_compress_mesh import assert_same

WIDTH = 32
# All projections have one shape, so that each algorithm is compiled once.
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=WIDTH,
    intermediate_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
)
SPARSE = {"gate_proj": {"sparsity": 0.5}, "o_proj": {"n": 2, "m": 4}}
RECIPES = {
    "rtn": jc.presets.w4a16_rtn(group_size=16),
    "gptq": jc.Recipe(  # And SparseGPT, in one pass.
        steps=(
            *jc.presets.w4a16_gptq(
                group_size=16, exclude=[*(f"*{name}*" for name in SPARSE), "lm_head*"]
            ).steps,
            *(
                step
                for name, target in SPARSE.items()
                for step in jc.presets.sparsegpt(**target, include=[f"*{name}*"]).steps
            ),
        )
    ),
}


def llama():
    """A model and two batches of tokens, the same in every process."""
    apply, params = jc.functional(Llama(CONFIG, scan=True, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    tokens = [(rng.integers(0, 64, (4, 16)).astype(np.int32),) for _ in range(2)]
    return apply, jax.tree.map(np.asarray, params), tokens


@functools.cache
def alone(name):
    apply, params, tokens = llama()
    return jc.compress(apply, params, RECIPES[name], tokens, progress=False)


TOGETHER = """
    import hashlib, sys
    import numpy as np
    import jaxcomp as jc
    from jaxcomp import evaluation, host
    from jaxcomp.models import partition_rules
    from tests.test_compress_processes import CONFIG, RECIPES, SPARSE, llama

    # No column loop runs on the mesh: each process has its own.
    sys.modules["jaxcomp.quantization.gptq"]._gptq = None
    sys.modules["jaxcomp.pruning.sparsegpt"]._sparsegpt = None
    rows, shares = host.own_rows, []
    def own_rows(array):
        found = rows(array)
        shares.append(len(found[0]) / len(array))
        return found
    host.own_rows = own_rows

    apply, params, tokens = llama()
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for name, recipe in RECIPES.items():
        result = jc.compress(apply, params, recipe, tokens, mesh=mesh, progress=False)
        leaves = jax.tree.leaves(result.params)
        assert all(isinstance(a, np.ndarray) for a in leaves)
        print(name, hashlib.sha256(b"".join(a.tobytes() for a in leaves)).hexdigest())
        jc.save(FOLDER / name, result)
        if name == "rtn":
            out = FOLDER / "streamed"
            shapes = jc.compress(apply, params, recipe, tokens, mesh=mesh, save_to=out).params
            assert jc.nbits(shapes) == jc.nbits(result.params)
        if name == "gptq":
            # Over half of the rows.
            assert set(shares) == {0.5}, shares
            rules = partition_rules(CONFIG, tensor="model", scan=True)
            rules = [(path, spec) for path, spec in rules if path.split("/")[-2] not in SPARSE]
            loaded = jc.load(FOLDER / name, mesh=mesh, rules=rules).params
            split = loaded["layers"]["mlp"]["up_proj"]["kernel"].parts[0].values
            assert not split.is_fully_replicated and not split.is_fully_addressable
            run = jc.dispatch(apply, sharding=rules, mesh=mesh)
            print("perplexity", evaluation.perplexity(run, loaded, tokens))
"""


# What each of two processes reads of a memory-mapped model, and of the checkpoint made of it.
READS = """
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P
    from jaxcomp import agreement
    from jaxcomp.io import arrays, safetensors
    from jaxcomp.io.stacked import Stacked
    from jaxcomp.processes import Together
    from tests import reads

    # Pages come 16 at a time: few samples, so that these do not fill a small weight.
    agreement._SAMPLE, sys.modules["jaxcomp.fingerprint"]._SAMPLES = 4096, 2
    arrays._CHUNK_BYTES = 2**15
    rng = np.random.default_rng(0)
    shapes = {"embed": (512, 64), "down": (256, 2048)} | {f"up{k}": (2048, 64) for k in range(4)}
    held = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    file = FOLDER / "model.safetensors"
    Together("write").step("write", lambda: PROCESS or reads.write(file, held))
    held = safetensors.read(file)
    mapped = reads.Mapped(held)

    def experts(params, tokens):
        y = jnp.einsum("btd,edf->btef", params["embed"][tokens], params["up"])
        return jax.nn.relu(y.sum(2)) @ params["down"]

    params = {"embed": held["embed"], "down": held["down"].T}
    params["up"] = Stacked([held[f"up{k}"].T for k in range(4)])
    steps = jc.presets.w4a16_gptq(group_size=16, include=["up"]).steps
    steps += jc.presets.wanda(n=2, m=4, include=["down"]).steps
    jc.compress(experts, params, jc.Recipe(steps=steps), tokens, mesh=mesh, save_to=FOLDER / "own")
    assert mapped.share(held["embed"]) == 1
    # With what the page table has around the ends, and around the two samples.
    own = [mapped.share(held[f"up{k}"]) for k in range(4)]
    for share, ends in ((mapped.share(held["down"]), 5), (sum(own) / 4, 8)):
        assert 0.5 <= share <= 0.5 + ends * 2**16 / 2**21, share
    size = sum(f.stat().st_size for f in (FOLDER / "own").glob("arrays/*/*/*"))
    before = reads.bytes_read()
    rules = [("up", P(("data", "model"))), ("down", P(None, ("data", "model")))]
    jc.load(FOLDER / "own", mesh=mesh, rules=rules)
    # Each file twice, for its checksum and its contents; those of "embed" are whole.
    share = (reads.bytes_read() - before) / size / 2
    assert 0.5 <= share < 0.65, share
"""


def test_two_processes_compress_save_load_and_evaluate(tmp_path):
    with processes.start(TOGETHER + READS, 2, tmp_path) as group:
        printed = group.wait(timeout=400)
    assert printed[0] == printed[1]
    said = dict(line.split() for line in printed[0].splitlines())
    assert contents(tmp_path / "streamed") == contents(tmp_path / "rtn")
    for name in RECIPES:
        one, both = alone(name), jc.load(tmp_path / name)
        assert_same(jax.tree.map(np.asarray, both.params), jax.tree.map(np.asarray, one.params))
        for row, other in zip(both.report.rows, one.report.rows, strict=True):
            assert (row.path, row.format, row.nbits) == (other.path, other.format, other.nbits)
            assert row.error == pytest.approx(other.error, rel=1e-3)
    apply, _, tokens = llama()
    expected = evaluation.perplexity(jc.dispatch(apply), alone("gptq").params, tokens)
    assert float(said["perplexity"]) == pytest.approx(expected, rel=1e-5)


def branching(params, x):
    """Loops over the steps of each batch, some of them weights in a ``while`` and in a ``cond``."""

    def step(h, x):
        h = jnp.tanh(x @ params["in"] + h)
        return h, h

    last, all_ = jax.lax.scan(step, jnp.zeros(x.shape[1:]), x)
    more = lambda carry: carry[1] < 1 + (x[0, 0, 0] > 0)  # noqa: E731
    again = lambda carry: (jnp.tanh(carry[0] @ params["again"]), carry[1] + 1)  # noqa: E731
    last, _ = jax.lax.while_loop(more, again, (last, 0))
    y = jnp.tanh(all_ @ params["all"]) + last
    return jax.lax.cond(y.sum() > 0, lambda: y @ params["out"], lambda: -y @ params["out"])


def steps_and_weights():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    params = {name: 0.5 * normal(WIDTH, WIDTH) for name in ("in", "again", "all", "out")}
    # The mesh does not divide the six steps, so evaluation splits the weights, not the batches.
    return params, [normal(6, 4, WIDTH) for _ in range(3)]


PARTS = """
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    import jaxcomp as jc
    from jaxcomp import placing
    from tests.test_compress_processes import branching, steps_and_weights

    params, batches = steps_and_weights()
    names, kinds = ("data", "model"), (jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto)
    mesh = jax.make_mesh((4, 2), names, axis_types=(kinds[0],) * 2)
    # Each process has a part of the weights, and a part of each batch: one of four sequences.
    split = NamedSharding(mesh, P("data", "model"))
    params = {
        name: jax.make_array_from_callback(w.shape, split, lambda index: w[index])
        for name, w in params.items()
    }
    columns = NamedSharding(mesh, P(None, "data"))
    batches = [
        (jax.make_array_from_process_local_data(columns, x[:, PROCESS : PROCESS + 1], x.shape),)
        for x in batches
    ]
    recipe = jc.presets.wanda(0.5)
    weight, evaluated = placing.OnMesh.weight, []
    placing.OnMesh.weight = lambda self, array: (
        evaluated.append(weight(self, array)) or evaluated[-1]
    )
    result = jc.compress(branching, params, recipe, batches, mesh=mesh, progress=False)
    held = [a.sharding.shard_shape(a.shape) for a in evaluated]
    assert set(held) == {(32, 4)} and not evaluated[0].is_fully_addressable, held
    jc.save(FOLDER / "out", result)
    mesh = jax.make_mesh((4, 2), names, axis_types=(kinds[1],) * 2)
    loaded = jc.load(FOLDER / "out", mesh=mesh).params
    columns = NamedSharding(mesh, P(None, "data"))
    x = jax.device_put(steps_and_weights()[1][0], columns)
    y = jax.jit(jc.dispatch(branching), out_shardings=NamedSharding(mesh, P()))(loaded, x)
    np.save(FOLDER / f"y{PROCESS}.npy", y)
"""


def test_four_processes_with_a_part_of_weights_and_batches_each(tmp_path):
    with processes.start(PARTS, 4, tmp_path) as group:
        group.wait(timeout=400)
    params, batches = steps_and_weights()
    one = jc.compress(branching, params, jc.presets.wanda(0.5), batches, progress=False)
    assert_same(
        jax.tree.map(np.asarray, jc.load(tmp_path / "out").params),
        jax.tree.map(np.asarray, one.params),
    )
    y = jc.dispatch(branching)(one.params, batches[0])
    for process in range(4):
        np.testing.assert_allclose(np.load(tmp_path / f"y{process}.npy"), y, rtol=1e-5, atol=1e-5)


DIFFERENT = """
    import sys
    import jax.numpy as jnp
    import numpy as np
    import jaxcomp as jc
    from jaxcomp import calibration, placing

    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((2, 8, 8)).astype(np.float32)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "d")
    presets = jc.presets

    def compress(preset=presets.w4a16_gptq, w=w, data=((x,),), mesh=mesh, bits=1, **more):
        apply = lambda p, x: bits * x @ p["w"]
        recipe = preset(group_size=8)
        return jc.compress(apply, {"w": w}, recipe, data, mesh=mesh, progress=False, **more)

    def expect(*texts, **options):
        try:
            compress(**options)
        except jc.JaxcompError as error:
            for text in texts:
                assert text in str(error), (text, str(error))
        else:
            raise AssertionError(f"no error: {texts}")

    me = bool(PROCESS)
    who = "compress(mesh=..) over the processes 0, 1: process 1 differs from process 0 in its "
    expect(who + "recipe (step 0 GPTQ).", preset=(presets.w4a16_gptq, presets.w3a16_gptq)[me])
    expect(who + "recipe (step 0 RTN)", preset=(presets.w4a16_gptq, presets.w4a16_rtn)[me])
    expect(who + "weights (w float32 (8, 8)).", w=w + me)
    expect(who + "data (batch 0: float32 (8, 8)).", data=((x + me,),))
    expect(who + "data (batch 1: float32 (8, 8) is missing).", data=((x,),) * (2 - me))
    expect(who + "function (", bits=1 + me)
    expect(
        "no calibration batches" if me else "process 1 could not compress: DataError: no calib",
        data=() if me else ((x,),),
    )
    other = jax.devices()[:2] if me else jax.devices()[2:]
    expect(f"the processes ({1 - PROCESS},) and none of this one, {PROCESS}",
           mesh=jax.sharding.Mesh(np.array(other), "d"))
    # One that belongs to this process alone waits for nobody.
    mine = jax.sharding.Mesh(np.array(jax.local_devices()), "d")
    alone = [compress(mesh=mine) for _ in range(1 + PROCESS)]
    compress(mesh=mine, save_to=FOLDER / f"{PROCESS}")
    result = compress()
    np.testing.assert_allclose(
        result.params["w"].materialize(), alone[0].params["w"].materialize(), rtol=1e-5
    )
    # Of four experts each process factorizes the Hessians of two.
    experts, tokens = rng.standard_normal((2, 4, 8, 8)).astype(np.float32)
    module, recipe = sys.modules["jaxcomp.quantization.gptq"], presets.w4a16_gptq(group_size=8)
    inner, seen = module._gptq, []
    module._gptq = lambda w, h, *rest, **options: (
        seen.append((w.shape, h.shape)) or inner(w, h, *rest, **options)
    )
    apply = lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"])
    result = jc.compress(apply, {"w": experts}, recipe, [(tokens,)], mesh=mesh, progress=False)
    assert seen == [((2, 8, 8), (2, 8, 8))], seen
    for found, w, x in zip(result.params["w"].materialize(), experts, tokens):
        one = jc.quantization.gptq(w.T, x.T @ x, recipe.steps[0].format).materialize()
        np.testing.assert_allclose(found, one.T, rtol=1e-5)
    # Each token counts once, though devices of both processes have it: those of a batch that the
    # mesh does not divide, and those of one that its first axis does.
    crossed = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2).T, ("d", "m"))
    for rows, over in ((7, mesh), (6, crossed)):
        place, tokens = placing.place(over), x[:rows]
        kept = place.keep(place.load(tokens))
        state = calibration.init(8, frozenset({"hessian", "range"}))
        state = jax.tree.map(np.asarray, state)
        for part in filter(len, place.own(kept)):
            state = calibration.update(state, part)
        total = place.summed(state)
        assert total.count == rows
        rounding = rows * np.finfo(np.float32).eps * (abs(tokens).T @ abs(tokens)).max()
        np.testing.assert_allclose(total.hessian, tokens.T @ tokens, rtol=0, atol=rounding)
        np.testing.assert_array_equal(total.minimum, tokens.min(0))
    print("well")
"""


def test_what_differs_between_processes_is_named_before_anything_runs(tmp_path):
    with processes.start(DIFFERENT, 2, tmp_path) as group:
        assert all("well" in output for output in group.wait(timeout=300))
    assert contents(tmp_path / "0") == contents(tmp_path / "1")


CHAIN = """
    import os, signal
    import numpy as np, jax.numpy as jnp
    import jaxcomp as jc
    from jaxcomp import journal

    rng = np.random.default_rng(0)
    params = {k: rng.standard_normal((16, 16)).astype(np.float32) for k in "abc"}
    batches = [(rng.standard_normal((8, 16)).astype(np.float32),) for _ in range(2)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "d")

    def compress(**options):
        apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
        recipe = jc.presets.w4a16_gptq(group_size=16)
        return jc.compress(apply, params, recipe, batches, mesh=mesh, progress=False, **options)

    def expect(text, **options):
        try:
            compress(**options)
        except jc.JaxcompError as error:
            assert text in str(error), str(error)
        else:
            raise AssertionError("no error: " + text)
"""
DIES = """
    put = journal.Journal.put
    def dies(self, key, *rest):
        if key == "b[]":  # What the first process has written, the second writes next.
            assert PROCESS
            os.kill(os.getpid(), signal.SIGKILL)
        return put(self, key, *rest)
    journal.Journal.put = dies
    compress(save_to=FOLDER / "out")
"""
GOES_ON = """
    from jaxcomp.compress import _Run
    fresh = compress()
    computed = []
    inner = _Run._compress
    _Run._compress = lambda self, program, group, statistics: (
        computed.extend(t.site.path for t in group) or inner(self, program, group, statistics)
    )
    compress(save_to=FOLDER / "out")
    assert computed == ["b", "c"], computed
    jc.save(FOLDER / "fresh", fresh)
    # One whose journal is damaged, cannot be written or belongs to another run: an error of all.
    other = "process 1 could not compress: JournalError: journal"
    (FOLDER / "odd").mkdir(exist_ok=True)
    (FOLDER / "odd" / f"process-{PROCESS}-of-3").mkdir()
    expect("belongs to a run of 3 processes, and this one has 2", journal=FOLDER / "odd")
    put = journal.Journal.put
    def fails(self, key, *rest):
        if key == "b[]" and PROCESS:
            raise journal.JournalError("journal: no space left")
        return put(self, key, *rest)
    journal.Journal.put = fails
    for option in ("save_to", "journal"):
        full = {option: FOLDER / f"full-{option}"}
        expect("no space left" if PROCESS else other + ": no space left", **full)
    # With a journal for each process, what not all have is computed again.
    journal.Journal.put = put
    computed.clear()
    resumed = compress(**full)
    assert computed == ["b", "c"], computed
    jax.tree.map(np.testing.assert_array_equal, resumed.params, fresh.params)
    if PROCESS:
        (record,) = (FOLDER / "full-journal" / "process-1-of-2" / "records").glob("a*")
        record.write_bytes(record.read_bytes()[:-1] + b"?")
    expect("is damaged" if PROCESS else other + " record", **full)
    # Out of memory on one, for its tokens or its rows: the other hears of it and does not wait.
    from jaxcomp import calibration
    from jaxcomp.quantization import common
    def exhausted(*args, **options):
        raise MemoryError("Unable to allocate 256. TiB for an array with shape (35184372088832,)")
    for module, name in ((calibration, "update"), (common, "_slabs")):
        healthy = getattr(module, name)
        if PROCESS:
            setattr(module, name, exhausted)
        expect("a (16, 16): out of host memory" if PROCESS else
               "process 1 could not compress: MemoryError: Unable to allocate 256. TiB")
        setattr(module, name, healthy)
    print("well")
"""


def test_a_killed_process_ends_the_others_and_a_restart_goes_on(tmp_path):
    with processes.start(CHAIN + DIES, 2, tmp_path, heartbeat=10) as group:
        group.running[1].wait(timeout=300)
        started = time.monotonic()
        assert all(group.codes(timeout=60)), group.output(0)
    print(f"the other ended after {time.monotonic() - started:.1f} s:\n{group.output(0)}")
    records = [tmp_path.glob(f"out.unfinished/process-{k}-of-2/records/*") for k in range(2)]
    assert [len(list(found)) for found in records] == [1, 0]
    with pytest.raises(jc.JaxcompError, match="is not finished"):
        jc.load(tmp_path / "out")
    with processes.start(CHAIN + GOES_ON, 2, tmp_path) as group:
        assert all("well" in output for output in group.wait(timeout=300))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not (tmp_path / "out.unfinished").exists()
