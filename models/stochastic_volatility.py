"""Stochastic volatility: returns whose log-variance is an autoregression."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, require_count, require_positive, unknown_name
from pyrovae.models.markov import MarkovChain, log_likelihood_on_grid
from pyrovae.registry import MODELS

__all__ = ["StochasticVolatility"]

Parametrization = Literal["centred", "non-centred"]


@MODELS.register
class StochasticVolatility(PyroModule):
    r"""Series of returns with a log-variance that is a stationary autoregression of order 1.

    .. math:: h_1 \sim \mathcal{N}\Bigl(\mu, \frac{\sigma^2}{1 - \phi^2}\Bigr), \qquad
        h_{t+1} = \mu + \phi (h_t - \mu) + \sigma \eta_t, \qquad x_t = e^{h_t / 2} \varepsilon_t

    with standard normal η and ε, and the priors

    .. math:: \mu \sim \mathcal{N}(0, s_\mu^2), \qquad \tfrac{\phi + 1}{2} \sim \mathrm{Beta}(a, b), \qquad
        \sigma^2 \sim \mathrm{InverseGamma}(c, d)

    whose defaults are those of Kim, Shephard & Chib for daily returns in per cent, their mean taken off. One data
    point is a series `T` with parameters of its own. The sites are ``"mu"``, ``"persistence"`` (which is (φ + 1)/2),
    ``"variance"`` (σ²), and ``"h"``, `n x T x 1` (``"non-centred"``: ``"noise"``, `n x T`, of which h is a linear
    function).

    Args:
        parametrization: ``"centred"`` samples h itself, whose posterior precision has few non-zeros: for
            ``SparsePrecision``. ``"non-centred"`` samples standard normal noise: for ``ASVI`` and ``MeanField``. It
            takes time O(T²).
        mean_scale: s_μ.
        persistence: a and b.
        variance: c and d.
        steps: length of the series that are generated.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Kim, Shephard & Chib 1998, https://doi.org/10.1111/1467-937X.00050.

    Example:
        >>> model = StochasticVolatility(steps=50)
        >>> x = model(size=3)
        >>> x.shape
        torch.Size([3, 50])
        >>> model.log_likelihood(x, mu=torch.zeros(3), phi=torch.full((3,), 0.95), sigma=torch.full((3,), 0.2)).shape
        torch.Size([3])
    """

    default_guide: ClassVar[str] = "SparsePrecision"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        parametrization: Parametrization = "centred",
        mean_scale: float = 10.0**0.5,
        persistence: Sequence[float] = (20.0, 1.5),
        variance: Sequence[float] = (2.5, 0.025),
        steps: int = 500,
    ) -> None:
        super().__init__()
        if parametrization not in get_args(Parametrization):
            raise unknown_name("parametrization", parametrization, get_args(Parametrization))
        self.parametrization = parametrization
        self.data_shape = (require_count("steps", steps),)
        scale = require_positive("mean_scale", mean_scale)
        self.register_buffer("mean_scale", torch.tensor(float(scale)), persistent=False)
        for argument, pair in (("persistence", persistence), ("variance", variance)):
            if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
                raise ArgumentError(f"{argument} is {pair!r}; it must be two numbers above 0")
            numbers = [float(require_positive(f"{argument}[{place}]", value)) for place, value in enumerate(pair)]
            self.register_buffer(f"{argument}_prior", torch.tensor(numbers), persistent=False)

    def chain(self, mu: Tensor, phi: Tensor, sigma: Tensor, steps: int) -> MarkovChain:
        """p(h_{1:T}) for parameters `*batch`: batch shape `*batch`, event shape (T, 1)."""
        first = dist.Normal(mu.unsqueeze(-1), (sigma * (1 - phi.square()).rsqrt()).unsqueeze(-1)).to_event(1)
        mean, slope, scale = (part[..., None, None] for part in (mu, phi, sigma))

        def step(h: Tensor, inputs: Tensor | None) -> dist.TorchDistribution:
            return dist.Normal(mean + slope * (h - mean), scale).to_event(1)

        return MarkovChain(first, step, steps)

    def log_variance(self, noise: Tensor, mu: Tensor, phi: Tensor, sigma: Tensor) -> Tensor:
        r"""h, `*batch x T`, from standard normal noise `*batch x T` and parameters `*batch`.

        .. math:: h_t = \mu + \sigma \Bigl(
            \frac{\phi^{t-1} e_1}{\sqrt{1 - \phi^2}} + \sum_{s=2}^t \phi^{t-s} e_s \Bigr)
        """
        times = torch.arange(noise.shape[-1], device=noise.device)
        lags = times.unsqueeze(-1) - times
        powers = (phi[..., None, None] ** lags.clamp(min=0).to(noise)).tril()
        first = (1 - phi.square()).rsqrt().unsqueeze(-1)
        started = torch.cat([noise[..., :1] * first, noise[..., 1:].expand(*first.shape[:-1], -1)], dim=-1)
        return mu.unsqueeze(-1) + sigma.unsqueeze(-1) * (powers @ started.unsqueeze(-1)).squeeze(-1)

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x``, or generates ``size`` series when it is ``None``; returns the series.

        Args:
            x: A `n x T` tensor of returns, or ``None``.
            size: number of series to generate.

        Raises:
            DataError: ``x`` is not a batch of series.
        """
        if x is not None:
            _require_returns(x)
        steps = self.data_shape[0] if x is None else x.shape[1]
        with pyro.plate("data", size if x is None else len(x), device=self.mean_scale.device):
            mu = pyro.sample("mu", dist.Normal(torch.zeros_like(self.mean_scale), self.mean_scale))
            phi = 2 * pyro.sample("persistence", dist.Beta(*self.persistence_prior)) - 1
            sigma = pyro.sample("variance", dist.InverseGamma(*self.variance_prior)).sqrt()
            if self.parametrization == "centred":
                h = pyro.sample("h", self.chain(mu, phi, sigma, steps)).squeeze(-1)
            else:
                zeros = self.mean_scale.new_zeros(steps)
                noise = pyro.sample("noise", dist.Normal(zeros, 1.0).to_event(1))
                h = self.log_variance(noise, mu, phi, sigma)
            return pyro.sample("x", dist.Normal(torch.zeros_like(h), (h / 2).exp()).to_event(1), obs=x)

    def log_likelihood(self, x: Tensor, mu: Tensor, phi: Tensor, sigma: Tensor, points: int = 300) -> Tensor:
        """``log p(x | μ, φ, σ)`` in nats of each series, `*batch x n`, the volatilities integrated out by quadrature.

        The grid spans 7 stationary standard deviations on both sides of μ; its spacing must not be above the standard
        deviation of a step, in the same units √(1 − φ²): 300 points serve up to φ = 0.9989.

        Args:
            x: A `n x T` tensor of returns.
            mu: `*batch x n`.
            phi: `*batch x n`, between −1 and 1.
            sigma: `*batch x n`, above 0.
            points: of the grid; the time grows with their square.

        Raises:
            ArgumentError: the points are too few for the largest φ.
        """
        _require_returns(x)
        grid = torch.linspace(-7.0, 7.0, require_count("points", points, 2), dtype=x.dtype, device=x.device)
        step = (1 - phi.square()).sqrt()
        if bool((step < grid[1] - grid[0]).any()):
            raise ArgumentError(
                f"points is {points}, too few for phi = {phi.abs().max():.6g}; it must be at least"
                f" {2 + int(14.0 / step.min())}"
            )
        spread = sigma * (1 - phi.square()).rsqrt()
        chain = self.chain(torch.zeros_like(phi), phi, step, x.shape[1])  # of (h − μ) / spread
        scale = ((mu.unsqueeze(-1) + spread.unsqueeze(-1) * grid) / 2).exp().unsqueeze(-2)
        emission = -0.5 * (x.unsqueeze(-1) / scale).square() - scale.log() - 0.5 * math.log(2 * math.pi)
        return log_likelihood_on_grid(chain, emission, grid)

    @torch.no_grad()
    def forecast(self, draws: Mapping[str, Tensor], steps: int) -> Tensor:
        """Draws of the next returns of each series, one for each draw of its parameters and volatilities.

        Args:
            draws: of the posterior, as ``pyrovae.evaluation.posterior_samples(guide, x)`` gives them: each latent
                `samples x n x …`.
            steps: number of times to forecast.

        Returns:
            `samples x n x steps`.
        """
        mu, phi, sigma = draws["mu"], 2 * draws["persistence"] - 1, draws["variance"].sqrt()
        if "h" in draws:
            last = draws["h"][..., -1:, :]
        else:
            last = self.log_variance(draws["noise"], mu, phi, sigma)[..., -1:, None]
        h = self.chain(mu, phi, sigma, 2).continued(last, None, require_count("steps", steps))[..., 1:, 0]
        return dist.Normal(torch.zeros_like(h), (h / 2).exp()).sample()


def _require_returns(x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] < 1:
        raise DataError(
            f"x has shape {tuple(x.shape)}; this model takes series of returns of shape (n, T). One series is"
            " x.reshape(1, -1)."
        )
