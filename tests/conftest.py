"""Shared by all tests: a fixed seed, an empty parameter store, no display."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib
import pyro
import pytest
import torch

from pyrovae.training import graph

matplotlib.use("Agg")
graph._OPTIONS["cpp_cache_precompile_headers"] = True  # which pays where as many graphs are compiled as here


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Every test starts from the same random state and leaves nothing in Pyro's global store."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


@pytest.fixture(autouse=True)
def skip_without_cuda(request: pytest.FixtureRequest) -> None:
    """Tests marked ``cuda`` run where there is a device."""
    if request.node.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


_INDUCTOR = graph._inductor


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps are traced, and compared with the eager ones as ever, but torch runs the graph.

    Whether a step has a static structure and does what the eager one does shows there. Inductor takes ten seconds for a
    graph, so that it compiles some of each kind: in tests that ask for ``inductor``.
    """
    monkeypatch.setattr(graph, "_inductor", lambda made, inputs, device, repeats: (made, None))


@pytest.fixture
def inductor(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps go through Inductor, as a user's do."""
    monkeypatch.setattr(graph, "_inductor", _INDUCTOR)
