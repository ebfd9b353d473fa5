"""Local reparameterization and flipout: the moments of weight sampling, unbiased gradients, and less variance."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyrovae
from pyrovae.errors import ArgumentError, ModelGuideError
from pyrovae.guides import FullRank, MeanField
from pyrovae.models import BNN
from pyrovae.noise import Kind, Noise, flipout, local_reparameterization
from pyrovae.training.programs import local_params

Z = 5.0  # standard errors; of some hundred comparisons of normal means, one fails by chance in 1.7e4 runs


@pytest.fixture(autouse=True)
def seeded() -> Any:
    with torch.random.fork_rng():
        pyro.set_rng_seed(0)
        yield


class Layer(nn.Module):
    """A layer whose weight and bias are latent sites of their own, as in a model written by hand."""

    def __init__(self, function: Any, weight: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.laws = {
            "w": dist.Normal(torch.randn(weight), torch.rand(weight) + 0.1).to_event(len(weight)),
            "b": dist.Normal(torch.randn(weight[0]), torch.rand(weight[0]) + 0.1).to_event(1),
        }

    def forward(self, x: Tensor) -> Tensor:
        shape = self.laws["w"].event_shape
        w = pyro.sample("w", dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape)))
        b = pyro.sample("b", dist.Normal(torch.zeros(self.laws["b"].event_shape), 1.0).to_event(1))
        return self.function(x, w, b)

    def draws(self, x: Tensor, kind: Kind | None, number: int) -> Tensor:
        """Outputs of independent draws, `number x n x …`."""
        out = []
        for _ in range(number):
            values = {name: law.sample() for name, law in self.laws.items()}
            model = _with(self, values)
            if kind is None:
                out.append(model(x))
            else:
                with Noise(kind, self.laws):
                    out.append(model(x))
        return torch.stack(out)


def _with(model: Any, values: dict[str, Tensor]) -> Any:
    """The model with these values at its latent sites, which stay latent."""
    guide = pyro.poutine.trace(
        lambda *args: [pyro.sample(n, dist.Delta(v, event_dim=v.dim())) for n, v in values.items()]
    )
    return pyro.poutine.replay(model, trace=guide.get_trace())


LAYERS = {
    "linear": (F.linear, (2, 3), (4, 3)),
    "sequence": (F.linear, (2, 3), (4, 5, 3)),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, padding=1), (2, 1, 3, 3), (3, 1, 4, 4)),
    "strided": (lambda x, w, b: F.conv1d(x, weight=w, bias=b, stride=2), (2, 2, 3), (3, 2, 7)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "flipout"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_have_the_moments_of_sampled_weights(name: str, kind: Kind) -> None:
    """Mean and covariance over all places of each data point, against the closed form of a linear map."""
    function, weight, shape = LAYERS[name]
    layer, x = Layer(function, weight), torch.randn(shape)
    w, b = layer.laws["w"].base_dist, layer.laws["b"].base_dist
    number = 1000
    drawn = layer.draws(x, kind, number)

    def outputs(flat: Tensor) -> Tensor:
        return function(x, flat[: w.mean.numel()].view(weight), flat[w.mean.numel() :])

    means = torch.cat([w.mean.flatten(), b.mean])
    scales = torch.cat([w.stddev.flatten(), b.stddev])
    jacobian = torch.func.jacrev(outputs)(means)  # exact, for the map is linear
    for n in range(len(x)):
        J = jacobian[n].flatten(0, -2)
        exact = J * scales.square() @ J.mT
        mine = drawn[:, n].flatten(1)
        spread = exact.diagonal().sqrt()
        error = (mine.mean(0) - outputs(means)[n].flatten()) / (spread / math.sqrt(number))
        assert error.abs().max() < Z
        # The standard error of a covariance of Gaussians is √((σ_i² σ_j² + c²)/number).
        tolerance = ((spread[:, None] * spread).square() + exact.square()).div(number).sqrt()
        assert ((mine.T.cov() - exact) / tolerance).abs().max() < Z


@pytest.mark.parametrize("kind", ["local", "flipout"])
def test_noise_of_data_points_is_decorrelated(kind: Kind) -> None:
    layer, x = Layer(F.linear, (2, 3)), torch.randn(1, 3).expand(2, 3)
    drawn = layer.draws(x, kind, 2000)[:, :, 0]
    shared = layer.draws(x, None, 50)[:, :, 0]
    assert torch.equal(shared[:, 0], shared[:, 1])
    # The bias keeps its draw under flipout, and its share of the correlation.
    bias = float(layer.laws["b"].base_dist.variance[0] / drawn.var(0).mean()) if kind == "flipout" else 0.0
    assert float(drawn.T.corrcoef()[0, 1]) == pytest.approx(bias, abs=5 / math.sqrt(2000))


def problem(n: int = 50) -> tuple[BNN, MeanField, Tensor, Tensor]:
    x = torch.randn(n, 3)
    y = torch.sin(x.sum(-1))
    model = BNN([3, 8, 1], likelihood={"name": "normal", "scale": 0.5})
    guide = MeanField(model, init_scale=0.3)
    with local_params(model, guide):
        guide(x, y)
    return model, guide, x, y


def gradients(gradient: str, number: int) -> tuple[Tensor, Tensor]:
    """Draws of the ELBO and of its gradient in the guide's means, at the same parameters."""
    pyro.set_rng_seed(1)
    model, guide, x, y = problem()
    objective = pyrovae.ELBO(gradient=gradient, kl="analytic")
    values, grads = [], []
    with local_params(model, guide):
        loc = guide.locs.weights_unconstrained if hasattr(guide.locs, "weights_unconstrained") else guide.locs.weights
        for _ in range(number):
            loss = objective.differentiable_loss(model, guide, x, y)
            (grad,) = torch.autograd.grad(loss, [loc])
            values.append(loss.detach())
            grads.append(grad)
    return torch.stack(values), torch.stack(grads)


@pytest.mark.slow
def test_the_bound_and_its_gradient_are_those_of_sampled_weights_with_less_variance() -> None:
    number = 400
    values, grads = gradients("pathwise", number)
    for kind in ("local", "flipout"):
        theirs, others = gradients(kind, number)
        error = (values.mean() - theirs.mean()) / ((values.var() + theirs.var()) / number).sqrt()
        assert abs(float(error)) < Z
        z = (grads.mean(0) - others.mean(0)) / ((grads.var(0) + others.var(0)) / number).sqrt().clamp_min(1e-12)
        assert float(z.abs().max()) < Z
        assert float(others.var(0).sum()) < 0.6 * float(grads.var(0).sum())


def test_what_no_layer_takes_stays_stochastic() -> None:
    """LayerNorm's scale and shift are no linear layer: they keep the values that the guide drew."""
    x = torch.randn(5, 3)
    model = BNN(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)))
    guide = MeanField(model, init_scale=0.5)
    objective = pyrovae.ELBO(gradient="local", kl="analytic")
    with local_params(model, guide):
        objective.differentiable_loss(model, guide, x, torch.zeros(5)).backward()
    (scale,) = [p for name, p in guide.named_parameters() if "scale" in name]
    assert bool((scale.grad != 0).all())


def test_weights_of_two_layers_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x))).sum(-1)

    model, x = BNN(Twice()), torch.randn(5, 3)
    objective = pyrovae.ELBO(gradient="local", kl="analytic")
    with pytest.raises(ModelGuideError, match="used in more than one layer.*gradient='pathwise'"):
        pyrovae.fit(model, MeanField(model), (x, x[:, 0]), objective=objective, compile=False, progress=False)
    pathwise = pyrovae.ELBO(kl="analytic")
    pyrovae.fit(model, MeanField(model), (x, x[:, 0]), objective=pathwise, epochs=1, compile=False, progress=False)


@pytest.mark.parametrize(
    ("prior", "guide"), [("scale-mixture", MeanField), ("normal", FullRank)], ids=["no closed form", "not factorized"]
)
def test_other_posteriors_and_priors_are_refused(prior: str, guide: Any) -> None:
    model, x = BNN([3, 2, 1], prior=prior), torch.randn(5, 3)
    objective = pyrovae.ELBO(gradient="local", kl="analytic")
    with pytest.raises(ModelGuideError, match="factorized Gaussian with a closed-form KL"):
        pyrovae.fit(model, guide(model), (x, x[:, 0]), objective=objective, compile=False, progress=False)


def test_a_sampled_kl_is_refused() -> None:
    with pytest.raises(ArgumentError, match="gradient='local'.*give kl='analytic'"):
        pyrovae.ELBO(gradient="local")


def test_predictions_sample_weights() -> None:
    """One draw of a prediction is one function: the same input gives the same output."""
    model, guide, x, _ = problem()
    same = torch.cat([x[:1], x[:1]])
    components = pyrovae.predict(model, guide, same, samples=20).components.mean
    assert torch.equal(components[:, 0], components[:, 1])
    assert len(components[:, 0].unique()) == 20


def test_handlers_by_hand() -> None:
    """Both are effect handlers for models without any class of ours."""
    laws = {"w": dist.Normal(torch.zeros(1, 2), torch.ones(1, 2)).to_event(2)}

    def model(x: Tensor) -> Tensor:
        return F.linear(x, pyro.sample("w", dist.Normal(torch.zeros(1, 2), 1.0).to_event(2)))

    x = torch.ones(6, 2)
    assert len(model(x).unique()) == 1
    with local_reparameterization(laws):
        assert len(model(x).unique()) == 6
    with flipout(laws):
        assert 1 < len(model(x).unique()) <= 4
    assert len(model(x).unique()) == 1
