"""Reading a model function as a graph of named weights, and evaluating it with handlers."""

from jaxcomp.graph.interpret import Handler, Plain, interpret
from jaxcomp.graph.sites import Layout, Site
from jaxcomp.graph.trace import Graph, trace

__all__ = ["Graph", "Handler", "Layout", "Plain", "Site", "interpret", "trace"]
