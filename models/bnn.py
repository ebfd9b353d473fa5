"""Bayesian neural networks: any torch network, with the weights that are chosen as one flat latent vector."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, DataError, require_count
from pyrovae.models.flat import FlatNetwork, Selection
from pyrovae.models.networks import initialize, mlp
from pyrovae.models.responses import response
from pyrovae.models.weight_priors import BlockPrior, weight_prior
from pyrovae.noise import spread_of
from pyrovae.registry import MODELS

__all__ = ["BNN"]

_SCALES = ("x_loc", "x_scale", "y_loc", "y_scale")


@MODELS.register
class BNN(PyroModule):
    r"""A Bayesian neural network: a network whose weights are latent, and a likelihood of its outputs.

    .. math:: w \sim p(w), \qquad y_n \mid w \sim p(y_n \mid f(x_n; w))

    The weights are **one** latent site, ``"weights"``, a flat vector: the network runs under ``vmap`` over whatever
    leading dimensions that has, so that particles, ``Predictive(parallel=True)`` and NUTS vectorize. The network that
    is given is not touched. The latents are shared by the data, and the scale of a minibatch is that of the plate
    ``"data"``: its size is ``num_data``, which :func:`pyrovae.fit` sets.

    Targets of a regression are standardised inside (:meth:`standardize`); every density, prediction and figure is in
    the units of y.

    Args:
        net: any ``torch.nn.Module`` from a minibatch `n x *event` to outputs `n x outputs`; or widths, as in
            ``[13, 50, 1]``, of a fully connected one. Its parameters are where guides start.
        likelihood: ``"normal"`` (one noise scale, learned), ``"heteroscedastic"`` (two outputs: mean, and standard
            deviation before a softplus), ``"student-t"``, ``"bernoulli"`` (logit), ``"categorical"`` (logits; y are
            whole numbers), ``"poisson"`` (logarithm of the rate); or a dictionary with options, as in
            ``{"name": "normal", "scale": 0.1}`` for a noise scale that is known, in units of y.
        prior: ``"normal"`` (standard), ``"laplace"``, ``"scale-mixture"``, ``"horseshoe"``; a dictionary with options,
            as in ``{"name": "normal", "scale": "fan-in", "latent": "layer"}``; or a function of a parameter's name and
            shape that returns its prior. See :func:`pyrovae.models.weight_priors.weight_prior`.
        bayesian: which parameters are latent: ``"all"``, ``"last"`` (layer), patterns of names, or a function of name
            and parameter. The others are learned.
        activation: of the hidden layers, where ``net`` is widths.
        members: of networks that are trained at once, each with weights and noise scale of its own (an ensemble, all
            splits of a data set, a grid: the prior's scale may be a list, one for each): a plate ``"members"``,
            dimension −2. ``None`` for one network.
        own_data: whether each member has data of its own: then x is `n x members x *event` and y `n x members`.
        num_data: number N of data points in all; ``None`` for those that the model is called with, until a fit says.

    Raises:
        ArgumentError: an argument is out of range, or the network has a batch norm in training mode.

    References:
        MacKay 1992, https://doi.org/10.1162/neco.1992.4.3.448; Blundell et al. 2015, https://arxiv.org/abs/1505.05424.

    Example:
        >>> model = BNN([1, 20, 1])
        >>> model(torch.zeros(7, 1)).shape   # generated from the prior
        torch.Size([7])
        >>> from pyrovae.guides import MeanField
        >>> import pyrovae
        >>> x = torch.linspace(-2, 2, 40)[:, None]
        >>> y = torch.sin(2 * x[:, 0]) + 0.1 * torch.randn(40)
        >>> model.standardize(x, y)
        >>> local = pyrovae.ELBO(gradient="local", kl="analytic")
        >>> run = pyrovae.fit(model, MeanField(model), (x, y), objective=local, epochs=3, progress=False)
        >>> prediction = pyrovae.predict(model, run.guide, x, samples=50)
        >>> prediction.mean.shape, bool((prediction.epistemic > 0).all())
        (torch.Size([40]), True)
    """

    default_guide: ClassVar[str] = "MeanField"
    default_objective: ClassVar[dict[str, Any]] = {"name": "ELBO", "arguments": {"gradient": "local", "kl": "analytic"}}

    x_loc: Tensor
    x_scale: Tensor
    y_loc: Tensor
    y_scale: Tensor

    def __init__(
        self,
        net: nn.Module | Sequence[int],
        likelihood: str | Mapping[str, Any] = "normal",
        prior: str | Mapping[str, Any] | BlockPrior = "normal",
        bayesian: Selection = "all",
        activation: str = "relu",
        members: int | None = None,
        own_data: bool = False,
        num_data: int | None = None,
    ) -> None:
        super().__init__()
        for argument, value in (("members", members), ("num_data", num_data)):
            if value is not None:
                require_count(argument, value)
        if own_data and members is None:
            raise ArgumentError("own_data=True is of networks that are trained together; give members as well")
        self.members = members
        self.own_data = own_data
        self.num_data = num_data
        if isinstance(net, nn.Module):
            self.network = FlatNetwork(net, bayesian)
        else:
            self.network = FlatNetwork(
                _widths(net, activation), bayesian, functools.partial(initialize, activation=activation)
            )
        self.prior = weight_prior(prior, self.network.blocks, members)
        self.response = response(likelihood, members)
        for name, start in zip(_SCALES, (0.0, 1.0, 0.0, 1.0), strict=True):
            self.register_buffer(name, torch.tensor(start))

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Conditions on ``y``, or generates it when it is ``None``; returns it.

        Args:
            x: inputs, `n x *event` (`n x members x *event` with ``own_data``).
            y: A `n` tensor (`n x members` with ``own_data``), or ``None``.

        Raises:
            DataError: x or y has another shape, or y is of another kind than the likelihood's.
        """
        n = self._require(x, y)
        members = self._plate()
        with members:
            weights = pyro.sample("weights", self.prior())
        out = self.outputs(weights, x, spread_of(weights))
        size = n if self.num_data is None else max(self.num_data, n)
        rows = None if size == n else torch.arange(n, device=x.device)
        with members, pyro.plate("data", size, subsample=rows, device=x.device):
            law = self.response(out, self.y_loc, self.y_scale)
            drawn = pyro.sample("y", law, obs=y if y is None or not self.own_data else y.mT)
        return drawn.mT if self.own_data and y is None else drawn if y is None else y

    def outputs(self, weights: Tensor, x: Tensor, law: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """What the network gives, `*lead x n` (`*lead x n x outputs` where these are several).

        Args:
            weights: `*lead x size`, as the site ``"weights"`` has it; its last leading dimension, if any, is 1: that of
                the data plate.
            x: inputs, as for ``forward``.
            law: mean and standard deviation of the weights, where their noise is drawn elsewhere.
        """
        inputs = (x - self.x_loc) / self.x_scale
        if self.own_data:
            inputs = inputs.movedim(1, 0)
        if law is not None:
            law = (_without_plate(law[0]), _without_plate(law[1]))
        out = self.network(_without_plate(weights), inputs, law, own_inputs=self.own_data)
        wanted = self.response.outputs
        if wanted == 1 and out.dim() == _without_plate(weights).dim():
            return out
        if wanted == 1 and out.shape[-1] == 1:
            return out.squeeze(-1)
        if out.shape[-1] != wanted and (wanted is not None or out.shape[-1] < 2):
            raise ArgumentError(
                f"net gives outputs of shape {tuple(out.shape)}; the likelihood needs"
                f" {'two or more logits' if wanted is None else wanted} for each data point, in the last dimension"
            )
        return out

    def standardize(self, x: Tensor, y: Tensor | None = None) -> None:
        """Takes the mean and standard deviation of the training data, by which inputs and targets are scaled inside.

        Columns of x are scaled each on its own, images and sequences all elements alike; what is constant is left as it
        is. Targets are scaled for real responses only.

        Args:
            x: the training inputs, as for ``forward``.
            y: the training targets; ``None`` leaves their scale as it is.

        Raises:
            DataError: as for ``forward``.
        """
        self._require(x, y)
        columns = x.dim() - self.own_data == 2
        over = (0,) if columns else tuple(d for d in range(x.dim()) if not (self.own_data and d == 1))
        self.x_loc, self.x_scale = _moments(x, over)
        if self.own_data and not columns:
            shape = (len(self.x_loc), *[1] * (x.dim() - 2))
            self.x_loc, self.x_scale = self.x_loc.view(shape), self.x_scale.view(shape)
        if y is not None and self.response.real:
            loc, scale = _moments(y, (0,))
            self.y_loc, self.y_scale = (loc[:, None], scale[:, None]) if self.own_data else (loc, scale)

    def start_values(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """Values from which a guide starts: the parameters that the network has; fresh ones for further members."""
        first = self.network.start()
        if self.members is None:
            return {"weights": first}
        return {"weights": torch.stack([first, *(self.network.fresh() for _ in range(self.members - 1))])[:, None]}

    def _plate(self) -> contextlib.AbstractContextManager[Any]:
        if self.members is None:
            return contextlib.nullcontext()
        return pyro.plate("members", self.members, dim=-2, device=self.y_loc.device)

    def _require(self, x: Tensor, y: Tensor | None) -> int:
        """The number of data points, after x and y are checked."""
        if self.own_data and (x.dim() < 2 or x.shape[1] != self.members):
            raise DataError(f"x has shape {tuple(x.shape)}; with own_data it must be (n, {self.members}, …)")
        columns = self.x_loc.shape[self.own_data :]
        if columns and x.shape[-1] != columns[-1] and columns[-1] > 1:
            raise DataError(
                f"x has shape {tuple(x.shape)}; this model was standardised to inputs of {columns[-1]} columns"
            )
        wanted = (len(x), self.members) if self.own_data else (len(x),)
        if y is not None and tuple(y.shape) != wanted:
            raise DataError(f"y has shape {tuple(y.shape)}; for these x it must be {wanted}, one number a data point")
        if y is not None and y.is_floating_point() != self.response.floating:
            kind = "floating-point numbers: y.float()" if self.response.floating else "whole numbers: y.long()"
            raise DataError(f"y holds {y.dtype}; this likelihood takes {kind}")
        return len(x)

    def adopt_shapes(self, shapes: Mapping[str, torch.Size]) -> None:
        """Makes room for scales that were saved; a model that was never standardised has them as single numbers."""
        for name in _SCALES:
            if name in shapes:
                setattr(self, name, getattr(self, name).new_ones(shapes[name]))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        self.adopt_shapes({name.removeprefix(prefix): value.shape for name, value in state_dict.items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _without_plate(weights: Tensor) -> Tensor:
    """Without the dimension of the data plate, which has size 1 where it is there."""
    return weights.squeeze(-2) if weights.dim() > 1 else weights


def _moments(values: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    loc, scale = values.mean(over), values.std(over, correction=0)
    return loc, torch.where(scale > 0, scale, torch.ones_like(scale))


def _widths(given: Any, activation: str) -> nn.Module:
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) < 2:
        raise ArgumentError(
            f"net is {given!r}; it must be a torch.nn.Module, or the widths of a fully connected network, as"
            " [13, 50, 1]"
        )
    widths = [require_count("net's widths", width) for width in given]
    return nn.Sequential(nn.Flatten(), *mlp(widths[0], widths[1:-1], widths[-1], activation))
