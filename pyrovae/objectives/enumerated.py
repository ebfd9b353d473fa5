"""The ELBO with discrete latents summed out exactly."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.traceenum_elbo import _compute_dice_elbo
from torch import Tensor

from pyrovae.errors import ArgumentError, ModelGuideError, PyrovaeError
from pyrovae.objectives.base import Estimate, Objective
from pyrovae.registry import OBJECTIVES
from pyrovae.structure import Program, Structure, check_enumerated

__all__ = ["EnumeratedELBO"]


@OBJECTIVES.register
class EnumeratedELBO(Objective):
    r"""Evidence lower bound with discrete latents summed out exactly, so that they add no noise and need no score.

    .. math::
        \mathcal{L} = \mathbb{E}_{q(z \mid x)} \sum_d q(d \mid z, x) \Big[
        \log \sum_c p(x, z, c, d) - \log q(z, d \mid x) \Big]

    with z the continuous latents (pathwise), d the discrete ones that the guide samples, each summed under the guide,
    and c those that it lacks, each marginalised in the model. Without z and d it is ``log p(x)`` itself.

    Every discrete site of finite support is summed in parallel, unless its own ``infer={"enumerate": …}`` says
    otherwise: ``"sequential"`` in the guide saves memory, and ``None`` there has it sampled, with a score-function
    gradient. The sums are those of :class:`pyro.infer.TraceEnum_ELBO`, whose rules apply: a summed value has one more
    dimension on the left, so tensors are indexed with :class:`pyro.ops.indexing.Vindex`; nothing outside a plate may
    depend on a summed site inside it; the steps of a chain are told apart by :func:`pyro.markov`.

    The likelihood and the KL are not apart in a sum, so the bound has no parts. (Pyro's sums ask the device now and
    then whether a probability is zero; on a GPU each time is a synchronisation.)

    Args:
        particles: number K of particles of the sampled sites.

    Raises:
        ArgumentError: ``particles`` is out of range; and, at the first evaluation, a site of the guide that can be
            neither reparameterized nor summed out (Poisson).
        ModelGuideError: at the first evaluation, a site that the guide lacks and that cannot be summed out, or a model
            or guide that does not fit the rules above.

    References:
        Obermeyer et al. 2019, https://arxiv.org/abs/1902.03210.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):   # a mixture of two normals
        ...     with pyro.plate("data", len(x)):
        ...         component = pyro.sample("component", dist.Categorical(torch.tensor([0.3, 0.7])))
        ...         pyro.sample("x", dist.Normal(torch.tensor([-2.0, 3.0])[component], 1.0), obs=x)
        >>> x = torch.tensor([-1.0, 2.5])
        >>> bound = EnumeratedELBO().estimate(model, lambda x: None, x).bound
        >>> density = 0.3 * dist.Normal(-2.0, 1.0).log_prob(x).exp() + 0.7 * dist.Normal(3.0, 1.0).log_prob(x).exp()
        >>> torch.allclose(bound, density.log().sum())
        True
    """

    def __init__(self, particles: int = 1) -> None:
        super().__init__(particles)
        self._sums: TraceEnum_ELBO | None = None

    def structure(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Structure:
        """The checked structure; model and guide are run once as they are and once summed, with validation."""
        if self._checked is None or self._checked[0] is not model or self._checked[1] is not guide:
            structure = check_enumerated(model, guide, *args, **kwargs)
            self.accept(structure)
            self._sums = TraceEnum_ELBO(
                num_particles=self.particles,
                vectorize_particles=self.particles > 1,
                max_plate_nesting=structure.max_plate_nesting,
                strict_enumeration_warning=False,
            )
            self._try(model, guide, args, kwargs)
            self._checked = (model, guide, structure)
        return self._checked[2]

    def accept(self, structure: Structure) -> None:
        """Refuses a site of the guide that can be neither reparameterized nor summed out."""
        stuck = [
            name
            for name, pathwise in structure.reparameterized.items()
            if not pathwise and name not in structure.enumeration
        ]
        if stuck:
            raise ArgumentError(
                "EnumeratedELBO sums over discrete sites of finite support and takes continuous ones by their path;"
                f" these sites of the guide allow neither: {', '.join(map(repr, stuck))}. Use"
                " ELBO(gradient='score', particles=8) or IWAE(particles=8, gradient='vimco') (and where a discrete site"
                " is one event of several values, .to_event(…), put them in a pyro.plate instead)."
            )

    def estimate(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Estimate:
        """Sums over the discrete sites and draws the others once; see :class:`Objective`. The bound has no parts."""
        self.structure(model, guide, *args, **kwargs)
        bound = self._bound(model, guide, args, kwargs)
        return Estimate(loss=-bound, bound=bound.detach())

    def _bound(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``TraceEnum_ELBO.differentiable_loss`` without its look at the value, and for no_grad as well."""
        assert self._sums is not None
        programs = (config_enumerate(model), config_enumerate(guide))
        traces = self._sums._get_traces(*programs, args, kwargs)
        return torch.as_tensor(sum(_compute_dice_elbo(*pair) for pair in traces)) / self.particles

    def _try(self, model: Program, guide: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """One summed run in which Pyro checks the shapes; the random state is left as it was."""
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices), torch.no_grad(), pyro.validation_enabled(True), poutine.block():
            try:
                self._bound(model, guide, args, kwargs)
            except (PyrovaeError, torch.OutOfMemoryError):
                raise
            except (ValueError, IndexError, RuntimeError) as error:
                raise ModelGuideError(
                    f"model and guide run as they are, but not with their discrete sites summed out: {error}\n"
                    "A summed value has one more dimension on the left: index tensors with pyro.ops.indexing.Vindex"
                    " and count other dimensions from the right."
                ) from error
