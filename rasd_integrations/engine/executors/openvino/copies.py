"""Copies of a graph for single step widths, which share its weights.

OpenVINO fits a graph to another width in a third of a plain step. A copy that only ever runs one width is fitted once.
"""

from __future__ import annotations

from collections.abc import Sequence

import openvino as ov
from openvino import opset13 as opset
from openvino.op import Parameter


def with_copies(graph: ov.Model, count: int) -> ov.Model:
    """Return a graph of ``graph`` and ``count`` copies; further inputs ``[1]`` say which runs: the first that is True.

    What its inputs hold is copied, so memory that steps write has to be given by its address.
    """
    whole = graph
    for flags in range(count):
        whole = _either(graph.clone(), whole, flags)
    return whole


def flags(width: int, widths: Sequence[int]) -> list[bool]:
    """Return the further inputs for a step of ``width``, of a graph with copies for ``widths``."""
    return [width == own for own in widths]


def _either(one: ov.Model, other: ov.Model, flags: int) -> ov.Model:
    """Return a graph that runs ``one`` if its flag is True, else ``other``, whose last ``flags`` inputs are flags."""
    shared = one.get_parameters()
    inputs = [Parameter(p.get_element_type(), p.get_partial_shape()) for p in shared]
    mine, *theirs = (Parameter(ov.Type.boolean, ov.PartialShape([1])) for _ in range(1 + flags))
    node = opset.if_op(mine)
    node.set_then_body(one)
    node.set_else_body(other)
    behind = other.get_parameters()
    for outer, inner, same in zip(inputs, shared, behind, strict=False):
        node.set_input(outer.output(0), inner, same)
    for flag, same in zip(theirs, behind[len(shared) :], strict=True):
        node.set_input(flag.output(0), None, same)
    results = zip(one.get_results(), other.get_results(), strict=True)
    return ov.Model([node.set_output(*pair) for pair in results], [*inputs, mine, *theirs], "steps")
