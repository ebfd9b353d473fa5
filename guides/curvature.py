"""Curvature of a network's likelihood in its weights: Fisher information, and what can be kept of its sum."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.distributions import Transform, constraints, kl_divergence
from torch.func import jacrev, vmap
from torch.nn import functional as F

from pyrovae.errors import ArgumentError
from pyrovae.models.bnn import BNN

__all__ = ["STRUCTURES", "Covariance", "information"]


def information(model: BNN, out: Tensor) -> Tensor:
    """Fisher information of the outputs in each y_n, the Hessian of the KL divergence: `n x outputs x outputs`."""
    out = out.requires_grad_()
    law, here = (model.response(value, model.y_loc, model.y_scale) for value in (out, out.detach()))
    if isinstance(law, dist.StudentT):
        slope = grad(law.loc.sum(), out)[0]
        return ((law.df + 1) / (law.df + 3) * (slope / law.scale) ** 2).detach()[:, None, None]
    (first,) = grad(kl_divergence(here, law).sum(), out, create_graph=True)
    each = first.unbind(-1) if out.dim() > 1 else (first,)
    second = [grad(part.sum(), out, retain_graph=True)[0].reshape(len(out), -1) for part in each]
    return torch.stack(second, 1)


def _jacobian(model: BNN, loc: Tensor, x: Tensor) -> Tensor:
    """Jacobian of the outputs of each data point by the weights, `n x outputs x P`."""

    def outputs(weights: Tensor, row: Tensor) -> Tensor:
        return model.outputs(weights, row.unsqueeze(0)).reshape(-1)

    if model.network.vectorized:
        return vmap(jacrev(outputs), in_dims=(None, 0))(loc.detach(), x)
    rows = [torch.autograd.functional.jacobian(lambda w, row=row: outputs(w, row), loc.detach()) for row in x]
    return torch.stack(rows)


class Covariance(nn.Module):
    """One structure of H: sums the curvature over the data, then keeps what sampling needs."""

    def add(self, model: BNN, loc: Tensor, x: Tensor, information: Tensor) -> None:
        """Adds the curvature of some data, of which ``information`` is Λ, `n x outputs x outputs`."""
        raise NotImplementedError

    def close(self, precision: Tensor) -> None:
        """Adds the diagonal precision of the prior to the sum, and factorizes it."""
        raise NotImplementedError

    def law(self, loc: Tensor) -> dist.TorchDistribution:
        """The Gaussian around ``loc``."""
        raise NotImplementedError

    def whitened(self, vector: Tensor) -> Tensor:
        """Lᵀ times a vector."""
        raise NotImplementedError

    def variance(self) -> Tensor:
        """The diagonal of L Lᵀ."""
        raise NotImplementedError


class _Full(Covariance):
    scale_tril: Tensor

    def __init__(self, model: BNN) -> None:
        super().__init__()
        self.register_buffer("scale_tril", torch.eye(model.network.size))
        self.sum: Tensor | float = 0.0

    def add(self, model: BNN, loc: Tensor, x: Tensor, information: Tensor) -> None:
        jacobian = _jacobian(model, loc, x)
        self.sum = self.sum + (information @ jacobian).flatten(0, 1).mT @ jacobian.flatten(0, 1)

    def close(self, precision: Tensor) -> None:
        factor = torch.linalg.cholesky(self.sum + precision.diag())
        self.scale_tril.copy_(torch.linalg.cholesky(torch.cholesky_inverse(factor)))
        self.sum = 0.0

    def law(self, loc: Tensor) -> dist.TorchDistribution:
        return dist.MultivariateNormal(loc, scale_tril=self.scale_tril)

    def whitened(self, vector: Tensor) -> Tensor:
        return self.scale_tril.mT @ vector

    def variance(self) -> Tensor:
        return self.scale_tril.square().sum(-1)


class _Diagonal(Covariance):
    scale: Tensor

    def __init__(self, model: BNN) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(model.network.size))
        self.sum: Tensor | float = 0.0

    def add(self, model: BNN, loc: Tensor, x: Tensor, information: Tensor) -> None:
        jacobian = _jacobian(model, loc, x)
        self.sum = self.sum + (jacobian * (information @ jacobian)).sum((0, 1))

    def close(self, precision: Tensor) -> None:
        self.scale.copy_((self.sum + precision).rsqrt())
        self.sum = 0.0

    def law(self, loc: Tensor) -> dist.TorchDistribution:
        return dist.Normal(loc, self.scale).to_event(1)

    def whitened(self, vector: Tensor) -> Tensor:
        return self.scale * vector

    def variance(self) -> Tensor:
        return self.scale.square()


class _Kronecker(Covariance):
    """A block for each layer, the weights of which lie one layer after the other in ε."""

    order: Tensor
    layers: Any  # a ModuleList of _Layer

    def __init__(self, model: BNN) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_layers(model))
        order = torch.cat([layer.places.flatten() for layer in self.layers]).argsort()
        self.register_buffer("order", order, persistent=False)
        self.sizes = [layer.places.numel() for layer in self.layers]

    def add(self, model: BNN, loc: Tensor, x: Tensor, information: Tensor) -> None:
        with contextlib.ExitStack() as stack:
            calls = [stack.enter_context(layer.watching(model)) for layer in self.layers]
            out = model.outputs(loc, x).reshape(len(x), -1)
        for layer, found in zip(self.layers, calls, strict=True):
            if len(found) != 1:
                raise ArgumentError(
                    f"structure is 'kronecker', and layer {layer.name!r} is called {len(found)} times in a run of the"
                    " network (or by another way than its own forward); it must be once: use 'full' or 'diagonal'"
                )
        values, basis = torch.linalg.eigh(information)
        root = basis * values.clamp_min(0).sqrt().unsqueeze(-2)
        for column in root.unbind(-1):
            slopes = grad((out * column).sum(), [h for (h,) in calls], retain_graph=True, materialize_grads=True)
            for layer, slope in zip(self.layers, slopes, strict=True):
                layer.add_slope(slope)

    def close(self, precision: Tensor) -> None:
        for layer in self.layers:
            layer.close(precision[layer.places])

    def law(self, loc: Tensor) -> dist.TorchDistribution:
        unit = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return dist.TransformedDistribution(unit, [_Affine(self, loc)])

    def forward(self, noise: Tensor) -> Tensor:
        """L ε."""
        parts = zip(self.layers, noise.split(self.sizes, -1), strict=True)
        return torch.cat([layer(part) for layer, part in parts], -1)[..., self.order]

    def inverse(self, change: Tensor) -> Tensor:
        """ε from L ε."""
        return torch.cat([layer.inverse(change[..., layer.places]) for layer in self.layers], -1)

    def log_det(self) -> Tensor:
        """log |det L|."""
        return torch.stack([layer.log_det() for layer in self.layers]).sum()

    def whitened(self, vector: Tensor) -> Tensor:
        return torch.cat([layer.whitened(vector[layer.places]) for layer in self.layers])

    def variance(self) -> Tensor:
        return torch.cat([layer.variance().flatten() for layer in self.layers])[self.order]


class _Affine(Transform):
    """``ŵ + L ε``."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, covariance: _Kronecker, loc: Tensor) -> None:
        super().__init__()
        self.covariance, self.loc = covariance, loc

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + self.covariance(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.covariance.inverse(y - self.loc)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.covariance.log_det().expand(x.shape[:-1])


class _Layer(nn.Module):
    r"""``(√D_g ⊗ √D_a) (G̃ ⊗ Ã + I) (√D_g ⊗ √D_a)`` with ``D = D_g ⊗ D_a``, for a matrix of weights, `outputs x inputs`.

    Args:
        name: of the module.
        places: where the elements of its matrix, to which a bias is one more column, lie in the flat vector.
        parameters: which of its parameters are latent, of ``"weight"`` and ``"bias"``.
        convolution: whether it is one; else it is linear.
    """

    places: Tensor
    input_basis: Tensor
    output_basis: Tensor
    input_scale: Tensor
    output_scale: Tensor
    scale: Tensor

    def __init__(self, name: str, places: Tensor, parameters: Collection[str], convolution: bool) -> None:
        super().__init__()
        self.name, self.parameter_names, self.convolution = name, parameters, convolution
        outputs, inputs = places.shape
        self.register_buffer("places", places, persistent=False)
        for side, size in (("input", inputs), ("output", outputs)):
            self.register_buffer(f"{side}_basis", torch.eye(size))
            self.register_buffer(f"{side}_scale", torch.ones(size))
        self.register_buffer("scale", torch.ones(outputs, inputs))
        self._reset()

    def _reset(self) -> None:
        self.rows, self.inputs, self.outputs = 0, torch.zeros(()), torch.zeros(())

    @contextlib.contextmanager
    def watching(self, model: BNN) -> Iterator[list[Tensor]]:
        """Within the block, sums the inputs of the module; yields a list, to which each of its outputs is added."""
        found: list[Tensor] = []

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            rows = self._rows(module, args[0].detach())
            self.rows, self.inputs = self.rows + len(rows), self.inputs + rows.mT @ rows
            found.append(out)
            return out.clone()  # which an in-place activation may overwrite

        handle = model.network.net.get_submodule(self.name).register_forward_hook(hook)
        try:
            yield found
        finally:
            handle.remove()

    def _rows(self, module: Any, a: Tensor) -> Tensor:
        """What each output of the module is computed from, `R x inputs`."""
        if self.convolution:
            a = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride).mT
        rows = a.flatten(0, -2)
        columns = {"weight": rows, "bias": rows.new_ones(len(rows), 1)}
        return torch.cat([columns[name] for name in self.parameter_names], 1)

    def add_slope(self, slope: Tensor) -> None:
        """Sums the squares of derivatives by the module's outputs."""
        rows = (slope.flatten(2).mT if self.convolution else slope).flatten(0, -2)
        self.outputs = self.outputs + rows.mT @ rows

    def close(self, precision: Tensor) -> None:
        """Takes the prior's precision, `outputs x inputs`, and factorizes."""
        by_input, by_output = precision[0], precision[:, 0] / precision[0, 0]
        if not torch.allclose(by_output[:, None] * by_input, precision, rtol=1e-4):
            raise ArgumentError(
                f"structure is 'kronecker', and the prior's precision of layer {self.name!r} is no product of a number"
                " for each output and one for each input, as that of a normal prior is: use 'full' or 'diagonal'"
            )
        values = []
        for side, total, given in (("input", self.inputs, by_input), ("output", self.outputs, by_output)):
            scale = given.rsqrt()
            found, basis = torch.linalg.eigh(scale[:, None] * total * scale)
            values.append(found.clamp_min(0))
            getattr(self, f"{side}_basis").copy_(basis)
            getattr(self, f"{side}_scale").copy_(scale)
        self.scale.copy_((values[1][:, None] * values[0] / self.rows + 1).rsqrt())
        self._reset()

    def forward(self, noise: Tensor) -> Tensor:
        """L ε, `… x size` of both."""
        matrix = self.output_basis @ (self.scale * noise.unflatten(-1, self.scale.shape)) @ self.input_basis.mT
        return (self.output_scale[:, None] * matrix * self.input_scale).flatten(-2)

    def inverse(self, change: Tensor) -> Tensor:
        """ε, `… x size`, from L ε as a matrix, `… x outputs x inputs`."""
        matrix = change / self.output_scale[:, None] / self.input_scale
        return (self.output_basis.mT @ matrix @ self.input_basis / self.scale).flatten(-2)

    def whitened(self, change: Tensor) -> Tensor:
        """Lᵀ of a matrix."""
        matrix = change * self.output_scale[:, None] * self.input_scale
        return (self.output_basis.mT @ matrix @ self.input_basis * self.scale).flatten()

    def variance(self) -> Tensor:
        """The diagonal of L Lᵀ, as a matrix."""
        inner = self.output_basis.square() @ self.scale.square() @ self.input_basis.square().mT
        return self.output_scale.square()[:, None] * inner * self.input_scale.square()

    def log_det(self) -> Tensor:
        """log |det L|."""
        return (self.scale.log() + self.output_scale.log()[:, None] + self.input_scale.log()).sum()


def _layers(model: BNN) -> Iterator[_Layer]:
    """The layers whose parameters are latent, if they are all such as have Kronecker factors."""
    net = model.network.net
    users = Counter(id(buffer) for module in net.modules() for buffer in module._buffers.values())
    for name in dict.fromkeys(block.layer for block in model.network.blocks):
        module = net.get_submodule(name)
        blocks = {b.name.rpartition(".")[2]: b for b in model.network.blocks if b.layer == name}
        plain = isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        )
        if not plain or any(users[id(module._buffers[part])] > 1 for part in blocks):
            raise ArgumentError(
                f"structure is 'kronecker', and layer {name!r} is {module}; latent weights must be of linear layers"
                " and of convolutions in two dimensions (with groups=1, padding in numbers, of zeros), not shared with"
                " another layer. Use 'full' or 'diagonal', or leave the layer out: BNN(…, bayesian=[patterns])"
            )
        outputs = int(module.out_channels if isinstance(module, nn.Conv2d) else module.out_features)  # type: ignore
        places = [torch.arange(b.start, b.start + b.size).view(outputs, -1) for b in blocks.values()]
        yield _Layer(name, torch.cat(places, 1), tuple(blocks), isinstance(module, nn.Conv2d))


STRUCTURES: dict[str, type[Covariance]] = {"full": _Full, "kronecker": _Kronecker, "diagonal": _Diagonal}
