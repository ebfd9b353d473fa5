"""What an amortized posterior says of data: their means, directions of attributes, neighbours."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyrovae.errors import ArgumentError, DataError, require_count, unknown_name
from pyrovae.modes import evaluating

__all__ = ["Metric", "Neighbours", "attribute_vector", "attribute_vectors", "nearest_neighbours", "posterior_means"]

Metric = Literal["euclidean", "kl"]

_CHUNK = 1000  # data points that are encoded at a time, which bounds the memory


def posterior_means(guide: Any, x: Tensor) -> Tensor:
    """Means of q(z | x), in evaluation mode and without gradients.

    Args:
        guide: an amortized guide with ``encode``.
        x: A `n x *data_shape` tensor of data.

    Returns:
        A `n x latent_dim` tensor on the guide's device.

    Raises:
        ArgumentError: the guide has no ``encode``.
        DataError: there are no data.

    Example:
        >>> from pyrovae import guides, models
        >>> guide = guides.AmortizedNormal(models.VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,)))
        >>> posterior_means(guide, torch.zeros(5, 8, 8)).shape
        torch.Size([5, 2])
    """
    encode = _encode_of(guide)
    if x.dim() == 0 or len(x) == 0:
        raise DataError(f"x has shape {tuple(x.shape)}; give at least one data point, with a batch dimension")
    with evaluating(guide, seed=0) as device:
        return torch.cat([encode(part.to(device)).mean for part in x.split(_CHUNK)])


def attribute_vector(guide: Any, present: Tensor, absent: Tensor) -> Tensor:
    r"""The direction of an attribute: from the mean latent of data without it to that of data with it.

    .. math:: v = \frac{1}{N_1} \sum_{n: \text{with}} \mathbb{E}_{q(z \mid x_n)} z
        - \frac{1}{N_0} \sum_{n: \text{without}} \mathbb{E}_{q(z \mid x_n)} z

    Args:
        guide: an amortized guide with ``encode``.
        present: A `n1 x *data_shape` tensor of data with the attribute.
        absent: A `n0 x *data_shape` tensor of data without it.

    Returns:
        A `latent_dim` tensor.

    Raises:
        ArgumentError: the guide has no ``encode``.
        DataError: one of the two is empty.

    References:
        Larsen et al. 2016, section 4.2, https://arxiv.org/abs/1512.09300.

    Example:
        >>> from pyrovae import guides, models
        >>> guide = guides.AmortizedNormal(models.VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,)))
        >>> attribute_vector(guide, torch.ones(5, 8, 8), torch.zeros(3, 8, 8)).shape
        torch.Size([2])
    """
    return posterior_means(guide, present).mean(0) - posterior_means(guide, absent).mean(0)


def attribute_vectors(guide: Any, x: Tensor, y: Tensor) -> Tensor:
    """The direction of every label, or of every attribute of labelled data: see :func:`attribute_vector`.

    Args:
        guide: an amortized guide with ``encode``.
        x: A `n x *data_shape` tensor of data.
        y: labels, `n`, of at least two values; or attributes, `n x A`, 1 for present and 0 for absent.

    Returns:
        A `C x latent_dim` tensor, a row for each of ``y.unique()``: its data against all others; or `A x latent_dim`.

    Raises:
        ArgumentError: the guide has no ``encode``.
        DataError: ``y`` does not label ``x``, or all or none of the data have an attribute.

    Example:
        >>> from pyrovae import guides, models
        >>> guide = guides.AmortizedNormal(models.VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,)))
        >>> attribute_vectors(guide, torch.rand(6, 8, 8), torch.tensor([3, 1, 4, 1, 3, 4])).shape
        torch.Size([3, 2])
    """
    if y.dim() not in (1, 2) or len(y) != len(x):
        raise DataError(f"y has shape {tuple(y.shape)}; it must be `n` or `n x A` with n={len(x)}, the length of x")
    present = y.unsqueeze(-1) == y.unique() if y.dim() == 1 else y != 0
    counts = present.sum(0)
    if bool(((counts == 0) | (counts == len(x))).any()):
        raise DataError(
            f"y has {counts.tolist()} of {len(x)} data points with each attribute; a direction needs data with it and"
            " data without it"
        )
    means = posterior_means(guide, x)
    member = present.to(means)
    with_it = member.mT @ means / member.sum(0).unsqueeze(-1)
    return with_it - (1.0 - member).mT @ means / (1.0 - member).sum(0).unsqueeze(-1)


class Neighbours(NamedTuple):
    """The nearest data points of each query, the nearest first: both `q x k`."""

    distances: Tensor
    indices: Tensor


def nearest_neighbours(
    guide: Any, queries: Tensor, data: Tensor, k: int = 5, metric: Metric = "euclidean"
) -> Neighbours:
    r"""The data points whose posteriors are nearest to those of the queries.

    Args:
        guide: an amortized guide with ``encode``.
        queries: A `q x *data_shape` tensor.
        data: A `n x *data_shape` tensor to search. A query that is one of these is its own first neighbour.
        k: how many neighbours, at most n.
        metric: ``"euclidean"``: the distance of the posterior means; ``"kl"``: KL(q(z | query) ‖ q(z | data point)) in
            nats, for posteriors that have it in closed form.

    Returns:
        :class:`Neighbours` with ``distances`` and ``indices`` into ``data``.

    Raises:
        ArgumentError: ``k`` or the metric is out of range, the guide has no ``encode``, or its posteriors no KL.
        DataError: there are no queries, or no data.

    Example:
        >>> from pyrovae import guides, models
        >>> guide = guides.AmortizedNormal(models.VAE(data_shape=(8, 8), latent_dim=2, hidden=(32,)))
        >>> data = torch.rand(20, 8, 8)
        >>> nearest_neighbours(guide, data[:3], data, k=2).indices[:, 0]
        tensor([0, 1, 2])
    """
    require_count("k", k)
    if metric not in get_args(Metric):
        raise unknown_name("metric", metric, get_args(Metric))
    if k > len(data):
        raise ArgumentError(f"k is {k}, but data holds {len(data)} data points; ask for at most as many")
    if metric == "euclidean":
        means = posterior_means(guide, queries), posterior_means(guide, data)
        distances = torch.cdist(*means, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        distances = _divergences(guide, queries, data)
    nearest = distances.topk(k, largest=False)
    return Neighbours(nearest.values, nearest.indices)


def _divergences(guide: Any, queries: Tensor, data: Tensor) -> Tensor:
    """KL(q(z | query) ‖ q(z | data point)), `q x n`."""
    if len(queries) == 0:
        raise DataError("queries holds no data points; give at least one")
    encode = _encode_of(guide)
    with evaluating(guide, seed=0) as device:
        columns = []
        for part in data.split(_CHUNK):
            there = encode(part.to(device))
            here = (encode(query.unsqueeze(0).to(device)).expand(there.batch_shape) for query in queries)
            try:
                columns.append(torch.stack([torch.distributions.kl_divergence(one, there) for one in here]))
            except NotImplementedError as error:
                raise ArgumentError(
                    f"metric='kl' needs posteriors with a KL in closed form, and {type(guide).__name__}'s have none;"
                    " use metric='euclidean'"
                ) from error
        return torch.cat(columns, dim=1)


def _encode_of(guide: Any) -> Any:
    if not hasattr(guide, "encode"):
        raise ArgumentError(
            f"guide {type(guide).__name__} has no 'encode'; use an amortized guide, such as AmortizedNormal"
        )
    return guide.encode
