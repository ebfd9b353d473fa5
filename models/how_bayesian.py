"""How Bayesian is a fit: which unknowns of a hierarchical model are maximised, and which integrated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, DataError, require_count, require_positive, unknown_name
from pyrovae.guides.gaussian import FullRank, MeanField, Program
from pyrovae.guides.point import PointEstimate, WithoutPrior
from pyrovae.registry import MODELS

__all__ = ["HierarchicalNormal", "treat"]

Treatment = Literal["ml", "map", "ml-ii", "map-ii", "bayes"]


@MODELS.register
class HierarchicalNormal(PyroModule):
    r"""Means of J groups that come from one population, whose mean and spread are unknown too.

    .. math:: \mu \sim \mathcal{N}(m_0, s_0^2), \qquad \tau \sim \mathrm{HalfNormal}(t_0), \qquad
        \theta_j \mid \mu, \tau \sim \mathcal{N}(\mu, \tau^2), \qquad
        y_n \mid \theta \sim \mathcal{N}(\theta_{g_n}, \sigma_{g_n}^2)

    The noise σ is known. Given the hyperparameters (μ, τ), the parameters θ have an exact :meth:`posterior` and the
    data an exact :meth:`log_evidence`. The sites are ``"mu"``, ``"tau"``, ``"theta"`` and ``"y"``; :func:`treat` says
    which are maximised. The latents are shared by the data: fit all of them in one batch.

    Args:
        groups: number J of groups.
        noise: σ, the standard deviation of an observation: a number, or J numbers, in units of y.
        mean_loc: m₀, in units of y.
        mean_scale: s₀, in units of y.
        spread_scale: t₀, in units of y.

    Raises:
        ArgumentError: an argument is out of range.

    References:
        Gelman et al. 2013, Bayesian Data Analysis, sections 5.4 and 5.5, https://sites.stat.columbia.edu/gelman/book/.

    Example:
        >>> model = HierarchicalNormal(groups=3)
        >>> group = torch.tensor([0, 0, 1, 2, 2])
        >>> model(group).shape   # generated
        torch.Size([5])
        >>> y = torch.tensor([1.0, 3.0, 0.0, 4.0, 6.0])
        >>> model.posterior(group, y, mu=2.0, tau=1.0).mean   # shrunk towards mu
        tensor([2., 1., 4.])
    """

    default_guide: ClassVar[str] = "FullRank"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {"gradient": "stl"}}
    hyperparameters = ("mu", "tau")

    def __init__(
        self,
        groups: int,
        noise: float | Sequence[float] = 1.0,
        mean_loc: float = 0.0,
        mean_scale: float = 10.0,
        spread_scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.groups = require_count("groups", groups)
        sigma = torch.as_tensor(noise, dtype=torch.get_default_dtype())
        if sigma.shape not in ((), (groups,)) or not (sigma > 0).all() or not sigma.isfinite().all():
            raise ArgumentError(f"noise is {noise!r}; it must be a positive number, or {groups}, one for each group")
        if not math.isfinite(mean_loc):
            raise ArgumentError(f"mean_loc is {mean_loc!r}; it must be a finite number, in units of y")
        require_positive("mean_scale", mean_scale)
        require_positive("spread_scale", spread_scale)
        self.register_buffer("noise", sigma.expand(groups).clone(), persistent=False)
        for name, value in (("mean_loc", mean_loc), ("mean_scale", mean_scale), ("spread_scale", spread_scale)):
            self.register_buffer(name, torch.tensor(float(value)), persistent=False)

    def forward(self, group: Tensor, y: Tensor | None = None) -> Tensor:
        """Conditions on ``y``, or generates it when it is ``None``; returns it.

        Args:
            group: A `n` tensor of whole numbers from 0 to J − 1, the group of each observation.
            y: A `n` tensor, or ``None``.

        Raises:
            DataError: the tensors are of another shape, or ``group`` does not hold whole numbers.
        """
        self._require(group, y)
        mu = pyro.sample("mu", dist.Normal(self.mean_loc, self.mean_scale))
        tau = pyro.sample("tau", dist.HalfNormal(self.spread_scale))
        with pyro.plate("groups", self.groups, device=self.noise.device):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("data", len(group), device=self.noise.device):
            return pyro.sample("y", dist.Normal(theta[..., group], self.noise[group]), obs=y)

    def posterior(self, group: Tensor, y: Tensor, mu: float | Tensor, tau: float | Tensor) -> dist.Normal:
        """p(θ | y, μ, τ), exactly.

        Args:
            group: as for ``forward``.
            y: A `n` tensor.
            mu: `…` values of μ.
            tau: `…` values of τ, above 0.

        Returns:
            Independent normals of batch shape `… x J`.
        """
        mu, tau = (torch.as_tensor(value).to(y)[..., None] for value in (mu, tau))
        counts, sums = self._sums(group, y)
        precision = tau**-2 + counts / self.noise**2
        return dist.Normal((mu / tau**2 + sums / self.noise**2) / precision, precision.rsqrt())

    def log_evidence(self, group: Tensor, y: Tensor, mu: float | Tensor, tau: float | Tensor) -> Tensor:
        """log p(y | μ, τ) in nats, exactly, all data points together and θ integrated out: `…`; arguments as above."""
        mu, tau = (torch.as_tensor(value).to(y)[..., None] for value in (mu, tau))
        residual = y - mu
        counts, sums = self._sums(group, residual)
        ratio = (tau / self.noise) ** 2
        shrunk = 1 + counts * ratio
        explained = (ratio * (sums / self.noise) ** 2 / shrunk - shrunk.log()).sum(-1) / 2
        return explained + dist.Normal(0.0, self.noise[group]).log_prob(residual).sum(-1)

    def _sums(self, group: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Number and sum of the `… x n` values of each group."""
        self._require(group, values)
        member = torch.nn.functional.one_hot(group, self.groups).to(values)
        return member.sum(0), values @ member

    def _require(self, group: Tensor, y: Tensor | None) -> None:
        if group.dim() != 1 or group.is_floating_point():
            raise DataError(
                f"group has shape {tuple(group.shape)} and dtype {group.dtype}; it must hold one whole number for each"
                " observation (group.long())"
            )
        if y is not None and y.shape[-1:] != group.shape:
            raise DataError(
                f"y has shape {tuple(y.shape)}; it must be ({len(group)},), one number for each group index"
            )


def treat(
    model: Program,
    treatment: Treatment,
    *,
    hyperparameters: Sequence[str] | None = None,
    fixed: Mapping[str, float | Tensor] | None = None,
) -> tuple[Program, Program]:
    r"""A hierarchical model and its guide under one of five treatments, from no Bayes to full Bayes.

    With the hyperparameters η, all other latents the parameters θ:

    ============ ============================================================= ==================== ==================
    treatment    what is found                                                 θ                    η
    ============ ============================================================= ==================== ==================
    ``"ml"``     :math:`\max_\theta p(y \mid \theta)`                          maximised, no prior  not used
    ``"map"``    :math:`\max_\theta p(y \mid \theta) \, p(\theta \mid \eta)`   maximised            fixed
    ``"ml-ii"``  :math:`\max_\eta \int p(y, \theta \mid \eta) \, d\theta`      integrated           maximised, no prior
    ``"map-ii"`` :math:`\max_\eta p(\eta) \int p(y, \theta \mid \eta) d\theta` integrated           maximised
    ``"bayes"``  :math:`p(\theta, \eta \mid y)`                                integrated           integrated
    ============ ============================================================= ==================== ==================

    What is maximised is a :class:`~pyrovae.guides.PointEstimate`. The integral over θ given η is that of a
    :class:`~pyrovae.guides.MeanField` posterior, which is exact where p(θ | y, η) is Gaussian and independent, as for
    :class:`HierarchicalNormal`; full Bayes is a :class:`~pyrovae.guides.FullRank` posterior of all latents. Fit what is
    returned with ``pyrovae.ELBO(gradient="stl")``; its bound, in nats, is the logarithm of what the second column
    maximises (a lower bound on it where θ is integrated by an approximation; of the evidence for full Bayes). Where the
    data show no spread of θ, the estimate of τ is 0 under ``"ml-ii"``, and under ``"map-ii"`` too for a prior that does
    not vanish there. Several such guides have sites, and so parameters, of the same names: read them in the block
    ``with pyro.settings.context(module_local_params=True)``, as a fit does.

    Args:
        model: Pyro model with continuous latents; its own parameters are learned in every treatment.
        treatment: ``"ml"``, ``"map"``, ``"ml-ii"``, ``"map-ii"`` or ``"bayes"``.
        hyperparameters: names of the sites η; ``None`` for the model's own ``hyperparameters``.
        fixed: the values of η for ``"map"``.

    Returns:
        The model and the guide to give to ``pyrovae.fit``. The guide returns its sites' values when it is called.

    Raises:
        ArgumentError: the treatment is unknown, the hyperparameters are not, or ``fixed`` does not go with them.

    References:
        Murphy 2012, Machine Learning: A Probabilistic Perspective, section 5.6, https://probml.github.io/pml-book/;
        Good 1965 (maximum likelihood of type II), The Estimation of Probabilities, MIT Press.

    Example:
        >>> import pyrovae
        >>> group, y = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 3.0, 5.0, 7.0])
        >>> model, guide = treat(HierarchicalNormal(groups=2), "ml")
        >>> run = pyrovae.fit(model, guide, (group, y), epochs=150, batch_size=4, lr=0.3, compile=False, progress=False)
        >>> guide(group, y)["theta"].round()   # the means of the groups
        tensor([2., 6.], grad_fn=<RoundBackward0>)
    """
    if treatment not in get_args(Treatment):
        raise unknown_name("treatment", treatment, get_args(Treatment))
    names = getattr(model, "hyperparameters", None) if hyperparameters is None else hyperparameters
    if not names or isinstance(names, str):
        raise ArgumentError(
            f"hyperparameters is {hyperparameters!r}; give the names of the latent sites that are not parameters"
            " of the data, as in treat(model, 'ml-ii', hyperparameters=['mu', 'tau'])"
        )
    if set(fixed or ()) != (set(names) if treatment == "map" else set()):
        raise ArgumentError(
            f"fixed is {fixed!r}; treatment 'map' needs a value of each of {', '.join(names)}, and the others take none"
        )
    if treatment == "ml":
        likelihood = WithoutPrior(_Given(model, names, {}))
        return likelihood, PointEstimate(likelihood, kind="mle")
    if treatment == "map":
        given = _Given(model, names, fixed or {})
        return given, PointEstimate(given)
    if treatment == "bayes":
        return model, FullRank(model)
    program = _FlatOver(model, names) if treatment == "ml-ii" else model
    guide = AutoGuideList(program)
    guide.append(PointEstimate(poutine.block(program, expose=list(names))))
    guide.append(MeanField(poutine.block(program, hide=list(names))))
    return program, guide


class _Given(PyroModule):
    """A model at fixed values of some sites, and with no trace of these; those without a value are drawn."""

    def __init__(self, model: Program, names: Sequence[str], fixed: Mapping[str, float | Tensor]) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, tuple(names), tuple(fixed)
        tensors = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
        like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.zeros(()))
        for name, value in fixed.items():
            self.register_buffer(f"fixed_{name}", torch.as_tensor(value).to(like))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        values = {name: getattr(self, f"fixed_{name}") for name in self.fixed}
        with poutine.block(hide=list(self.names)), poutine.condition(data=values):
            return self.model(*args, **kwargs)


class _FlatOver(PyroModule):
    """A model in which some sites have no log-density of their own."""

    def __init__(self, model: Program, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        with _MaskSites(self.names):
            return self.model(*args, **kwargs)


class _MaskSites(Messenger):
    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names:
            msg["mask"] = False
