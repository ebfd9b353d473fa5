"""Non-linear state-space models: the classic growth model, and the deep Kalman filter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyrovae.errors import require_positive
from pyrovae.models.markov import StateSpaceModel, log_likelihood_on_grid, require_series
from pyrovae.models.networks import full_precision, mlp
from pyrovae.registry import MODELS

__all__ = ["DeepKalmanFilter", "GrowthModel"]

_LEAST_SCALE = 1e-3  # of a state given the one before it, so that no density is a spike


@MODELS.register
class GrowthModel(StateSpaceModel):
    r"""The univariate non-stationary growth model, on which non-linear filters are compared.

    .. math:: z_1 \sim \mathcal{N}(0, v_1), \qquad
        z_t = \frac{z_{t-1}}{2} + \frac{25 z_{t-1}}{1 + z_{t-1}^2} + 8 \cos(1.2\, t) + \eta_t, \qquad
        x_t = \frac{z_t^2}{20} + \varepsilon_t

    The square hides the sign of the state, so that its posterior often has two modes. The noises η and ε are
    Gaussian. The model has no parameters to learn; its likelihood is known by quadrature.

    Args:
        state_variance: of η.
        observation_variance: of ε.
        initial_variance: v_1.
        steps: length of the series that are generated.

    Raises:
        ArgumentError: an argument is out of range.

    References:
        Kitagawa 1987, https://doi.org/10.1080/01621459.1987.10478534; Gordon, Salmond & Smith 1993,
        https://doi.org/10.1049/ip-f-2.1993.0015.

    Example:
        >>> model = GrowthModel(steps=20)
        >>> x = model(size=5)
        >>> x.shape, model.log_evidence(x).shape
        (torch.Size([5, 20, 1]), torch.Size([5]))
    """

    default_guide: ClassVar[str] = "AmortizedMarkov"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        state_variance: float = 10.0,
        observation_variance: float = 1.0,
        initial_variance: float = 5.0,
        steps: int = 100,
    ) -> None:
        super().__init__(1, 1, steps)
        for name, variance in (
            ("state", state_variance),
            ("observation", observation_variance),
            ("initial", initial_variance),
        ):
            scale = require_positive(f"{name}_variance", variance) ** 0.5
            self.register_buffer(f"{name}_scale", torch.tensor(scale), persistent=False)

    def initial(self) -> TorchDistribution:
        """p(z_1): batch shape (), event shape (1,)."""
        return dist.Normal(torch.zeros_like(self.initial_scale), self.initial_scale).expand([1]).to_event(1)

    def inputs(self, steps: int, after: int = 1) -> Tensor:
        """``8 cos(1.2 t)`` at the ``steps`` times that follow time ``after``, `steps x 1`."""
        t = torch.arange(after + 1, after + steps + 1, device=self.state_scale.device).to(self.state_scale)
        return 8 * (1.2 * t).cos().unsqueeze(-1)

    def transition_law(self, z: Tensor, inputs: Tensor | None) -> TorchDistribution:
        """p(z_t | z_{t−1}, u_t) for states `*batch x s x 1`: batch shape `*batch x s`, event shape (1,)."""
        assert inputs is not None
        return dist.Normal(z / 2 + 25 * z / (1 + z.square()) + inputs, self.state_scale).to_event(1)

    def observe(self, z: Tensor) -> TorchDistribution:
        """p(x | z) for states `*batch x T x 1`: batch shape `*batch`, event shape (T, 1)."""
        return dist.Normal(z.square() / 20, self.observation_scale).to_event(2)

    def log_evidence(self, x: Tensor, points: int = 1001, limit: float = 50.0) -> Tensor:
        """``log p(x)`` in nats of each series, `n`, by quadrature over the states.

        Args:
            x: A `n x T x 1` tensor.
            points: of the grid; near zero the transition is steep, and 401 leave an error of some 1e-3.
            limit: largest absolute state of the grid.
        """
        require_series(x, 1)
        grid = torch.linspace(-limit, limit, points, dtype=x.dtype, device=x.device)
        emission = dist.Normal(grid.square() / 20, self.observation_scale).log_prob(x)
        return log_likelihood_on_grid(self.chain(x.shape[1]), emission, grid)


@MODELS.register
class DeepKalmanFilter(StateSpaceModel):
    r"""State-space model whose transition and observation are neural networks.

    .. math:: z_1 \sim \mathcal{N}(\mu_1, \mathrm{diag}\,\sigma_1^2), \qquad
        z_t \sim \mathcal{N}\bigl(z_{t-1} + f_\theta(z_{t-1}), \mathrm{diag}\, s_\theta^2(z_{t-1})\bigr), \qquad
        x_t \sim \mathcal{N}\bigl(g_\theta(z_t), \mathrm{diag}\, r^2\bigr)

    All is learned; f starts near zero, so that the states begin as a random walk.

    Args:
        features: number p of variables that are observed.
        latent_dim: dimension d of a state.
        hidden: widths of the hidden layers of the transition and of the observation network.
        activation: of the hidden layers.
        steps: length of the series that are generated.

    Raises:
        ArgumentError: an argument is unknown or out of range.

    References:
        Krishnan, Shalit & Sontag 2015, https://arxiv.org/abs/1511.05121; 2017, https://arxiv.org/abs/1609.09869.

    Example:
        >>> model = DeepKalmanFilter(features=3, latent_dim=2, steps=20)
        >>> model(size=5).shape
        torch.Size([5, 20, 3])
    """

    default_guide: ClassVar[str] = "AmortizedMarkov"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {}}

    def __init__(
        self,
        features: int,
        latent_dim: int,
        hidden: Sequence[int] = (32,),
        activation: str = "tanh",
        steps: int = 100,
    ) -> None:
        super().__init__(latent_dim, features, steps)
        self.hidden, self.activation = tuple(hidden), activation
        self.drift = mlp(latent_dim, self.hidden, 2 * latent_dim, activation)
        self.emission = mlp(latent_dim, self.hidden, features, activation)
        with torch.no_grad():
            last: Any = self.drift[-1]
            last.weight.mul_(0.1)
            last.bias[latent_dim:].fill_(-1.0)
        self.initial_loc = nn.Parameter(torch.zeros(latent_dim))
        self.initial_log_scale = nn.Parameter(torch.zeros(latent_dim))
        self.noise_log_scale = nn.Parameter(torch.zeros(features))

    def initial(self) -> TorchDistribution:
        """p(z_1): batch shape (), event shape (d,)."""
        return dist.Normal(self.initial_loc, self.initial_log_scale.exp()).to_event(1)

    def transition_law(self, z: Tensor, inputs: Tensor | None) -> TorchDistribution:
        """p(z_t | z_{t−1}) for states `*batch x s x d`: batch shape `*batch x s`, event shape (d,)."""
        change, raw_scale = full_precision(self.drift(z)).chunk(2, dim=-1)
        return dist.Normal(z + change, nn.functional.softplus(raw_scale) + _LEAST_SCALE).to_event(1)

    def observe(self, z: Tensor) -> TorchDistribution:
        """p(x | z) for states `*batch x T x d`: batch shape `*batch`, event shape (T, p)."""
        return dist.Normal(full_precision(self.emission(z)), self.noise_log_scale.exp()).to_event(2)
