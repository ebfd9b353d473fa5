r"""Where the noise of random weights is drawn: in the weights, in what a layer computes, or in signs by data point.

With weights ``W = M + S ⊙ E``, E standard normal, a linear layer of n data points is a random map. Its law for each
data point can be drawn in ways that differ in the covariance between data points alone, and so in the variance of a
minibatch's gradient: one W for all (``"weights"``), the Gaussian law of each data point's own outputs
(``"local"``), or one E for all with signs of their own (``"flipout"``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, Normal
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pyrovae.errors import ModelGuideError
from pyrovae.structure import is_real

__all__ = ["Law", "Noise", "flipout", "local_reparameterization", "spread_of"]

Kind = Literal["local", "flipout"]
Spread = tuple[Tensor, Tensor]

_CONVOLUTIONS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class Law(TorchFunctionMode):
    """Within the block, a layer whose weights are tracked draws its noise as the kind says.

    Args:
        kind: ``"local"`` or ``"flipout"``.
    """

    _active: ClassVar[list[Law]] = []

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.tracked: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # by id: the weights themselves, mean, deviation
        self.used: set[int] = set()

    def __enter__(self) -> Law:
        Law._active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Law._active.remove(self)
        super().__exit__(*error)

    @staticmethod
    @contextlib.contextmanager
    def tracking(weights: list[Tensor], laws: list[Spread]) -> Iterator[None]:
        """Within the block, those weights have those means and standard deviations, in the innermost active mode."""
        mode = Law._active[-1]
        before = mode.tracked, mode.used
        mode.tracked = dict(before[0]) | {id(w): (w, *law) for w, law in zip(weights, laws, strict=True)}
        mode.used = set()
        try:
            yield
        finally:
            mode.tracked, mode.used = before

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        spatial = 0 if func is F.linear else _CONVOLUTIONS.get(func)
        if spatial is None:
            return func(*args, **kwargs)
        x, weight, bias, *rest = _arguments(args, kwargs)
        law = self._law(weight)
        if law is None or x.dim() < 2:
            return func(*args, **kwargs)
        named = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}

        def layer(inputs: Tensor, matrix: Tensor, shift: Tensor | None) -> Tensor:
            return func(inputs, matrix, shift, *rest, **named)

        if self.kind == "local" and func is F.linear and x.dim() == 2:
            return _local(layer, x, law, bias, self._law(bias))
        return _flipped(layer, x, weight, law[0], bias, spatial)

    def _law(self, tensor: Tensor | None) -> Spread | None:
        """Mean and standard deviation of a tracked tensor, which may be used once."""
        if tensor is None or id(tensor) not in self.tracked:
            return None
        if id(tensor) in self.used:
            raise ModelGuideError(
                f"weights of shape {tuple(tensor.shape)} are used in more than one layer (or at more than one step),"
                f" and the noise of {self.kind!r} is drawn anew in each: their outputs would be independent where they"
                " are not. Use gradient='pathwise', which draws the weights themselves"
            )
        self.used.add(id(tensor))
        return self.tracked[id(tensor)][1:]


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Input, weight, bias and what follows them by place, however they were given."""
    return [*args, *(kwargs.get(name) for name in ("input", "weight", "bias")[len(args) :])]


def _local(
    layer: Callable[..., Tensor], x: Tensor, law: Spread, bias: Tensor | None, bias_law: Spread | None
) -> Tensor:
    """``N(M x + b, S² x² + s²)`` for each data point on its own: Kingma, Salimans & Welling 2015, equation 6."""
    loc, scale = law
    shift, spread = (bias, None) if bias_law is None else (bias_law[0], bias_law[1].square())
    mean = layer(x, loc, shift)
    variance = layer(x.square(), scale.square(), spread).clamp_min(torch.finfo(x.dtype).tiny)
    return mean + variance.sqrt() * torch.randn_like(mean)


def _flipped(
    layer: Callable[..., Tensor], x: Tensor, weight: Tensor, loc: Tensor, bias: Tensor | None, spatial: int
) -> Tensor:
    """``M x + ((W − M)(x ⊙ r)) ⊙ s`` with random signs r and s for each data point: Wen et al. 2018, equation 4.

    The signs are the same at all places of an image or a sequence, where the weights are the same too.
    """
    channel = 1 if spatial else x.dim() - 1

    def signs(like: Tensor) -> Tensor:
        shape = [size if dim in (0, channel) else 1 for dim, size in enumerate(like.shape)]
        return torch.rand(shape, dtype=like.dtype, device=like.device).sub(0.5).sign()

    mean = layer(x, loc, bias)
    return mean + layer(x * signs(x), weight - loc, None) * signs(mean)


class Noise(Messenger):
    """Effect handler: linear and convolutional layers of the model inside draw their noise as the kind says.

    Args:
        kind: ``"local"`` or ``"flipout"``.
        posteriors: of the latent sites, by name; those count that are a factorized Gaussian with a closed-form KL.
    """

    def __init__(self, kind: Kind, posteriors: Mapping[str, dist.TorchDistribution]) -> None:
        super().__init__()
        self.posteriors = posteriors
        self.mode = Law(kind)

    def __enter__(self) -> Noise:
        self.mode.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.mode.__exit__(*error)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        law = None if msg["is_observed"] else _factorized(self.posteriors.get(msg["name"]), msg["fn"])
        if law is not None:
            value = msg["value"] = msg["value"].view_as(msg["value"])  # the model's own: nobody else has it
            self.mode.tracked[id(value)] = (value, *law)


def _factorized(posterior: Any, prior: Any) -> Spread | None:
    """Mean and standard deviation of a posterior of independent Gaussians that has a closed-form KL to the prior."""
    base = posterior
    while isinstance(base, Independent):
        base = base.base_dist
    if not isinstance(base, Normal) or not is_real(prior.support):
        return None
    try:
        torch.distributions.kl_divergence(posterior, prior)
    except NotImplementedError:
        return None
    return base.loc, base.scale


def local_reparameterization(posteriors: Mapping[str, dist.TorchDistribution]) -> Noise:
    r"""Effect handler around a model: the outputs of its linear layers are drawn, in place of their weights.

    .. math:: W \sim \mathcal{N}(M, S^2), \quad h_n = W x_n + b \;\Rightarrow\;
        h_{nj} \sim \mathcal{N}(M_j x_n + m_j, \; S_j^2 x_n^2 + s_j^2) \quad\text{independently for each } n

    Every data point has its own noise, so that the variance of a minibatch's gradient falls with its size. Where a
    data point meets the same weights at several places (convolutions, sequences), the outputs at these are not
    independent: there the handler flips signs as :func:`flipout` does, which is exact.
    ``pyrovae.ELBO(gradient="local")`` uses it; weights that no such layer takes keep the values that the guide drew.

    Args:
        posteriors: the distribution that each latent site was drawn from, by name. Those are used that are factorized
            Gaussians, on real support, with a closed-form KL to the prior.

    Raises:
        ModelGuideError: weights are used by more than one layer.

    References:
        Kingma, Salimans & Welling 2015, https://arxiv.org/abs/1506.02557.

    Example:
        >>> import pyro
        >>> def model(x):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        ...     return F.linear(x, w)
        >>> x = torch.ones(1000, 3)
        >>> with local_reparameterization({"w": dist.Normal(torch.zeros(1, 3), 1.0).to_event(2)}):
        ...     h = model(x)
        >>> 1.4 < float(h.std()) < 2.1, len(model(x).unique())   # √3 among the data points, where weights give 0
        (True, 1)
    """
    return Noise("local", posteriors)


def flipout(posteriors: Mapping[str, dist.TorchDistribution]) -> Noise:
    r"""Effect handler around a model: random signs decorrelate the noise of a layer's weights between data points.

    .. math:: h_n = M x_n + \big((W - M)(x_n \odot r_n)\big) \odot s_n + b, \qquad r_n, s_n \in \{-1, 1\}^\cdot

    ``(W − M) ⊙ s rᵀ`` has the law of ``W − M``, since that is symmetric and its elements are independent. One draw of
    the weights serves all data points; biases keep their draw. ``pyrovae.ELBO(gradient="flipout")`` uses it.

    Args:
        posteriors: as for :func:`local_reparameterization`.

    Raises:
        ModelGuideError: weights are used by more than one layer.

    References:
        Wen et al. 2018, https://arxiv.org/abs/1803.04386.

    Example:
        >>> import pyro
        >>> def model(x):
        ...     w = pyro.sample("w", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        ...     return F.linear(x, w)
        >>> with flipout({"w": dist.Normal(torch.zeros(1, 3), 1.0).to_event(2)}):
        ...     h = model(torch.ones(1000, 3))
        >>> len(h.unique()) > 1
        True
    """
    return Noise("flipout", posteriors)


def spread_of(weights: Tensor) -> Spread | None:
    """Mean and standard deviation of a latent site's value under the handler that is active; ``None`` where none is."""
    if not Law._active:
        return None
    found = Law._active[-1].tracked.get(id(weights))
    return None if found is None else found[1:]
