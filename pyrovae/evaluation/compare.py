"""Which guide for this model: each fitted alike, in one table."""

from __future__ import annotations

import contextlib
import copy
import html
import math
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import pyro
import torch
from pyro.infer.elbo import ELBO as PyroELBO
from torch import Tensor, nn

from pyrovae.errors import ArgumentError, NonFiniteError, PyrovaeError, require_count, require_positive, unknown_name
from pyrovae.evaluation.importance import PSIS, draw_log_weights, point_masses, smoothed, weights_notes
from pyrovae.evaluation.likelihood import asking, mean_error
from pyrovae.modes import device_of
from pyrovae.objectives import ELBO
from pyrovae.structure import Program
from pyrovae.training import SVI, fit
from pyrovae.training.data import Data, batches
from pyrovae.training.programs import local_params, named_parameters

__all__ = ["GuideComparison", "GuideRow", "compare_guides"]

GuideLike = str | Callable[..., Any]

_COLUMNS = ("guide", "ELBO", "k̂", "efficiency", "seconds", "parameters")

_ERRORS = 5.0  # standard errors that an ELBO may lie above the evidence
_LUCK = (
    12.0  # nats: an estimate of p(x) whose mean is right is e^12 times too large at most once in e^12 = 160 000 seeds
)
_COARSE = 1000.0  # nats of rounding in a log-weight, which no fit that came near a posterior has


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
        diverged: how the row shows that its fit diverged, so that its figures mean nothing; empty where it did not.
    """

    name: str
    elbo: float
    elbo_error: float
    importance: PSIS
    seconds: float
    parameters: int
    guide: Any
    model: Any
    diverged: str = ""

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
        cost = (f"{self.seconds:.1f}", f"{self.parameters:,}")
        if self.diverged:
            return (self.name, "diverged", "–", "–", *cost)
        k = f"{self.k:.2f}".replace("inf", "∞").replace("-", "−")
        error = f" ± {self.elbo_error:.3f}" if math.isfinite(self.elbo) else ""
        elbo = f"{self.elbo:.3f}{error}".replace("-", "−").replace("inf", "∞")
        return (self.name, elbo, k, f"{self.efficiency:.3f}", *cost)


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
        """The row with the highest ELBO, of those whose fit did not diverge.

        Raises:
            NonFiniteError: every fit diverged.
        """
        sound = [row for row in self.rows if not row.diverged]
        if not sound:
            raise NonFiniteError("the fit of every guide diverged; take a smaller lr")
        return max(sound, key=lambda row: row.elbo)

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

    A guide whose fit diverged is shown as such, with a note that says how it is known, and is never the best: its loss,
    parameters or log-weights are not finite or lost in rounding; or its ELBO, which no guide's can, lies above the
    log-evidence that a guide with a reliable k̂ gives, while its own k̂ is not reliable.

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
        PyrovaeError: whatever else a fit raises; the message begins with the guide's name.

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
    require_count("steps", steps)
    require_count("samples", samples, 25)
    require_positive("lr", lr)
    makers = _named(guides)
    place = device_of(model)
    shown = _arguments(data if evaluate is None else evaluate, place)
    rows: list[GuideRow] = []
    notes = dict[str, None]()
    of_model = False  # whether the model has parameters of its own
    for name, maker in makers.items():
        with _own_state(seed):
            try:
                own = copy.deepcopy(model) if isinstance(model, nn.Module) else model
                guide = maker if isinstance(maker, nn.Module) else _made(name, maker, own)
                with local_params(own, guide):
                    learned = named_parameters(own, guide, *shown)
                    numbers = sum(value.numel() for value in named_parameters(guide, guide, *shown).values())
                torch.manual_seed(seed)
                start, diverged = time.perf_counter(), ""
                said: tuple[str, ...] = ()
                if learned:
                    loss = ELBO(gradient="auto") if objective is None else objective()
                    fitting = partial(_fit, own, guide, data, loss, steps, lr, batch_size, compile, seed, place)
                    diverged = _diverged(fitting, learned)
                seconds = time.perf_counter() - start
                if diverged:
                    elbo, error, importance = math.nan, math.nan, _unknown(samples)
                else:
                    said, elbo, error, importance, diverged = _evaluated(own, guide, shown, samples, seed)
            except PyrovaeError as cause:
                raise type(cause)(f"guide {name!r}: {cause}") from cause
        rows.append(GuideRow(name, elbo, error, importance, seconds, numbers, guide, own, diverged))
        notes.update(dict.fromkeys(said))
        of_model |= any(key.startswith("model.") for key in learned)
    if of_model:
        notes["The model's own parameters were fitted with each guide: an ELBO tells of both together."] = None
    else:  # all rows have the same evidence
        rows = _compared_with_evidence(rows)
    for row in rows:
        if row.diverged:
            notes[f"The fit of {row.name!r} diverged: {row.diverged}. Take a smaller lr."] = None
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
        raise NonFiniteError(f"the loss became {loss} within {steps} steps at lr={lr}")


def _diverged(fitting: Callable[[], None], learned: Mapping[str, Tensor]) -> str:
    """Fits, and says how the fit shows that it diverged; nothing where it does not."""
    try:
        fitting()
    except (NonFiniteError, torch.linalg.LinAlgError) as cause:
        return str(cause).splitlines()[0].rstrip(".")
    broken = [name for name, value in learned.items() if not value.isfinite().all()]
    return f"parameter {broken[0]!r} is not finite" if broken else ""


def _evaluated(
    model: Program, guide: Any, args: tuple[Any, ...], samples: int, seed: int
) -> tuple[tuple[str, ...], float, float, PSIS, str]:
    """Notes, ELBO with its standard error, the importance diagnostics, and how they show that the fit diverged."""
    with asking(model, guide, seed=seed):
        fixed = point_masses(guide, *args)
        if fixed:
            none, never = torch.tensor(0.0), torch.tensor(math.inf)
            note = f"A guide is a point mass at {', '.join(map(repr, fixed))}: its KL to the posterior is infinite."
            return (note,), -math.inf, 0.0, PSIS(never, none, -never, none, samples, 0, (note,)), ""
        notes, latent_dim = weights_notes(model, guide, args, {}, samples)
        log_w, rounding = draw_log_weights(model, guide, args, {}, samples)
    if not (log_w < math.inf).all():
        return (), math.nan, math.nan, _unknown(samples), "some of its log-weights are NaN or +∞"
    draws = log_w.flatten(1).mean(1) if log_w.dim() > 1 else log_w
    elbo, error = float(draws.mean()), float(draws.std()) / samples**0.5
    coarse = f"its log-weights are right to {rounding:.0e} nats only, the ELBO {elbo:.1e}" if rounding > _COARSE else ""
    return notes, elbo, error, smoothed(log_w, rounding, latent_dim, notes), coarse


def _unknown(samples: int) -> PSIS:
    """The diagnostics of a guide that cannot be evaluated."""
    nothing = torch.tensor(math.nan)
    return PSIS(torch.tensor(math.inf), torch.tensor(0.0), nothing, nothing, samples, 0)


def _compared_with_evidence(rows: list[GuideRow]) -> list[GuideRow]:
    """Marks the rows that lie above the evidence, as importance sampling with the best of the other guides finds it.

    A guide with a reliable k̂ is never marked: where two of them differ, the lower one missed a mode.
    """
    sound = [row for row in rows if not row.diverged and bool(row.importance.reliable.all())]
    if not sound:
        return rows
    errors = [mean_error(row.importance.standard_error) for row in sound]
    error, best = min(zip(errors, sound, strict=True), key=lambda pair: pair[0])
    evidence = float(best.importance.log_evidence.mean())

    def judged(row: GuideRow) -> GuideRow:
        if row.diverged or row in sound:
            return row
        lucky = float(row.importance.log_evidence.mean()) - _LUCK - _ERRORS * error
        if max(row.elbo - _ERRORS * math.hypot(row.elbo_error, error), lucky) <= evidence:
            return row
        said = f"its ELBO {row.elbo:.1f} and log-evidence estimate {float(row.importance.log_evidence.mean()):.1f}"
        return replace(row, diverged=f"{said} lie above the log-evidence {evidence:.1f} that {best.name!r} gives")

    return [judged(row) for row in rows]


def _width(text: str) -> int:
    """Columns that a text takes: a combining circumflex has none of its own."""
    return sum(not unicodedata.combining(letter) for letter in text)
