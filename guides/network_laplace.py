"""Laplace's approximation of the posterior of a network's weights, by generalized Gauss-Newton curvature."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import jvp, vmap

from pyrovae.errors import ArgumentError, DataError, ModelGuideError, require_count, unknown_name
from pyrovae.guides.curvature import STRUCTURES, information
from pyrovae.guides.point import AT_MODE, Laplace, PointEstimate, warn_off_mode
from pyrovae.models.bnn import BNN
from pyrovae.modes import evaluating
from pyrovae.training.programs import local_params

__all__ = ["NetworkGaussian", "linearize", "network_laplace"]

Mode = PointEstimate | Laplace | Tensor
Structure = Literal["full", "kronecker", "diagonal"]

_NUMBERS = 20_000_000  # of a Jacobian, at a time


def network_laplace(
    model: BNN,
    mode: Mode,
    x: Tensor,
    y: Tensor,
    structure: Structure = "full",
    *,
    batch_size: int | None = None,
) -> NetworkGaussian:
    r"""The Gaussian at the mode of a Bayesian neural network, as a guide to sample and to score.

    .. math:: q(w) = \mathcal{N}(\hat w, H^{-1}), \qquad H = \sum_n J_n^\top \Lambda_n J_n - \nabla^2 \log p(\hat w)

    J_n is the Jacobian of the network's outputs f at x_n by the weights, and Λ_n the Fisher information that y_n has
    of these outputs. For ``"normal"``, ``"bernoulli"``, ``"categorical"`` and ``"poisson"`` it is the Hessian of
    ``−log p(y_n | f)``, whatever y_n is; for ``"heteroscedastic"`` and ``"student-t"`` its expectation, which, unlike
    the Hessian, is positive. What the model learns, such as a noise scale, stays at its value.

    ``"full"`` keeps all of H: memory O(P²) for P weights. ``"diagonal"`` keeps its diagonal. ``"kronecker"`` (KFAC)
    keeps for each linear or convolutional layer, W and b being one matrix,

    .. math:: H_\ell \approx \tfrac{1}{R} \Big(\sum_r g_r g_r^\top\Big) \otimes \Big(\sum_r a_r a_r^\top\Big) + D_\ell

    with R rows a of inputs to the layer (data points, times places where the layer is used at many), and g the
    derivatives of ``Λ_n^{1/2} f`` by its outputs; the precision D of the prior is added exactly, in the basis in which
    the rest is diagonal. A posterior of the last layer alone is that of ``BNN(…, bayesian="last")``.

    Weights that are drawn from a Gauss-Newton posterior and put in the network itself tend to fit worse than the
    mode; :func:`linearize` gives the model that the posterior is of.

    Args:
        model: with one network (no ``members``), and a prior that has no latents of its own.
        mode: a fitted ``PointEstimate`` or ``Laplace`` guide, or the `P` weights.
        x: inputs of all data, as for the model. Of fewer than its ``num_data``, each counts for several, as there.
        y: targets of all data.
        structure: ``"full"``, ``"kronecker"`` or ``"diagonal"``.
        batch_size: data points at a time; ``None`` for as many as have a Jacobian of 20 million numbers.

    Returns:
        A :class:`NetworkGaussian`.

    Raises:
        ArgumentError: an argument is out of range, or the structure cannot be had for this network or prior.
        DataError: x or y does not fit the model.
        ModelGuideError: the prior is not concave at the mode, or not of each weight on its own.

    Warns:
        UserWarning: the point is not the mode yet: a Newton step would raise the log density by over 0.01 nats for each
            weight.

    References:
        MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.448; Ritter, Botev & Barber 2018 (Kronecker factors),
        https://openreview.net/forum?id=Skdvd2xAZ; Daxberger et al. 2021, https://arxiv.org/abs/2106.14806; Grosse &
        Martens 2016 (convolutions), https://arxiv.org/abs/1602.01407.

    Example:
        >>> x = torch.linspace(-1, 1, 30)[:, None]
        >>> model = BNN([1, 1], likelihood={"name": "normal", "scale": 0.5})   # linear, so that it is exact
        >>> design = torch.cat([x, torch.ones_like(x)], 1)
        >>> precision = design.mT @ design / 0.5**2 + torch.eye(2)
        >>> weights = torch.linalg.solve(precision, design.mT @ (3 * x[:, 0]) / 0.5**2)
        >>> posterior = network_laplace(model, weights, x, 3 * x[:, 0])
        >>> bool(torch.allclose(posterior.get_posterior().covariance_matrix @ precision, torch.eye(2), atol=1e-5))
        True
        >>> posterior()["weights"].shape
        torch.Size([2])
    """
    posterior = NetworkGaussian(model, structure)
    if batch_size is not None:
        require_count("batch_size", batch_size)
    if y is None or not len(x):
        raise DataError("network_laplace needs data: inputs x and targets y, at least one of each")
    n = model._require(x, y)
    counts = 1.0 if model.num_data is None else max(model.num_data, n) / n
    loc = _weights_of(mode, model, x, y).requires_grad_()
    with local_params(model), evaluating(model), torch.enable_grad():
        log_joint, precision = _prior_at(model, loc)
        gradient = grad(log_joint, loc)[0]
        rows = batch_size or max(1, _NUMBERS // (loc.numel() * model.outputs(loc, x[:1]).numel()))
        for part, target in zip(x.split(rows), y.split(rows), strict=True):
            out = model.outputs(loc, part)
            log_likelihood = counts * model.response(out, model.y_loc, model.y_scale).log_prob(target).sum()
            gradient = gradient + grad(log_likelihood, loc)[0]
            log_joint = log_joint + log_likelihood
            posterior.covariance.add(model, loc, part, counts * information(model, out.detach()))
    with torch.no_grad():
        posterior.covariance.close(precision)
        posterior.loc.copy_(loc)
        posterior.log_joint.copy_(log_joint)
        rise = float(posterior.covariance.whitened(gradient).square().sum()) / 2  # by a Newton step
    warn_off_mode(rise, AT_MODE * len(loc), f"before network_laplace() (it has {len(loc)} weights)")
    return posterior


class NetworkGaussian(PyroModule):
    """The fixed Gaussian that :func:`network_laplace` returns: buffers, and nothing to learn.

    A new one stands at 0 with unit covariance, and takes the state that another one saved.

    Args:
        model: the Bayesian neural network.
        structure: of the inverse covariance: ``"full"``, ``"kronecker"`` or ``"diagonal"``.

    Raises:
        ArgumentError: an argument is out of range, or the structure cannot be had for this network.

    Example:
        >>> guide = NetworkGaussian(BNN([2, 5, 1]), "kronecker")
        >>> with pyro.plate("particles", 7, dim=-2):
        ...     guide()["weights"].shape
        torch.Size([7, 1, 21])
    """

    loc: Tensor
    log_joint: Tensor

    def __init__(self, model: BNN, structure: Structure = "full") -> None:
        super().__init__()
        if not isinstance(model, BNN) or model.members is not None:
            raise ArgumentError(f"model is {model!r}; it must be a pyrovae.models.BNN of one network, without members")
        if structure not in STRUCTURES:
            raise unknown_name("structure", structure, STRUCTURES)
        start = model.network.start()
        self.register_buffer("loc", torch.zeros_like(start))
        self.register_buffer("log_joint", start.new_zeros(()))
        self.covariance = STRUCTURES[structure](model).to(start)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples the site ``"weights"``."""
        return {"weights": pyro.sample("weights", self.get_posterior())}

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TorchDistribution:
        """The Gaussian over the weights, of event shape `(P,)`."""
        return self.covariance.law(self.loc)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight, `(P,)`."""
        return self.covariance.variance()

    @property
    def log_evidence(self) -> Tensor:
        r"""Laplace's approximation of ``log p(y | x)``, in nats, for all data together.

        .. math:: \log p(y, \hat w \mid x) + \tfrac{P}{2} \log 2\pi - \tfrac12 \log \det H

        It is how prior scales, noise scales and architectures are compared, each at its own mode; exact for a linear
        network with Gaussian noise (MacKay 1992).
        """
        return self.log_joint - self.get_posterior().log_prob(self.loc)


def linearize(model: BNN, mode: Mode | NetworkGaussian) -> BNN:
    r"""The model whose network is linear in the weights, its tangent at the mode.

    .. math:: f(x; w) \to f(x; \hat w) + J(x) (w - \hat w)

    A Gauss-Newton posterior is that of this model (exactly so under Gaussian noise), so that predictions take it::

        pyrovae.predict(linearize(model, posterior), posterior, x)

    Args:
        model: a Bayesian neural network of one network (no ``members``).
        mode: what :func:`network_laplace` returned, a guide that has been fitted, or the `P` weights.

    Returns:
        A copy of the model; what that learns stays at its value.

    Raises:
        ArgumentError: an argument is out of range.

    References:
        Khan et al. 2019, https://arxiv.org/abs/1906.01930; Immer, Korzepa & Bauer 2021,
        https://arxiv.org/abs/2008.08400.

    Example:
        >>> model = BNN([2, 5, 1])
        >>> mode = model.network.start()
        >>> tangent = linearize(model, mode)
        >>> x = torch.randn(4, 2)
        >>> bool(torch.allclose(tangent.outputs(mode, x), model.outputs(mode, x)))
        True
    """
    if not isinstance(model, BNN) or model.members is not None:
        raise ArgumentError(f"model is {model!r}; it must be a pyrovae.models.BNN of one network, without members")
    weights = _weights_of(mode, model)
    linear = copy.deepcopy(model).requires_grad_(False)
    linear.network = _Tangent(linear.network, weights)
    return linear


class _Tangent(nn.Module):
    """A flat network that is linear in its weights, with the face of the one that it is the tangent of."""

    mode: Tensor

    def __init__(self, network: Any, mode: Tensor) -> None:
        super().__init__()
        self.network = network
        self.blocks, self.size, self.start, self.fresh = network.blocks, network.size, network.start, network.fresh
        self.register_buffer("mode", mode)

    def forward(self, weights: Tensor, x: Tensor, law: Any = None, *, own_inputs: bool = False) -> Tensor:
        """The outputs, `*lead x n x …`, of weights `*lead x size`."""

        def at(vector: Tensor) -> Tensor:
            value, change = jvp(lambda w: self.network(w, x), (self.mode,), (vector - self.mode,))[:2]
            return value + change

        with warnings.catch_warnings():  # torch's own, at its first derivative in forward mode
            warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
            out = vmap(at)(weights.reshape(-1, self.size))
        return out.reshape(*weights.shape[:-1], *out.shape[1:])


def _weights_of(mode: Mode | NetworkGaussian, model: BNN, *args: Any) -> Tensor:
    """The mode as a vector of its own."""
    if isinstance(mode, Tensor):
        weights = mode
    elif isinstance(mode, PointEstimate | Laplace | NetworkGaussian):
        with local_params(model, mode), torch.no_grad(), poutine.block():
            weights = mode.loc if isinstance(mode, NetworkGaussian) else mode(*args)["weights"]
    else:
        raise ArgumentError(f"mode is {mode!r}; it must be a fitted PointEstimate or Laplace guide, or the weights")
    if weights.shape != (model.network.size,) or not weights.isfinite().all():
        raise ArgumentError(
            f"mode has weights of shape {tuple(weights.shape)}; they must be ({model.network.size},), finite numbers"
        )
    return weights.detach().clone()


def _prior_at(model: BNN, loc: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density of the prior, and the negative diagonal of its Hessian, which has to be diagonal."""
    with poutine.block():
        trace = poutine.trace(model.prior).get_trace()
    if trace.stochastic_nodes:
        raise ModelGuideError(
            f"the prior has latents of its own ({', '.join(trace.stochastic_nodes)}), and the approximation is of"
            " the weights alone: fix them, as in BNN(…, prior={'name': 'normal', 'scale': 0.5})"
        )
    log_prior = trace.nodes["_RETURN"]["value"].log_prob(loc)
    first = grad(log_prior, loc, create_graph=True)[0]
    signs = torch.ones_like(loc)
    signs[::2] = -1
    sums, alternating = (_product(first, loc, vector) for vector in (torch.ones_like(loc), signs))
    if not torch.allclose(sums, signs * alternating):
        raise ModelGuideError("the prior ties weights to each other, and its Hessian must be diagonal here")
    if not (sums < 0).all():
        raise ModelGuideError(
            f"the prior's log-density has second derivative {float(sums.max()):.3g} at one of the weights of the mode,"
            " where Laplace's approximation needs it below 0: use a normal prior"
        )
    return log_prior, -sums


def _product(first: Tensor, loc: Tensor, vector: Tensor) -> Tensor:
    """The Hessian's product with a vector, from the gradient; 0 where the gradient is constant."""
    if not first.requires_grad:
        return torch.zeros_like(loc)
    return grad(first, loc, vector, retain_graph=True, materialize_grads=True)[0]
