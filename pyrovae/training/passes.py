"""What is changed in a traced graph before Inductor compiles it."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from pyrovae.training.native import Native

__all__ = ["drop_known_comparisons", "use_library"]

aten = torch.ops.aten
_SAME_VALUES = (  # where they do not change the shape
    aten.detach.default,
    aten.alias.default,
    aten.clone.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
)
_PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)


def drop_known_comparisons(graph: GraphModule) -> None:
    """Replaces comparisons of a tensor with one that is computed alike by their result.

    The density of Pyro's ``Delta`` asks whether a value equals the point. Both come from the same computation, but
    Inductor may repeat it in two kernels that round differently (one vectorized and one not), and the density would be
    zero. A comparison of one node with itself is torch's test for NaN, and stays.

    Args:
        graph: a trace; its nodes are numbered so that two of the same number hold the same values.
    """
    fresh = itertools.count()
    numbers: dict[Node, int] = {}
    known: dict[str, int] = {}
    views: dict[Node, list[Node]] = {}  # of the memory of a node
    for node in list(graph.graph.nodes):
        numbers[node] = _number(node, numbers, known, fresh)
        views.setdefault(_base(node), []).append(node)
        if node.target is aten.eq.Tensor and _is_known(node.args[0], node.args[1], numbers):
            value = node.meta["val"]
            with graph.graph.inserting_before(node):
                options = {"dtype": torch.bool, "device": value.device}
                true = graph.graph.call_function(aten.full.default, (list(value.shape), True), options)
            true.meta["val"], numbers[true], views[true] = value, next(fresh), [true]
            _replace(node, true)
        for changed in _written(node):
            numbers.update((view, next(fresh)) for view in views[_base(changed)])
    graph.recompile()


def _number(node: Node, numbers: dict[Node, int], known: dict[str, int], fresh: itertools.count[int]) -> int:
    """The number of an earlier node that computes the same from the same, else a new one."""
    schema = _schema(node)
    if schema is None or schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags:  # type: ignore[union-attr]
        return next(fresh)
    source: Any = node.args[0] if node.args else None
    if node.target in _SAME_VALUES and node.meta["val"].shape == source.meta["val"].shape:
        return numbers[source]
    inputs = [numbers[each] for each in node.all_input_nodes]
    plain = map_arg((node.args, node.kwargs), lambda each: inputs[node.all_input_nodes.index(each)])
    return known.setdefault(f"{node.target} {plain} of {inputs}", next(fresh))


def _is_known(one: Any, two: Any, numbers: dict[Node, int]) -> bool:
    """Whether two operands of a comparison are different nodes of the same values, broadcast or not."""
    if one is two:
        return False
    while isinstance(one, Node) and one.target is aten.expand.default:
        one = one.args[0]
    while isinstance(two, Node) and two.target is aten.expand.default:
        two = two.args[0]
    return isinstance(one, Node) and isinstance(two, Node) and numbers[one] == numbers[two]


def _schema(node: Any) -> Any:
    """An operator's schema; ``None`` for a node that calls none."""
    return node.target._schema if isinstance(getattr(node, "target", None), torch._ops.OpOverload) else None


def _written(node: Node) -> list[Node]:
    """The nodes that an operator updates in place, those in lists too."""
    schema = _schema(node)
    found: list[Node] = []
    for index, argument in enumerate(schema.arguments if schema is not None else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            map_arg(given, found.append)
    return found


def _base(node: Any) -> Any:
    """The node whose memory a view shows, alone or as one of several."""
    while _is_view(node):
        node = node.args[0]
    return node


def _is_view(node: Any) -> bool:
    schema = _schema(node)
    aliases = schema is not None and any(given.alias_info is not None for given in schema.returns)
    return aliases or node.target is operator.getitem


def use_library(graph: GraphModule, library: Native) -> None:
    """Gives float32 products to oneDNN's small kernels, and takes powers of step counts out of the loops over
    parameters.

    Args:
        graph: a trace, whose nodes still hold their shapes.
        library: that has the operators.
    """
    for node in list(graph.graph.nodes):
        if node.target in _PRODUCTS and library.product is not None:
            *bias, left, right = node.args
            if not node.kwargs and _fits(left, right, *bias):
                with graph.graph.inserting_before(node):
                    found = graph.graph.call_function(library.product, (left, right, *(bias or [None])))
                found.meta["val"] = node.meta["val"]  # which a product of this one asks for
                _replace(node, found)
        elif node.target is aten._foreach_pow.ScalarAndTensor and all(map(_is_scalar, node.args[1])):
            base, exponents = node.args
            with graph.graph.inserting_before(node):
                together = graph.graph.call_function(aten.stack.default, (exponents,))
                raised = graph.graph.call_function(library.powers, (float(base), together))
                for user in list(node.users):  # each takes one of the list
                    _replace(user, graph.graph.call_function(aten.select.int, (raised, 0, user.args[1])))
            graph.graph.erase_node(node)
    graph.recompile()


def _replace(node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _fits(left: Node, right: Node, *bias: Node) -> bool:
    """Whether matrices are as the library's product takes them."""
    tensors = [node.meta["val"] for node in (left, right, *bias)]
    plain = all(each.dtype == torch.float32 and each.device.type == "cpu" and each.numel() for each in tensors)
    columns = tensors[1].shape[-1:]
    fitting = all(each.shape == columns and each.stride() == (1,) for each in tensors[2:])
    return plain and fitting and all(_is_matrix(each) for each in tensors[:2])


def _is_matrix(tensor: Tensor) -> bool:
    """Whether rows or columns lie one after the other, apart from each other."""
    (rows, columns), (row_stride, column_stride) = tensor.shape[-2:], tensor.stride()[-2:]
    by_rows = (columns == 1 or column_stride == 1) and (rows == 1 or row_stride >= columns)
    by_columns = (rows == 1 or row_stride == 1) and (columns == 1 or column_stride >= rows)
    return by_rows or by_columns


def _is_scalar(node: Node) -> bool:
    value = node.meta["val"]
    return value.dim() == 0 and value.dtype == torch.float32 and value.device.type == "cpu"
