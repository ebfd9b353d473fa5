"""Markov chains of latent states: their law, state-space models in general, and their likelihood by quadrature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution, constraints
from pyro.nn import PyroModule
from torch import Tensor

from pyrovae.errors import DataError, require_count
from pyrovae.modes import device_of

__all__ = ["MarkovChain", "StateSpaceModel", "log_likelihood_on_grid", "require_series"]

Transition = Callable[[Tensor, Tensor | None], TorchDistribution]


class MarkovChain(TorchDistribution):
    r"""Law of a sequence of T vectors, each given the one before it.

    .. math:: p(z_{1:T}) = p(z_1) \prod_{t=2}^T p(z_t \mid z_{t-1}, u_t)

    The density takes one vectorized call of the transition, a draw one call a step.

    Args:
        initial: p(z_1), of batch shape `*batch` and event shape (d,).
        transition: from states `*batch x s x d` and inputs `*batch x s x k` (or ``None``) at s times to the
            distribution of the next states: batch shape `*batch x s`, event shape (d,).
        steps: T.
        inputs: u_2 … u_T, `*batch x (T−1) x k`; ``None`` where the transition does not change with time.

    Example:
        >>> import pyro.distributions as dist
        >>> def walk(z, inputs):
        ...     return dist.Normal(z, 0.5).to_event(1)
        >>> chain = MarkovChain(dist.Normal(torch.zeros(2), 1.0).to_event(1), walk, steps=100)
        >>> z = chain.rsample((5,))
        >>> z.shape, chain.log_prob(z).shape
        (torch.Size([5, 100, 2]), torch.Size([5]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self, initial: TorchDistribution, transition: Transition, steps: int, inputs: Tensor | None = None
    ) -> None:
        self.initial, self.transition, self.steps, self.inputs = initial, transition, steps, inputs
        super().__init__(initial.batch_shape, torch.Size((steps, *initial.event_shape)), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> MarkovChain:
        return MarkovChain(self.initial.expand(torch.Size(batch_shape)), self.transition, self.steps, self.inputs)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws `*sample_shape x *batch x T x d`, differentiable where the transition's are."""
        first = self.initial.rsample if self.initial.has_rsample else self.initial.sample
        return self.continued(first(torch.Size(sample_shape)).unsqueeze(-2), self.inputs, self.steps - 1)

    def continued(self, z: Tensor, inputs: Tensor | None, steps: int) -> Tensor:
        """The states `… x 1 x d` and ``steps`` more drawn after them, `… x (1 + steps) x d`."""
        states = [z]
        for t in range(steps):
            now = None if inputs is None else inputs[..., t : t + 1, :]
            states.append(self.transition(states[-1], now).rsample())
        return torch.cat(states, dim=-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, `*batch`, of `*batch x T x d` values."""
        first = self.initial.log_prob(value[..., 0, :])
        if self.steps == 1:
            return first
        return first + self.transition(value[..., :-1, :], self.inputs).log_prob(value[..., 1:, :]).sum(-1)


def log_likelihood_on_grid(chain: MarkovChain, emission: Tensor, grid: Tensor) -> Tensor:
    r"""``log p(x_{1:T})`` of a model with states of one dimension, by quadrature on a grid of them.

    .. math:: \alpha_t(z_i) = p(x_t \mid z_i) \sum_j p(z_i \mid z_j) \, \alpha_{t-1}(z_j) \, \Delta, \qquad
        p(x_{1:T}) = \sum_i \alpha_T(z_i) \, \Delta

    For smooth densities that vanish at both ends of an even grid the error falls faster than any power of its
    spacing Δ, once that is below the standard deviation of the transition and of the emission.

    Args:
        chain: of the states, of event shape (T, 1).
        emission: ``log p(x_t | z_i)``, `*batch x T x G`.
        grid: `G` states, evenly spaced.

    Returns:
        The log-likelihood in nats, `*batch`.

    References:
        Kitagawa 1987, https://doi.org/10.1080/01621459.1987.10478534.

    Example:
        >>> grid = torch.linspace(-8.0, 8.0, 101)
        >>> import pyro.distributions as dist
        >>> def walk(z, inputs):
        ...     return dist.Normal(z, 1.0).to_event(1)
        >>> chain = MarkovChain(dist.Normal(torch.zeros(1), 1.0).to_event(1), walk, steps=2)
        >>> x = torch.tensor([0.5, 1.0])
        >>> found = log_likelihood_on_grid(chain, dist.Normal(grid, 1.0).log_prob(x.unsqueeze(-1)), grid)
        >>> exact = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 1.0], [1.0, 3.0]])).log_prob(x)
        >>> torch.allclose(found, exact)
        True
    """
    batch = len(chain.batch_shape)
    points = grid.reshape(-1, *(1,) * (batch + 1))
    spacing = grid[1] - grid[0]

    def matrix(inputs: Tensor | None) -> Tensor:
        """p(z_i | z_j) Δ, `*batch x j x i`."""
        law = chain.transition(grid.unsqueeze(-1), inputs)
        return law.log_prob(points.unsqueeze(-1)).movedim(0, -1).exp() * spacing

    fixed = matrix(None) if chain.inputs is None else None
    alpha = chain.initial.log_prob(points).movedim(0, -1).exp() * spacing
    total: Tensor = alpha.new_zeros(())
    for t in range(chain.steps):
        if t:
            step = fixed if chain.inputs is None else matrix(chain.inputs[..., t - 1 : t, :])
            alpha = (alpha.unsqueeze(-2) @ step).squeeze(-2)
        level = emission[..., t, :].amax(-1, keepdim=True)  # else a datum far out underflows
        alpha = alpha * (emission[..., t, :] - level).exp()
        scale = alpha.sum(-1, keepdim=True)
        alpha = alpha / scale
        total = total + (scale.log() + level).squeeze(-1)
    return total


class StateSpaceModel(PyroModule):
    r"""What models of series share: states that form a Markov chain, and observations given each state.

    .. math:: z_1 \sim p(z_1), \qquad z_t \mid z_{t-1} \sim p(z_t \mid z_{t-1}, u_t), \qquad
        x_t \mid z_t \sim p(x_t \mid z_t)

    One data point is a series, `T x p`; the series of a batch have the same length, which may change from call to
    call. The sites are ``"z"``, `n x T x d`, and ``"x"``, `n x T x p`, both in the plate ``"data"``. A subclass says
    what :meth:`initial`, :meth:`transition_law`, :meth:`observe` and, where there are known inputs, :meth:`inputs` are.

    Args:
        latent_dim: dimension d of a state.
        features: number p of variables that are observed.
        steps: length of the series that are generated.

    Raises:
        ArgumentError: a number is out of range.

    Example:
        >>> import pyro.distributions as dist
        >>> class RandomWalk(StateSpaceModel):
        ...     def initial(self):
        ...         return dist.Normal(torch.zeros(1), 1.0).to_event(1)
        ...     def transition_law(self, z, inputs):
        ...         return dist.Normal(z, 0.1).to_event(1)
        ...     def observe(self, z):
        ...         return dist.Normal(z, 1.0).to_event(2)
        >>> RandomWalk(latent_dim=1, features=1, steps=20)(size=3).shape
        torch.Size([3, 20, 1])
    """

    def __init__(self, latent_dim: int, features: int, steps: int) -> None:
        super().__init__()
        self.latent_dim = require_count("latent_dim", latent_dim)
        self.features = require_count("features", features)
        self.steps = require_count("steps", steps)

    @property
    def data_shape(self) -> tuple[int, int]:
        """Of a series that is generated: (steps, p)."""
        return self.steps, self.features

    def initial(self) -> TorchDistribution:
        """p(z_1): batch shape (), event shape (d,)."""
        raise NotImplementedError

    def transition_law(self, z: Tensor, inputs: Tensor | None) -> TorchDistribution:
        """p(z_t | z_{t−1}, u_t) for states `*batch x s x d`: batch shape `*batch x s`, event shape (d,)."""
        raise NotImplementedError

    def observe(self, z: Tensor) -> TorchDistribution:
        """p(x | z) for states `*batch x T x d`: batch shape `*batch`, event shape (T, p)."""
        raise NotImplementedError

    def inputs(self, steps: int, after: int = 1) -> Tensor | None:
        """Known inputs u at the ``steps`` times that follow time ``after``, `steps x k`; ``None`` for none."""
        return None

    def chain(self, steps: int) -> MarkovChain:
        """p(z_{1:T}): batch shape (), event shape (T, d)."""
        return MarkovChain(self.initial(), self.transition_law, steps, self.inputs(steps - 1))

    def forward(self, x: Tensor | None = None, *, size: int = 1) -> Tensor:
        """Conditions on ``x``, or generates ``size`` series when it is ``None``; returns the series.

        Args:
            x: A `n x T x p` tensor, or ``None``.
            size: number of series to generate.

        Raises:
            DataError: ``x`` is not a batch of series of p variables.
        """
        if x is not None:
            require_series(x, self.features)
        device = device_of(self)
        with pyro.plate("data", size if x is None else len(x), device=device):
            z = pyro.sample("z", self.chain(self.steps if x is None else x.shape[1]))
            return pyro.sample("x", self.observe(z), obs=x)

    @torch.no_grad()
    def forecast(self, draws: Mapping[str, Tensor], steps: int) -> Tensor:
        """Draws of the next values of each series, one for each draw of its states.

        Args:
            draws: of the posterior, as ``pyrovae.evaluation.posterior_samples(guide, x)`` gives them: ``"z"``,
                `samples x n x T x d`.
            steps: number of times to forecast.

        Returns:
            `samples x n x steps x p`.
        """
        z = draws["z"]
        inputs = self.inputs(require_count("steps", steps), after=z.shape[-2])
        states = self.chain(2).continued(z[..., -1:, :], inputs, steps)
        return self.observe(states[..., 1:, :]).sample()


def require_series(x: Tensor, features: int) -> None:
    """Raises an error unless ``x`` is a batch of series of so many variables."""
    if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] != features:
        raise DataError(
            f"x has shape {tuple(x.shape)}; this model takes series of shape (n, T, {features}). One series of one"
            " variable is x.reshape(1, -1, 1)."
        )
