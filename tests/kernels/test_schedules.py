"""Loops and regions in the compiler's schedules, of which kernels' cycles are counted."""

from jaxcomp.kernels import schedules

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
