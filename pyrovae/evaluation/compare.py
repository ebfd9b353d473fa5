"""Which guide for this model: each fitted alike, in one table."""

from __future__ import annotations

import contextlib
import copy
import html
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro.infer.elbo import ELBO as PyroELBO
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, NonFiniteError, PyrovaeError, unknown_name
from pyrovae.evaluation.importance import PSIS, draw_log_weights, point_masses, smoothed, weights_notes
from pyrovae.evaluation.likelihood import asking
from pyrovae.modes import device_of
from pyrovae.objectives import ELBO
from pyrovae.structure import Program
from pyrovae.training import SVI, fit
from pyrovae.training.data import Data, batches
from pyrovae.training.programs import local_params, named_parameters

__all__ = ["GuideComparison", "GuideRow", "compare_guides"]

GuideLike = str | Callable[..., Any]

_COLUMNS = ("guide", "ELBO", "k̂", "efficiency", "seconds", "parameters")


@dataclass(frozen=True)
class GuideRow:
    """One fitted guide.

    Args:
        name: of the guide.
        elbo: in nats, per data point where each has latents of its own.
        elbo_error: Monte Carlo standard error of ``elbo``, in nats.
        importance: k̂, efficiency and log-evidence with the guide as the proposal.
        seconds: wall-clock time of the fit.
        parameters: number of the guide's learnable numbers.
        guide: the fitted guide.
        model: the model it was fitted with, a copy of the given one where that has parameters.
    """

    name: str
    elbo: float
    elbo_error: float
    importance: PSIS
    seconds: float
    parameters: int
    guide: Any
    model: Any

    @property
    def k(self) -> float:
        """Pareto k̂; the median over the data points where each has latents of its own."""
        return float(self.importance.k.median())

    @property
    def efficiency(self) -> float:
        """Importance-sampling efficiency; the mean over the data points where each has latents of its own."""
        return float(self.importance.efficiency.mean())

    def cells(self) -> tuple[str, ...]:
        """What the table shows of the row."""
        k = f"{self.k:.2f}".replace("inf", "∞").replace("-", "−")
        error = f" ± {self.elbo_error:.3f}" if math.isfinite(self.elbo) else ""
        elbo = f"{self.elbo:.3f}{error}".replace("-", "−").replace("inf", "∞")
        return (self.name, elbo, k, f"{self.efficiency:.3f}", f"{self.seconds:.1f}", f"{self.parameters:,}")


@dataclass(frozen=True)
class GuideComparison(Sequence[GuideRow]):
    """A table of guides, one :class:`GuideRow` each, in the order they were given.

    Args:
        rows: the guides.
        per_point: whether ELBOs are per data point; k̂ is then the median, and the efficiency the mean, over them.
        notes: what makes the figures misleading here, one sentence each.
    """

    rows: tuple[GuideRow, ...]
    per_point: bool
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """A row by number or by name."""
        if isinstance(index, str):
            named = {row.name: row for row in self.rows}
            if index not in named:
                raise KeyError(f"there is no guide {index!r}; there are: {', '.join(named)}")
            return named[index]
        return self.rows[index]

    def __iter__(self) -> Iterator[GuideRow]:
        return iter(self.rows)

    @property
    def best(self) -> GuideRow:
        """The row with the highest ELBO."""
        return max(self.rows, key=lambda row: row.elbo)

    @property
    def _header(self) -> tuple[str, ...]:
        unit = "nats per data point" if self.per_point else "nats"
        said = {"ELBO": f"ELBO ({unit})"}
        if self.per_point:
            said |= {"k̂": "k̂ (median)", "efficiency": "efficiency (mean)"}
        return tuple(said.get(column, column) for column in _COLUMNS)

    def __repr__(self) -> str:
        table = [self._header, *(row.cells() for row in self.rows)]
        widths = [max(_width(line[column]) for line in table) for column in range(len(_COLUMNS))]
        lines = [
            "  ".join(
                text + " " * (width - _width(text)) if column == 0 else " " * (width - _width(text)) + text
                for column, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in self._header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row.cells()) + "</tr>" for row in self.rows
        )
        notes = "".join(f"<p>note: {html.escape(note)}</p>" for note in self.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def compare_guides(
    model: Program,
    data: Data,
    guides: Sequence[GuideLike] | Mapping[str, GuideLike],
    *,
    objective: Callable[[], PyroELBO] | None = None,
    steps: int = 2000,
    lr: float = 0.01,
    batch_size: int | None = None,
    samples: int = 4000,
    evaluate: Data | None = None,
    compile: Literal["auto", True, False] = "auto",
    seed: int = 0,
) -> GuideComparison:
    r"""Fits each guide alike and says how good each is.

    The ELBO differs from ``log p(x)`` by the KL from guide to posterior, so that differences between rows are
    differences in KL, provided that the model has no parameters of its own:

    .. math:: \mathcal{L}[q] = \log p(x) - \mathrm{KL}(q \,\|\, p(z \mid x))

    Args:
        model: Pyro model. Where it is a module, each guide is fitted with a copy of its own; ``pyro.param`` statements
            start from their initial values, and the param store is left as it was.
        data: a tensor or a tuple of tensors, the arguments of model and guide; with ``batch_size`` whatever
            :func:`pyrovae.fit` takes.
        guides: names of ``pyrovae.guides``, classes or functions that make a guide from the model
            (``pyro.infer.autoguide.AutoNormal``), or guides that are modules, which are fitted in place; as a mapping,
            by the names that the table shows. (For a guide that is a plain function: ``lambda model: guide``.)
        objective: makes the objective of each fit; ``ELBO(gradient="auto")`` when ``None``.
        steps: gradient steps, the same for all; with ``batch_size`` rounded up to whole epochs.
        lr: learning rate of Adam; it decays to zero by a cosine schedule.
        batch_size: data points a minibatch, for :func:`pyrovae.fit`; ``None`` takes all data in each step.
        samples: draws behind the ELBO, k̂ and the efficiency; at least 25.
        evaluate: data on which these are computed; ``None`` for ``data``.
        compile: whether steps are compiled, as for :func:`pyrovae.fit`; with all data in each step ``"auto"`` is not.
        seed: of each guide's initialisation, fit and evaluation; the caller's random state is left as it was.

    Returns:
        A :class:`GuideComparison`, which prints as a table and shows as one in a notebook.

    Raises:
        ArgumentError: an argument is out of range, or a guide cannot be made from the model.
        PyrovaeError: whatever a fit raises; the message begins with the guide's name.

    References:
        Yao et al. 2018, https://arxiv.org/abs/1802.02538.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)
        >>> table = compare_guides(model, torch.ones(10), [AutoNormal, AutoMultivariateNormal], steps=300, lr=0.05)
        >>> table.best.name
        'AutoMultivariateNormal'
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ArgumentError(f"steps is {steps!r}; it must be a whole number, at least 1")
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 25:
        raise ArgumentError(f"samples is {samples!r}; it must be a whole number, at least 25")
    makers = _named(guides)
    place = device_of(model)
    shown = _arguments(data if evaluate is None else evaluate, place)
    rows, notes = [], dict[str, None]()
    for name, maker in makers.items():
        with _own_state(seed):
            try:
                own = copy.deepcopy(model) if isinstance(model, nn.Module) else model
                guide = maker if isinstance(maker, nn.Module) else _made(name, maker, own)
                with local_params(own, guide):
                    learned = named_parameters(own, guide, *shown)
                    numbers = sum(value.numel() for value in named_parameters(guide, guide, *shown).values())
                torch.manual_seed(seed)
                start = time.perf_counter()
                if learned:
                    loss = ELBO(gradient="auto") if objective is None else objective()
                    _fit(own, guide, data, loss, steps, lr, batch_size, compile, seed, place)
                seconds = time.perf_counter() - start
                said, elbo, error, importance = _evaluated(own, guide, shown, samples, seed)
            except PyrovaeError as cause:
                raise type(cause)(f"guide {name!r}: {cause}") from cause
        rows.append(GuideRow(name, elbo, error, importance, seconds, numbers, guide, own))
        notes.update(dict.fromkeys(said))
        if any(key.startswith("model.") for key in learned):
            notes["The model's own parameters were fitted with each guide: an ELBO tells of both together."] = None
    return GuideComparison(tuple(rows), any(row.importance.k.dim() > 0 for row in rows), tuple(notes))


def _named(guides: Any) -> dict[str, GuideLike]:
    """The guides by the names that the table shows; equal names get a number."""
    if isinstance(guides, Mapping):
        named = dict(guides)
    elif isinstance(guides, Sequence) and not isinstance(guides, str):
        named = {}
        for guide in guides:
            plain = isinstance(guide, str) and guide
            name = plain or getattr(guide, "__name__", type(guide).__name__)
            same = sum(other == name or other.startswith(f"{name} (") for other in named)
            named[f"{name} ({same + 1})" if same else name] = guide
    else:
        raise ArgumentError(f"guides is a {type(guides).__name__}; it must be a list or a mapping by name")
    if not named:
        raise ArgumentError("guides is empty; give at least one")
    for name, guide in named.items():
        if not (isinstance(guide, str) or callable(guide)):
            raise ArgumentError(f"guide {name!r} is a {type(guide).__name__}; it must be a name, a class or a guide")
    return named


def _made(name: str, maker: Any, model: Program) -> Any:
    made = (_class(maker) if isinstance(maker, str) else maker)(model)
    if not callable(made):
        raise ArgumentError(f"guide {name!r} made a {type(made).__name__} of the model; it must make a guide")
    return made


def _class(name: str) -> type:
    """The class of that name in ``pyrovae.guides``."""
    from pyrovae import guides

    known = {each: getattr(guides, each) for each in guides.__all__ if isinstance(getattr(guides, each), type)}
    if name not in known:
        raise unknown_name("guide", name, known)
    return known[name]


def _arguments(data: Any, place: torch.device) -> tuple[Tensor, ...]:
    """All data as the arguments of model and guide."""
    if isinstance(data, Tensor):
        data = (data,)
    if not isinstance(data, tuple | list):
        data = [torch.cat(parts) for parts in zip(*batches(data, None, place, None).epoch(0), strict=True)]
    return tuple(part.to(place) if isinstance(part, Tensor) else part for part in data)


@contextlib.contextmanager
def _own_state(seed: int) -> Iterator[None]:
    """Random state from the seed, and an empty param store; both are as before afterwards."""
    with torch.random.fork_rng(), pyro.get_param_store().scope():
        torch.manual_seed(seed)
        yield


def _fit(
    model: Program,
    guide: Any,
    data: Any,
    objective: PyroELBO,
    steps: int,
    lr: float,
    batch_size: int | None,
    compile: Literal["auto", True, False],
    seed: int,
    place: torch.device,
) -> None:
    """Fits model and guide in place: on minibatches, or on all data in each step."""
    if batch_size is not None:
        epochs = -(-steps // batches(data, batch_size, place, None).steps)
        fit(
            model,
            guide,
            data,
            objective=objective,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            schedule="cosine",
            device=place,
            compile=compile,
            seed=seed,
            progress=False,
        )
        return
    args = _arguments(data, place)
    adam = pyro.optim.CosineAnnealingLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": lr}, "T_max": steps})
    svi = SVI(model, guide, adam, loss=objective, compile=compile is True)
    with pyro.validation_enabled(False):
        for _ in range(steps):
            loss = svi.step(*args)
            adam.step()
    if not math.isfinite(loss):
        raise NonFiniteError(f"the loss became {loss} within {steps} steps at lr={lr}; take a smaller lr")


def _evaluated(
    model: Program, guide: Any, args: tuple[Any, ...], samples: int, seed: int
) -> tuple[tuple[str, ...], float, float, PSIS]:
    """Notes, ELBO with its standard error, and the importance diagnostics."""
    with asking(model, guide, seed=seed):
        fixed = point_masses(guide, *args)
        if fixed:
            none, never = torch.tensor(0.0), torch.tensor(math.inf)
            note = f"A guide is a point mass at {', '.join(map(repr, fixed))}: its KL to the posterior is infinite."
            return (note,), -math.inf, 0.0, PSIS(never, none, -never, none, samples, 0, (note,))
        notes, latent_dim = weights_notes(model, guide, args, {}, samples)
        log_w, rounding = draw_log_weights(model, guide, args, {}, samples)
    draws = log_w.flatten(1).mean(1) if log_w.dim() > 1 else log_w
    found = smoothed(log_w, rounding, latent_dim, notes)
    return notes, float(draws.mean()), float(draws.std()) / samples**0.5, found


def _width(text: str) -> int:
    """Columns that a text takes: a combining circumflex has none of its own."""
    return sum(not unicodedata.combining(letter) for letter in text)
