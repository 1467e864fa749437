"""Running out of memory is told by the weight, with what was asked for and what to change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcomp as jc
from jaxcomp import out_of_memory
from jaxcomp.quantization import GPTQ
from jaxcomp.step import run

# What XLA and NumPy say: the allocators of CPU and GPU, the compiler and the runtime of TPUs.
MESSAGES = {
    "RESOURCE_EXHAUSTED: Out of memory allocating 822083584 bytes.": "784 MiB",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.": "16.00 GiB",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4.25GiB. [tf-allocator]": "4.25GiB",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 21.95G of 15.48G hbm. Exceeded hbm capacity by 6.47G.": "21.95G of 15.48G",
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 1.50G. That was "
    "not possible. There are 1.13G free.; (0x0x0_HBM0)": "1.50G",
    "Unable to allocate 256. TiB for an array with shape (35184372088832,)": "256. TiB",
    "RESOURCE_EXHAUSTED: something else": None,
}


@pytest.mark.parametrize("message", MESSAGES)
def test_what_was_asked_for(message):
    assert out_of_memory.asked_for(message) == MESSAGES[message]


def model(params, x):
    x = jnp.tanh(x @ params["first"])
    return x @ params["left"] + x @ params["right"]


@pytest.fixture
def case(rng):
    params = {n: rng.standard_normal((16, 16), np.float32) for n in ("first", "left", "right")}
    return model, params, jc.presets.w4a16_gptq(group_size=8), [(np.ones((4, 16), np.float32),)]


@pytest.fixture
def exhausted():
    """GPTQ that runs out of memory at its second input group."""
    original, calls = run.dispatch(GPTQ), []
    planted = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."

    def failing(step, layers):
        calls.append(layers)
        if len(calls) == 2:
            raise jax.errors.JaxRuntimeError(planted)
        return original(step, layers)

    run.register(GPTQ, failing)
    yield calls
    run.register(GPTQ, original)


def test_compressing(case, exhausted, tmp_path):
    with pytest.raises(jc.OutOfMemoryError) as caught:
        jc.compress(*case, journal=str(tmp_path), progress=False)
    message = str(caught.value)
    assert message.startswith("left (16, 16): out of memory of device ")
    for part in (
        "compressing it together with right (16, 16), which read the same input",
        "their Hessian alone is 1.00 KiB",
        "16.00 GiB were asked for",
        "mesh=",
        "block_size",
        f"the 1 weights finished before are kept in the journal {tmp_path}",
    ):
        assert part in message
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)
    # The rest, from the journal: the first weight is not computed again.
    result = jc.compress(*case, journal=str(tmp_path), progress=False)
    assert [[layer.path for layer in layers] for layers in exhausted] == [
        ["first"],
        ["left", "right"],
        ["left", "right"],
    ]
    whole = jc.compress(*case, progress=False)
    jax.tree.map(np.testing.assert_array_equal, result.params, whole.params)


def test_other_errors_of_xla_stay_what_they_are():
    error = jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")
    with pytest.raises(jax.errors.JaxRuntimeError, match="RET_CHECK"):
        with out_of_memory.compressing(["w"], [(2, 2)]):
            raise error


def test_evaluation_that_really_runs_out():
    """More memory than the address space has: XLA's own error, on any machine."""

    def wide(params, x):
        y = x @ params["a"]
        huge = jnp.sort(y[..., None] + jnp.arange(2**46, dtype=jnp.float32), -1)
        return (y + huge[..., 0]) @ params["b"]

    params = {name: np.ones((4, 4), np.float32) for name in "ab"}
    with pytest.raises(jc.OutOfMemoryError) as caught:
        jc.compress(
            wide,
            params,
            jc.presets.w4a16_gptq(group_size=4),
            [(np.ones((1, 4), np.float32),)],
            progress=False,
        )
    message = str(caught.value)
    assert message.startswith("b (4, 4): out of memory of device ")
    # Where computations run in the background the statistics are the first to see the error.
    assert "evaluating the model up to it" in message or "gathering statistics of its" in message
    assert "smaller batches" in message
    assert "TiB were asked for" in message or "PiB were asked for" in message
    assert "the 1 weights finished before are lost" in message


def test_host_memory_of_a_recipe_without_calibration(monkeypatch):
    from jaxcomp import placing

    def matrix(self, leaf, axes):
        return np.ones(2**57)

    monkeypatch.setattr(placing.Here, "matrix", matrix)
    with pytest.raises(jc.OutOfMemoryError, match=r"^w \(8, 8\): out of host memory .* EiB were"):
        jc.compress(
            lambda p, x: x @ p["w"],
            {"w": np.ones((8, 8), np.float32)},
            jc.presets.w4a16_rtn(group_size=8),
            [(np.ones((1, 8), np.float32),)],
            progress=False,
        )


def test_placing_on_devices():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"a": np.ones(4, np.float32), "b": np.broadcast_to(np.float32(1), (1 << 22, 1 << 22))}
    told = r"^b \(4194304, 4194304\): out of host memory"
    with pytest.raises(jc.OutOfMemoryError, match=told) as caught:
        jc.shard(params, mesh, [("b", jax.sharding.PartitionSpec("x"))])
    assert "32.0 TiB were asked for; split it over more devices" in str(caught.value)
