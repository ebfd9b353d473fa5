"""The C++ beside Inductor gives what torch gives, and a repeated graph what as many calls give."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyrovae.training import graph
from pyrovae.training import native as library
from pyrovae.training.graph import compile_function
from pyrovae.training.native import native
from pyrovae.training.passes import drop_known_comparisons, use_library

pytestmark = pytest.mark.usefixtures("inductor")
aten = torch.ops.aten


def matrices(batch: tuple[int, ...], rows: int, columns: int) -> list[Tensor]:
    """One matrix, or a batch of them, in each of the layouts that a graph may hand over."""
    plain = torch.randn(*batch, rows, columns)
    wide = torch.randn(*batch, rows, columns + 3)[..., :columns]
    return [
        plain,
        wide,
        torch.randn(*batch, columns, rows).mT,
        torch.randn(*batch, columns + 2, rows)[..., :columns, :].mT,
    ]


def traced(function: Callable[..., Tensor], *args: Tensor) -> torch.fx.GraphModule:
    return make_fx(function)(*args)


def targets(module: torch.fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.skipif(native() is None or native().product is None, reason="no kernels for this processor")
def test_products_are_torchs_in_every_layout() -> None:
    """Blocks of 64 columns and 128 rows, and what is left over; one graph holds all cases."""
    torch.manual_seed(0)
    cases = []
    for (rows, depth, columns), batch in itertools.product(
        [(1, 3, 2), (5, 1, 70), (130, 65, 64), (2, 7, 1)], [(), (3,)]
    ):
        lefts, rights = matrices(batch, rows, depth), matrices(batch, depth, columns)
        cases += list(itertools.product(lefts, rights))
    cases.append((torch.randn(1, 4, 3).expand(5, 4, 3), torch.randn(5, 3, 2)))
    x, weight, bias = torch.randn(130, 65), torch.randn(70, 65), torch.randn(70)

    def function(*args: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        pairs = zip(args[::2], args[1::2], strict=True)
        return [torch.nn.functional.linear(x, weight, bias), *(one @ two for one, two in pairs)], []

    flat = [each for pair in cases for each in pair]
    results, _ = compile_function(function, flat, [torch.zeros(1)])(*flat)
    expected = [x @ weight.mT + bias, *(one @ two for one, two in cases)]
    for result, product in zip(results, expected, strict=True):
        assert result.shape == product.shape
        torch.testing.assert_close(result, product, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("left", "right", "replaced"),
    [
        (torch.ones(2, 3), torch.ones(3, 4), True),
        (torch.ones(2, 3).double(), torch.ones(3, 4).double(), False),
        (torch.ones(1, 3).expand(2, 3), torch.ones(3, 4), False),  # rows that share memory
        (torch.ones(4, 6)[::2, ::2], torch.ones(3, 4), False),
        (torch.ones(0, 3), torch.ones(3, 4), False),
    ],
)
def test_which_products_the_library_takes(left: Tensor, right: Tensor, replaced: bool) -> None:
    found = native()
    if found is None or found.product is None:
        pytest.skip("no kernels for this processor")
    module = traced(torch.mm, left, right)
    use_library(module, found)
    assert (found.product in targets(module)) == replaced
    assert (aten.mm.default in targets(module)) != replaced


def test_a_product_of_a_product_is_taken_too() -> None:
    found = native()
    if found is None or found.product is None:
        pytest.skip("no kernels for this processor")
    matrices = torch.randn(3, 4), torch.randn(4, 5), torch.randn(5, 2)
    module = traced(lambda a, b, c: a @ b @ c, *matrices)
    use_library(module, found)
    assert targets(module).count(found.product) == 2


def test_powers_of_step_counts_are_taken_once_and_agree() -> None:
    parameters = [torch.ones(3), torch.ones(2, 2)]
    steps = [torch.tensor(4.0), torch.tensor(9.0)]

    def function(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        for parameter, power in zip(parameters, torch._foreach_pow(0.9, steps), strict=True):
            parameter.add_(x * power)
        return [parameter.sum() for parameter in parameters], []

    compiled = compile_function(function, [torch.tensor(2.0)], [*parameters, *steps])
    results, _ = compiled(torch.tensor(2.0))
    assert [float(result) for result in results] == pytest.approx(
        [3 * (1 + 2 * 0.9**4), 4 * (1 + 2 * 0.9**9)], rel=1e-6
    )


def walk(total: Tensor, calls: Tensor) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    def step(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        total.add_(x + torch.randn(4)).mul_(0.5)
        calls.add_(1)
        return [total.sum()], []

    return step


def test_a_repeated_graph_is_as_many_calls() -> None:
    states = []
    for many in (False, True):
        total, calls, x = torch.zeros(4), torch.zeros((), dtype=torch.int64), torch.arange(4.0)
        compiled = compile_function(walk(total, calls), [x], [total, calls], repeats=True)
        assert int(calls) == 0
        torch.manual_seed(3)
        if many:
            compiled.repeat(5)
            x.fill_(1.0)  # the argument is taken where it lies
            compiled.repeat(2)
        else:
            for value in [x.clone()] * 5 + [torch.ones(4)] * 2:
                compiled(value)
        states.append((total, calls))
    assert int(states[1][1]) == 7
    assert torch.equal(states[0][0], states[1][0])


def test_without_the_library_a_graph_is_repeated_from_python(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "Native", lambda: 1 / 0)
    monkeypatch.setattr(graph, "native", library.native.__wrapped__)
    total, calls, x = torch.zeros(4), torch.zeros((), dtype=torch.int64), torch.ones(4)
    with caplog.at_level(logging.INFO, logger="pyrovae"):
        compile_function(walk(total, calls), [x], [total, calls], repeats=True).repeat(3)
    assert int(calls) == 3
    assert "without pyrovae's own C++: division by zero" in caplog.text


def test_an_operator_that_fails_in_a_loop_says_so() -> None:
    matrix = torch.eye(2)

    def function(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        given = torch.linalg.cholesky(matrix)
        matrix.sub_(x)
        return [given.sum()], []

    compiled = compile_function(function, [torch.full((2, 2), 0.6)], [matrix], repeats=True)
    with pytest.raises(RuntimeError, match=r"not positive-definite"):
        compiled.repeat(3)


# ---------------------------------------------------------------------------------------------------------
# Comparisons of a value with itself


def compares(function: Callable[..., Tensor], *args: Tensor) -> bool:
    """Whether a comparison is left in the graph; what it computes stays the same."""
    torch.manual_seed(0)
    module = traced(function, *args)
    drop_known_comparisons(module)
    copies = [arg.clone() for arg in args]
    torch.manual_seed(1)
    expected = function(*args)
    torch.manual_seed(1)
    assert torch.equal(module(*copies), expected)
    return aten.eq.Tensor in targets(module)


def test_a_value_that_is_computed_twice_alike_is_known_to_equal_itself() -> None:
    assert not compares(lambda x: x.exp() == x.detach().exp(), torch.randn(3))
    assert not compares(lambda x: x.exp().expand(2, 3) == x.exp().view(3), torch.randn(3))
    assert not compares(lambda x: (2 * x).sum(0) == (2 * x).sum(0), torch.randn(3, 2))


def test_what_may_differ_is_compared() -> None:
    x = torch.randn(3)
    assert compares(lambda x: torch.isfinite(x.log()), x)  # by a comparison with itself, which NaN fails
    assert compares(lambda x, y: x == y, x, x.clone())
    assert compares(lambda x: x.exp() == x.exp2(), x)
    assert compares(lambda x: x.sum(0) == x.sum(1), torch.ones(2, 2))
    assert compares(lambda x: torch.randn(3) == torch.randn(3), x)
    assert compares(lambda x: x.expand(2, 3).sum() == x.sum(), x)
    assert compares(lambda x: x[:2] == x[1:], x)


def test_a_tensor_that_is_updated_in_between_is_compared() -> None:
    def function(x: Tensor) -> Tensor:
        before = x.exp()
        view = x.view(1, 3)
        view.add_(1.0)
        return before == x.exp()

    def together(x: Tensor) -> Tensor:
        before = x.exp()
        torch._foreach_add_([x], 1.0)
        return before == x.exp()

    def part(x: Tensor) -> Tensor:
        before = x.exp()
        x.split(2)[0].add_(1.0)
        return before == x.exp()

    assert compares(function, torch.randn(3))
    assert compares(part, torch.randn(3))
    assert compares(together, torch.randn(3))
