"""Loops and regions in the compiler's schedules, of which kernels' cycles are counted."""

from jaxcomp.kernels import schedules, tune_compiled
from jaxcomp.kernels.quantized_matmul.tpu_tiles import Tile

from benchmarks import tpu_marks, tpu_summary

# A loop over steps, in which a branch skips two bundles, and a loop of one inside it.
BUNDLES = """
   0x0   :  { %1 = smov 0 }
   0x1 LB: > { %2 = vld [vmem:%1] }
   0x2   : > { %3 = sbr.rel (%p1) target = $region5 }
   0x3   : > { %4 = vmatmul %2 }
   0x4   : > { %5 = vst [vmem:spill] %4 }
   0x5 PF: > { %6 = vadd %5 } /* Start/End empty region 5 :: Start region 6 */
   0x6 LB: >> { %7 = vadd %6 }
   0x7   : >> { %8 = sbr.rel (%p2) target = $region9 }
   0x8   : > { %9 = sbr.rel (!%p3) target = $region10 }
"""
USED = """
== CAPACITY:
MXU, VALU, VSTORE:SPILL
  2     4             1
== UTILIZATION:
0 0 0
0 0 0
0 0 0
1 0 0
0 0 1
0 1 0
0 1 0
0 0 0
0 0 0
"""


def test_bundles_of_loops_and_of_what_a_branch_skips():
    found = schedules.parse(BUNDLES, USED, "kernel")
    assert found.slots == {"MXU": 2, "VALU": 4, "VSTORE:SPILL": 1}
    assert [(loop.depth, loop.bundles) for loop in found.loops] == [(1, 6), (2, 2)]
    assert found.step().spills == 1 and found.inner()[0].used["VALU"] == 1
    assert [(r.bundles, r.used["MXU"], r.spills) for r in found.regions] == [(2, 1, 1)]


def test_outer_branches_of_a_step():
    """Those inside a branch around all, with what they hold."""
    bundles = """
   0x0   : > { %1 = sbr.rel (%p0) target = $region1 }
   0x1   : > { %2 = sbr.rel (%p1) target = $region2 }
   0x2   : > { %3 = sbr.rel (%p2) target = $region3 }
   0x3   : > { %4 = vmatmul %2 }
   0x4 PF: > { %5 = vst [vmem:spill] %4 } /* Start/End empty region 3 */
   0x5 PF: > { %6 = vadd %5 } /* Start/End empty region 2 */
   0x6 PF: > { %7 = vadd %6 } /* Start/End empty region 1 */
"""
    found = schedules.parse(bundles, USED)
    assert [(r.bundles, r.used["MXU"]) for r in found.outer] == [(3, 1)]
    assert [r.bundles for r in found.regions] == [1]


def test_steps_with_one_block_of_outputs_have_no_loops():
    step = schedules.Loop(bundles=100, depth=1)
    decodes, finds = (schedules.Bundles(bundles, {"MXU": 200}) for bundles in (50, 30))
    schedule = schedules.Schedule("kernel", [step], {}, [schedules.Bundles(5), decodes, finds])
    cycles = tune_compiled.dense_cycles(schedule, Tile(16, 256, 512, 256), 512, [1, 3])
    assert cycles == 2 * (4 * (100 - 50 - 30) + 50 + 3 * 30)


def test_rows_replace_those_of_the_file_and_are_held_against_marks(tmp_path):
    def row(chip, case, cycles, basis, spills=0, date="2026-02-02"):
        return tpu_marks.Row(chip, case, cycles, basis, 0.5, spills, date)

    path = tmp_path / "table.txt"
    few, many = "few W4A16 g128 M=1 128x128", "many W4A16 g128 M=2048 128x128"
    dense = row("v5e", f"{many} in bf16", 100, None, 7)
    old = [row("v6e", few, 13, 10, date="2026-01-01"), dense, row("v5e", few, 3, 1, 4)]
    path.write_text("A note.\n\n" + "\n".join(map(str, [tpu_marks.head(), *old])))
    rows = tpu_marks.save(path, [row("v5e", many, 112, 100), row("v5e", few, 1, 2)], [few, many])
    assert [(r.chip, r.case) for r in rows] == [
        ("v5e", few), ("v5e", many), ("v5e", dense.case), ("v6e", few)
    ]  # fmt: skip
    assert tpu_marks.save(path, [], [few, many]) == tpu_marks.read(path.read_text())[0]
    text = path.read_text()
    assert text.startswith("A note.\n\n| chip") and text.count(few) == 2 + 4
    told = [line for line in text.splitlines() if line.startswith(("met", "NOT MET"))]
    words = [line.partition(":")[0] for line in told]
    assert words == ["met", "NOT MET", "met", "met", "NOT MET", "met"]
    assert "v6e: W4A16 g128 of 1 and 16 rows: at most 1.2 of the bytes' cycles (1.300: " in told[4]


def test_the_page_has_the_cycles_of_the_file():
    rows, _ = tpu_marks.read(tpu_summary.RESULTS.read_text())
    _, table, _ = tpu_summary.parts(tpu_summary.PAGE.read_text())
    assert table == tpu_summary.summary(rows), "Run python -m benchmarks.tpu_summary."
    assert len(table.splitlines()) > 40 and " - |" not in table
