"""All layer algorithms under the common suite."""

from tests.conformance_algorithms import ConformanceSuite


class TestAlgorithms(ConformanceSuite):
    pass
