"""Planning: what a compressed model takes on devices that are not here, from their compiler."""

from jaxcomp.planner.report import Plan, plan
from jaxcomp.planner.shapes import NAMED
from jaxcomp.planner.targets import DEVICES, topology

__all__ = ["DEVICES", "NAMED", "Plan", "plan", "topology"]
