"""The tuner and its table: written by a tiny run, read, and chosen by."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxcomp.kernels import chips, offline, schedules, tune, tune_compiled, tuning
from jaxcomp.kernels.quantized_matmul import reference, tpu, tpu_tiles

import jaxcomp as jc
from jaxcomp.formats import CompressedArray, InputQuant, Int, quantize
from jaxcomp.step import Activation

SHAPES = [(4, 16, 32)]


def clock(seconds):
    """A timer by which functions take these times in turn, again and again."""
    now, turns = [0.0], itertools.cycle(itertools.chain.from_iterable((0.0, s) for s in seconds))

    def read():
        now[0] += next(turns)
        return now[0]

    return read


def run(path, seconds, formats=("int8",), rounds=2):
    wanted = tune.cases(chips.CPU, formats, SHAPES)
    tune.tune(path, chips.CPU, wanted, rounds, clock(seconds))
    return tuning.read(path)["cpu"]["products"]


@pytest.mark.parametrize(("seconds", "expected"), [((3, 1, 2), "int8"), ((3, 2, 1), "parts")])
def test_what_was_measured_is_chosen(tmp_path, monkeypatch, seconds, expected):
    path = tmp_path / "tuned.json"
    (entry,) = run(path, seconds)
    assert entry["seconds"] == dict(zip(("dense", "codes", "floats"), seconds, strict=True))
    assert (entry["m"], entry["n"], entry["k"], entry["group_size"]) == (4, 16, 32, 32)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    part = InputQuant(quantize(Int(8), jnp.ones((16, 32))), spec=Activation())
    leaf = CompressedArray.from_matrix(part, (32, 16), jnp.float32, (), (1,), (0,))
    (choice,) = jc.dispatch(lambda p, x: x @ p["w"]).report({"w": leaf}, jnp.ones((4, 32)))
    assert choice.implementation == expected
    assert ("measured" in choice.reason) == (expected == "parts")


def test_every_way_computes_the_same_product():
    for case in tune.cases(chips.CPU, ("int8", "int4"), SHAPES, group_size=16):
        ways = tune.ways(case, chips.CPU)
        np.testing.assert_allclose(ways["codes"](), ways["floats"](), rtol=1e-5, atol=1e-2)


def test_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tuned.json"
    first = run(path, (3, 1, 2))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "ways", stop)
    assert run(path, ()) == first  # Known: nothing is measured again.
    arguments = ["--output", str(path), "--shapes", "4x16x32", "--formats", "int8,int4"]
    assert tune.main(arguments) == 130
    told = capsys.readouterr().err
    assert "[1/2]" in told and "known" in told and "run it again" in told
    assert tuning.read(path)["cpu"]["products"] == first


def test_a_way_that_fails_is_left_out(capsys):
    def fail():
        raise ValueError("too large\nfor this")

    seconds = tune.timed({"a": lambda: jnp.ones(()), "b": fail}, 2, clock((0.0,)))
    assert set(seconds) == {"a"} and "b: too large" in capsys.readouterr().err


def test_the_nearest_measurement_counts(tmp_path, monkeypatch):
    def entry(format, m, **seconds):
        shape = {"m": m, "n": 64, "k": 64, "group_size": 32}
        return {"format": format, "activation": None, **shape, "seconds": seconds}

    products = [
        entry("int4", 16, kernel=1.0, xla=2.0),
        entry("int4", 2048, kernel=2.0, xla=1.0),
        entry("int8", 16, kernel=2.0, xla=1.0),
    ]
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"version": 1, "devices": {"v5e": {"products": products}}}))
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    ways = ("kernel", "xla")
    fastest = lambda f, m, w=ways: tuning.fastest("v5e", f, None, (m, 64, 64), 32, w)  # noqa: E731
    assert (fastest("int4", 1), fastest("int4", 999), fastest("int8", 1)) == (
        "kernel",
        "xla",
        "xla",
    )
    assert fastest("int2", 8) == "kernel"  # Of another format, as it was not measured itself.
    assert fastest("int4", 16, ("kernel", "codes")) is None
    assert tuning.fastest("v5e", "int4", None, (1, 64, 64), 64, ways) is None  # of whole rows
    assert tuning.fastest("v6e", "int4", None, (1, 64, 64), 32, ways) is None
    # On that chip dispatch leaves to XLA what it was measured to do faster.
    monkeypatch.setattr(chips, "chip_of", lambda *_: chips.V5E)
    part = quantize(Int(4, 64), jnp.ones((64, 128)))
    leaf = CompressedArray.from_matrix(part, (128, 64), jnp.float32, (), (1,), (0,))
    report = jc.dispatch(lambda p, x: x @ p["w"]).report
    chosen = [report({"w": leaf}, jax.ShapeDtypeStruct((m, 128), jnp.float32)) for m in (8, 4096)]
    assert [c.implementation for (c,) in chosen] == ["kernel", "materialize"]
    assert "measured to be faster on this v5e" in chosen[1][0].reason


def test_tiles_of_tpus(tmp_path, monkeypatch):
    shipped = tpu_tiles.table("v5e", "few")

    def entry(inputs, **seconds):
        return {
            "kernel": "few",
            "inputs": inputs,
            "seconds": {k[1:]: v for k, v in seconds.items()},
        }

    (low, _), (high, kept) = shipped["outputs"]
    # 1024 is best for the larger product, but 256 loses less over both; one did not fit at 512.
    measured = [
        entry(low, w256=10.5, w512=20.0, w1024=10.0),
        entry(low, w256=1.0, w1024=1.5),
    ]
    found = tune.best_tiles(measured, chips.V5E)
    assert found == {"few": {**shipped, "outputs": [[low, 256], [high, kept]]}}
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps({"version": 1, "devices": {"v5e": {"tiles": found}}}))
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    assert tpu_tiles.few("v5e", 16, 4096, 4096, 4096, 2048, 1).n == 256
    monkeypatch.delenv(tuning.VARIABLE)
    assert tpu_tiles.few("v5e", 16, 4096, 4096, 4096, 2048, 1).n == shipped["outputs"][0][1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not a table"), ('{"version": 2}', "version 2"), ("[]", "version None")],
)
def test_what_is_no_table_is_refused(tmp_path, text, reason):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        tuning.read(path)


def test_wrong_arguments():
    for arguments in (["--shapes", "4x4"], ["--formats", "int5"]):
        with pytest.raises(SystemExit):
            tune.main(arguments)


def test_the_table_that_comes_with_the_library():
    from jaxcomp import kernels

    devices = tuning.read(f"{next(iter(kernels.__path__))}/tuned.json")
    for entry in itertools.chain.from_iterable(d["products"] for d in devices.values()):
        assert {"codes", "floats", "dense"} <= set(entry["seconds"])


COMPILED = {
    "format": "int4", "activation": None, "m": 16, "n": 512, "k": 4096, "group_size": 128
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not offline.available(), reason="no TPU compiler")
def test_tiles_by_the_compilers_schedule(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "WIDTHS", (256,))
    path = tmp_path / "tuned.json"
    arguments = ["--compile-only", "--topology", "v6e:1x1", "--output", str(path)]
    arguments += ["--formats", "int4", "--shapes", "16x512x4096"]
    for _ in range(2):
        assert tune.main(arguments) == 0
    assert "known" in capsys.readouterr().err  # The second time nothing is compiled.
    device = tuning.read(path)["v6e"]
    (entry,) = device["schedules"]
    assert COMPILED.items() <= entry.items() and entry["errors"] == {}
    # A core has two matrix units, each with 256 x 256 places that 4096 x 512 weights pass through
    # once, in rows of 16 at best; their bytes take 1154 cycles at the chip's bandwidth.
    assert 4096 * 512 / (2 * 256 * 16) < entry["cycles"]["256"] < 1154
    assert entry["spills"] == {"256": 0}
    assert device["tiles"]["few"]["source"] == tune.SCHEDULED


def test_measurements_count_before_schedules(monkeypatch):
    shipped = tpu_tiles.table("v5e", "few")
    (low, _), (high, kept) = shipped["outputs"]
    entry = {"kernel": "few", "inputs": low}
    mine = {"schedules": [{**entry, "cycles": {"256": 9.0, "512": 7.0, "1024": 8.0}}]}
    tune.choose(mine, chips.V5E)
    expected = {**shipped, "outputs": [[low, 512], [high, kept]]}
    assert mine["tiles"] == {"few": {**expected, "source": tune.SCHEDULED}}
    mine["widths"] = [{**entry, "seconds": {"256": 1.0, "512": 2.0, "1024": 3.0}}]
    tune.choose(mine, chips.V5E)
    assert mine["tiles"] == {"few": {**shipped, "outputs": [[low, 256], [high, kept]]}}


def test_a_tile_that_does_not_compile_is_told(monkeypatch):
    """Then each width is compiled alone, so that one that aborts the compiler stops no other."""
    calls = []

    def compiled(case, chip, topology, kernel, widths, timeout):
        calls.append(widths)
        good = schedules.Schedule("", [schedules.Loop(100, {"VSTORE:SPILL": 2}, depth=1)], {})
        return {w: (None, "no memory") if w == 512 else (good, None) for w in widths}

    monkeypatch.setattr(tune_compiled, "_compiled", compiled)
    case = tune.Case(**{**COMPILED, "n": 1000})
    found = tune_compiled.candidates(case, chips.V5E, "v5e:1x1")
    assert calls == [[256, 512], [256], [512]]
    assert found["errors"] == {"512": "no memory"} and found["spills"] == {"256": 2}
    assert found["cycles"] == {"256": 4 * 100}  # Four tiles of outputs, all inputs in one.


@pytest.mark.parametrize("format", ["int4", "fp8", "codebook"])
@pytest.mark.parametrize("chip", [chips.V5E, chips.V6E])
def test_what_is_measured_is_what_runs(monkeypatch, chip, format):
    """With the width that the table has, tiles are those of a product that is not told."""
    found, make = [], tpu.scratch_of

    def watched(tile, *rest):
        found.append(tile)
        return make(tile, *rest)

    monkeypatch.setattr(tpu, "scratch_of", watched)
    case = tune.Case(format, None, 16, 4096, 4096, 64)
    weight, x = tune_compiled.weight_shapes(case), jax.ShapeDtypeStruct((16, 4096), jnp.bfloat16)
    _, tile, call = tune.tiled(case, chip, weight)
    options = reference.Options(None, None, "bfloat16")
    jax.eval_shape(lambda x, weight: call(tile.n, x, weight), x, weight)
    jax.eval_shape(lambda x, weight: tpu.matmul(x, weight, None, options, chip), x, weight)
    measured, runs = found
    assert measured == runs


def test_compiling_without_the_compiler_or_a_topology(monkeypatch, capsys):
    arguments = ["--compile-only", "--topology", "v5e:1x1"]
    monkeypatch.setattr(offline, "available", lambda: False)
    assert tune.main(arguments) == 2 and "pip install libtpu" in capsys.readouterr().err
    monkeypatch.setattr(offline, "available", lambda: True)
    for wrong in (["--compile-only"], arguments[1:], [*arguments[:2], "h100:8"]):
        with pytest.raises(SystemExit):
            tune.main(wrong)
    assert "write a chip of v5e, v5p, v6e, 7x" in capsys.readouterr().err
