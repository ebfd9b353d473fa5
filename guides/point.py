"""Point estimates of the latents, and the Gaussian at the mode."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoContinuous, AutoDelta, AutoLaplaceApproximation
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.errors import ArgumentError, ModelGuideError, unknown_name
from pyrovae.guides.gaussian import FirstCall, Init, Program, log_joint
from pyrovae.registry import GUIDES

__all__ = ["GaussianAtMode", "Laplace", "PointEstimate", "WithoutPrior"]

Kind = Literal["map", "mle"]

AT_MODE = 0.01  # nats by which the quadratic model of the log density may still rise before a warning


class WithoutPrior(PyroModule):
    r"""A model whose latent sites have no log-density of their own: only the likelihood is left.

    .. math:: \log p(x, z) \quad \to \quad \log p(x \mid z)

    Every latent site is sampled as before, under ``poutine.mask(mask=False)``. What a bound of this model reports is
    a log-likelihood, and no bound on the evidence.

    Args:
        model: Pyro model.

    Raises:
        ArgumentError: the model cannot be called.

    Example:
        >>> import pyro
        >>> def model(x):
        ...     mean = pyro.sample("mean", dist.Normal(torch.zeros(()), 1.0))
        ...     pyro.sample("x", dist.Normal(mean, 1.0), obs=x)
        >>> trace = pyro.poutine.trace(WithoutPrior(model)).get_trace(torch.zeros(()))
        >>> float(trace.log_prob_sum(lambda name, site: name == "mean"))
        0.0
    """

    def __init__(self, model: Program) -> None:
        if not callable(model):
            raise ArgumentError(f"model is {model!r}; it must be a Pyro model: a function or module with pyro.sample")
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        with _MaskLatents():
            return self.model(*args, **kwargs)


class _MaskLatents(Messenger):
    """Leaves the log-density of every latent site out, as ``poutine.mask(mask=False)`` around it would."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"]:
            msg["mask"] = False


@GUIDES.register
class PointEstimate(FirstCall, AutoDelta):
    r"""One value for each latent: the mode of the posterior (MAP) or of the likelihood (MLE).

    .. math:: \hat z_{\mathrm{MAP}} = \arg\max_z \log p(x, z), \qquad
        \hat z_{\mathrm{MLE}} = \arg\max_z \log p(x \mid z)

    Both are modes in the model's own, constrained space. A guide cannot leave out what the model adds, so that the
    maximum-likelihood kind is for a model *without prior*, which is then what is fitted::

        likelihood = WithoutPrior(model)
        pyrovae.fit(likelihood, PointEstimate(likelihood, kind="mle"), data)

    The bound that a fit reports is then the log-joint density (MAP) or the log-likelihood (MLE) at the estimate, not
    a bound on the evidence. Local latents may come in minibatches, as for :class:`MeanField`.

    Args:
        model: Pyro model with continuous latents; for ``kind="mle"``, a :class:`WithoutPrior`.
        kind: ``"map"`` or ``"mle"``.
        init_loc_fn: initial value of a site, one of Pyro's ``init_to_…``; ``None`` for the model's
            ``start_values``, or else ``init_to_median``.
        create_plates: function of the model's arguments that returns the subsampled plate or plates.

    Raises:
        ArgumentError: an argument is out of range, or ``kind`` and model do not go together.
        ModelGuideError: at the first call, a latent site that is discrete or in a sequential plate.

    Example:
        >>> import pyro
        >>> def model():
        ...     pyro.sample("scale", dist.LogNormal(torch.zeros(()), 1.0))
        >>> guide = PointEstimate(model)
        >>> bool(guide()["scale"] == guide()["scale"])
        True
    """

    _joint = False

    def __init__(
        self,
        model: Program,
        kind: Kind = "map",
        *,
        init_loc_fn: Init | None = None,
        create_plates: Program | None = None,
    ) -> None:
        if kind not in get_args(Kind):
            raise unknown_name("kind", kind, get_args(Kind))
        if kind == "mle" and not isinstance(model, WithoutPrior):
            raise ArgumentError(
                "kind='mle' needs a model without prior, for guide and fit alike: likelihood = WithoutPrior(model);"
                " guide = PointEstimate(likelihood, kind='mle'); then fit likelihood, not model"
            )
        if kind == "map" and isinstance(model, WithoutPrior):
            raise ArgumentError("the model is WithoutPrior, so that its mode is no MAP estimate: give kind='mle'")
        super().__init__(model, init_loc_fn=init_loc_fn, create_plates=create_plates)


@GUIDES.register
class Laplace(FirstCall, AutoLaplaceApproximation):
    r"""Laplace's approximation: the mode, and the Gaussian that the curvature of the log density there gives.

    .. math:: \hat u = \arg\max_u \log p(x, u), \qquad
        q(u) = \mathcal{N}(\hat u, H^{-1}), \qquad H = -\nabla^2 \log p(x, \hat u)

    u are the latents in unconstrained space (and its density has the Jacobian of the map). During a fit the guide is
    a point, the mode; :meth:`approximation` then returns the Gaussian.

    Args:
        model: Pyro model with continuous latents.
        init_loc_fn: initial value of a site, one of Pyro's ``init_to_…``; ``None`` for the model's
            ``start_values``, or else ``init_to_median``.

    Raises:
        ArgumentError: an argument is out of range.
        ModelGuideError: at the first call, a latent site that is discrete, in a sequential or in a subsampled plate.
        RuntimeError: at the first call, a model without latents.

    References:
        Tierney & Kadane 1986, https://doi.org/10.1080/01621459.1986.10478240; MacKay 1992,
        https://doi.org/10.1162/neco.1992.4.3.448.

    Example:
        >>> import pyro
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.ones(2), torch.tensor([1.0, 3.0])).to_event(1))
        >>> laplace = Laplace(model, init_loc_fn=pyro.infer.autoguide.init_to_mean)   # here the mean is the mode
        >>> laplace()["z"].tolist()
        [1.0, 1.0]
        >>> laplace.approximation().get_posterior().stddev
        tensor([1., 3.])
    """

    def __init__(self, model: Program, *, init_loc_fn: Init | None = None) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn)

    def approximation(self, *args: Any, **kwargs: Any) -> GaussianAtMode:
        """The Gaussian at the mode that the fit found, as a guide to sample and to score.

        The Hessian is exact, by automatic differentiation; time O(d) gradients, memory O(d²).

        Args:
            *args: all data, as for the model (a minibatch gives the curvature of the minibatch).
            **kwargs: as for the model.

        Returns:
            A :class:`GaussianAtMode`.

        Raises:
            ModelGuideError: the Hessian is not positive definite, so that the point is no mode.

        Warns:
            UserWarning: the point is not the mode yet: a Newton step would raise the log density by over 0.01 nats.
        """
        if self.prototype_trace is None:
            self(*args, **kwargs)
        mode = self.loc.detach()

        def potential(latent: Tensor) -> Tensor:
            return -log_joint(self, latent, *args, **kwargs)

        with torch.enable_grad():
            gradient = torch.autograd.functional.jacobian(potential, mode)
            hessian = torch.autograd.functional.hessian(potential, mode)
        factor, failed = torch.linalg.cholesky_ex((hessian + hessian.mT) / 2)
        if failed:
            lowest = float(torch.linalg.eigvalsh((hessian + hessian.mT) / 2).min())
            raise ModelGuideError(
                "the Hessian of -log p(x, u) at the point is not positive definite (its smallest eigenvalue is"
                f" {lowest:.3g}), so that there is no Gaussian there: fit on until the mode, or use FullRank, which"
                " needs none"
            )
        step = torch.cholesky_solve(gradient.unsqueeze(-1), factor).squeeze(-1)
        rise = float(gradient @ step) / 2
        warn_off_mode(rise, AT_MODE, "before approximation()")
        gaussian = GaussianAtMode(self._given[0])
        gaussian._setup_prototype(*args, **kwargs)
        with torch.no_grad():
            gaussian.loc.copy_(mode)
            gaussian.scale_tril.copy_(torch.linalg.cholesky(torch.cholesky_inverse(factor)))
        return gaussian

    laplace_approximation = approximation  # Pyro's name for it


def warn_off_mode(rise: float, allowed: float, before: str) -> None:
    """Warns the caller's caller where a Newton step would raise the log density by more nats than are allowed."""
    if rise > allowed:
        warnings.warn(
            f"the point is not the mode yet: a Newton step raises the log density by about {rise:.3g} nats. Fit on,"
            f" with a smaller learning rate, {before}.",
            stacklevel=3,
        )


class GaussianAtMode(FirstCall, AutoContinuous):
    """The fixed Gaussian that :meth:`Laplace.approximation` returns; it has buffers, and nothing to learn.

    A new one has unit covariance, and takes the state that another one saved.

    Args:
        model: Pyro model with continuous latents.

    Example:
        >>> import pyro
        >>> guide = GaussianAtMode(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
        >>> guide()["z"].shape, sum(1 for _ in guide.parameters())
        (torch.Size([2]), 0)
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, model: Program) -> None:
        super().__init__(model)

    def _make_parameters(self, *args: Any, **kwargs: Any) -> None:
        loc = self._init_loc()
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", torch.eye(len(loc), dtype=loc.dtype, device=loc.device))

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The Gaussian over the unconstrained latents, `(latent_dim,)`."""
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.loc, self.scale_tril.square().sum(-1).sqrt()
