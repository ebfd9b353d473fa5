"""The fit loop: epochs, metrics, early stopping, checkpoints, interruption."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pyrovae.errors import CorruptFileError, NonFiniteError
from pyrovae.modes import evaluating
from pyrovae.objectives import Objective
from pyrovae.progress import Pace, progress_bar
from pyrovae.training import checkpoint
from pyrovae.training.data import Batches
from pyrovae.training.programs import restore_state, untouched
from pyrovae.training.run import Run
from pyrovae.training.step import EagerStep

__all__ = ["Loop"]

_REFRESH_SECONDS = 0.5  # between two looks at the device for the progress bar


class Loop:
    """Runs a step over the epochs and keeps the run folder.

    Args:
        run: what the fit returns; rows are added to its history.
        step: one gradient step.
        train: minibatches to train on.
        validation: minibatches for the bound after each epoch, or ``None``.
        state: every tensor to save, sharing memory with model and guide.
        device: where model, guide and data are.
        epochs: last epoch.
        patience: epochs without improvement after which to stop, or ``None``.
        callbacks: called with the run after each epoch.
        checkpoint_every: epochs between two checkpoints.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        run: Run,
        step: EagerStep,
        train: Batches,
        validation: Batches | None,
        state: dict[str, Tensor],
        device: torch.device,
        epochs: int,
        patience: int | None,
        callbacks: Sequence[Callable[[Run], Any]],
        checkpoint_every: int,
        progress: bool,
    ) -> None:
        self.run = run
        self.step = step
        self.train_batches = train
        self.validation = validation
        self.state = state
        self.device = device
        self.epochs = epochs
        self.patience = patience
        self.callbacks = callbacks
        self.checkpoint_every = checkpoint_every
        self.progress = progress
        self.position = (0, 0)  # epochs finished, minibatches of the next one done
        self.pace = Pace()
        self.weight = 0  # data points of the epoch so far
        self.seconds = 0.0
        self.best: dict[str, Any] = {"bound": -float("inf"), "epoch": 0, "state": None}
        self.stopped = False
        self.epoch_rng: dict[str, Any] | None = None

    def train(self) -> None:
        """Trains to the last epoch, to an early stop, or to an interruption."""
        with _Interruption() as interruption, self._bar() as bar, self._events() as events:
            while self.position[0] < self.epochs and not self.stopped:
                self._epoch(bar, interruption)
                if interruption.signal is not None:
                    self._save()
                    break
                row = self._finish_epoch()
                bar.set_postfix_str(_say(row))
                if events is not None:
                    for key, value in row.items():
                        if key not in ("epoch", "step"):
                            events.add_scalar(key, value, row["epoch"])
                results = [callback(self.run) for callback in self.callbacks]
                self.stopped = self.stopped or any(result is True for result in results)
                last = self.stopped or self.position[0] == self.epochs
                if last or self.position[0] % self.checkpoint_every == 0:
                    self._save()
        if self.patience is not None and self.best["state"] is not None:
            restore_state(self.state, self.best["state"], "the best epoch")
            self.run.best_epoch = self.best["epoch"]
        interruption.raise_again(self.run.folder)

    def _epoch(self, bar: Any, interruption: _Interruption) -> None:
        finished, done = self.position
        self.step.begin_epoch()
        self.step.mark()
        if done == 0:
            self.step.sums.zero_()
            self.weight, self.seconds = 0, 0.0
            self.epoch_rng = self._rng_state()
            minibatches: Iterator[tuple[Tensor, ...]] | None = self.train_batches.epoch(finished)
        else:  # a resumed epoch: what the loader drew up to here must be drawn as it was
            here = self._rng_state()
            self._set_rng_state(self.epoch_rng or here)
            minibatches = self.train_batches.epoch(finished, done)
            self._set_rng_state(here)
        start, shown, before = time.perf_counter(), time.perf_counter(), self.seconds
        while done < self.train_batches.steps and interruption.signal is None:
            try:
                began = time.perf_counter()
                taken = self.step.many(self.train_batches, finished, done, self.pace.steps)
                if taken:
                    self.pace.took(taken, time.perf_counter() - began)
                    points, minibatches = taken * self.train_batches.batch_size, None
                else:
                    minibatches = minibatches or self.train_batches.epoch(finished, done)
                    batch = next(minibatches)
                    self.step(batch)
                    taken, points = 1, len(batch[0])
            except NonFiniteError as error:
                raise NonFiniteError(self._stopped_at(error)) from None
            now = time.perf_counter()
            done += taken
            self.weight += points
            bar.update(taken)
            self.seconds = before + now - start
            self.position = (finished, done)
            if now - shown > _REFRESH_SECONDS:
                shown = now
                self._require_finite()
                bar.set_postfix_str(f"bound {self._means()['bound']:.3f} nats per data point", refresh=False)
        self._require_finite()

    def _require_finite(self) -> None:
        """Raises the error of an update that the device skipped, at the minibatch that was bad."""
        skipped = self.step.skipped()
        if not skipped:
            self.step.mark()
            return
        self.step.rewind(skipped)
        finished, done = self.position
        self.position = (finished, max(0, done - skipped))
        with untouched(self.run.model, self.run.guide):
            error = self.step.error_of(next(iter(self.train_batches.epoch(*self.position))))
        raise NonFiniteError(self._stopped_at(error))

    def _stopped_at(self, error: NonFiniteError) -> str:
        finished, done = self.position
        kept = ""
        if self.run.folder is not None:
            self._save()
            kept = f", also in {self.run.folder}"
        return (
            f"{error} (epoch {finished + 1}, minibatch {done + 1} of {self.train_batches.steps}). The parameters are"
            f" the last good ones{kept}. Try a smaller lr, clip_norm=…, or a look at this minibatch's data."
        )

    def _means(self) -> dict[str, float]:
        """Mean over the epoch so far of all that a step measures, in nats per data point."""
        values = (self.step.sums / self.weight).tolist()
        return dict(zip(self.step.names, values, strict=True))

    @torch.no_grad()
    def _finish_epoch(self) -> dict[str, Any]:
        finished, done = self.position
        means = self._means()
        row: dict[str, Any] = {"epoch": finished + 1, "step": (finished + 1) * self.train_batches.steps}
        row["bound"] = means.pop("bound")
        kl = {name: value for name, value in means.items() if name.startswith("kl/")}
        if "log_likelihood" in means:
            row |= {"log_likelihood": means["log_likelihood"], "kl": sum(kl.values()), **kl}
        if self.validation is not None:
            row["validation_bound"] = self._validate()
        row["lr"] = float(self.step.optimizer.param_groups[0]["lr"])
        row["seconds"] = round(self.seconds, 3)
        row["steps_per_second"] = round(done / self.seconds, 1)
        self.run.history.append(row)
        self.position = (finished + 1, 0)
        if self.patience is not None and row["validation_bound"] > self.best["bound"]:
            copied = {name: value.detach().clone() for name, value in self.state.items()}
            self.best = {"bound": row["validation_bound"], "epoch": row["epoch"], "state": copied}
        self.stopped = self._out_of_patience()
        return row

    def _out_of_patience(self) -> bool:
        return self.patience is not None and self.position[0] - self.best["epoch"] >= self.patience

    def _validate(self) -> float:
        """Mean bound over the validation data, at the same draws after every epoch; leaves the random state alone."""
        assert self.validation is not None
        total, points = torch.zeros((), dtype=torch.float64, device=self.device), 0
        with evaluating(self.run.model, self.run.guide, seed=0):
            for batch in self.validation.epoch(0):
                total += self.step.evaluate(batch).double() * len(batch[0])
                points += len(batch[0])
        return float(total) / points

    # -----------------------------------------------------------------------------------------------------
    # Saving and restoring

    def _save(self) -> None:
        folder = self.run.folder
        if folder is None:
            return
        objective = self.step.objective
        checkpoint.write_training(
            folder / checkpoint.TRAINING,
            {
                "position": self.position,
                "state": {name: value.detach().clone() for name, value in self.state.items()},
                "optimizer": self.step.optimizer.state_dict(),
                "schedule": self.step.schedule.state_dict(),
                "objective": objective.state_dict() if isinstance(objective, Objective) else {},
                "rng": self._rng_state(),
                "epoch_rng": self.epoch_rng,
                "compiled": self.step.compiled_parts(),
                "sums": self.step.sums.clone(),
                "weight": self.weight,
                "seconds": self.seconds,
                "best": self.best,
                "history": self.run.history,
            },
        )
        checkpoint.write_tensors(folder / checkpoint.MODEL, self.state)
        if self.best["state"] is not None:
            checkpoint.write_tensors(folder / checkpoint.BEST, self.best["state"])
        checkpoint.write_history(folder / checkpoint.METRICS, self.run.history)

    def restore(self) -> None:
        """Continues from the run folder's training state, exactly where it was saved."""
        assert self.run.folder is not None
        path = self.run.folder / checkpoint.TRAINING
        if not path.exists() and not (self.run.folder / checkpoint.MODEL).exists():
            return  # the run ended before its first checkpoint: begin again
        saved = checkpoint.read_training(path)
        try:
            restore_state(self.state, saved["state"], f"the run in {self.run.folder}")
            self.step.optimizer.load_state_dict(saved["optimizer"])
            self.step.schedule.load_state_dict(saved["schedule"])
            if isinstance(self.step.objective, Objective):
                self.step.objective.load_state_dict(saved["objective"])
            self.position = tuple(saved["position"])
            self.step.compile_parts(saved["compiled"])
            self.step.sums.copy_(saved["sums"])
            self.weight, self.seconds = saved["weight"], saved["seconds"]
            self.best, self.epoch_rng = saved["best"], saved["epoch_rng"]
            self.run.history[:] = saved["history"]
            self.stopped = self._out_of_patience()
            self._set_rng_state(saved["rng"])
        except KeyError as error:
            raise CorruptFileError(f"{path} lacks {error}; it was not written by this version of pyrovae") from None

    def _rng_state(self) -> dict[str, Any]:
        return checkpoint.rng_state(self.device, self.train_batches.generators)

    def _set_rng_state(self, state: dict[str, Any]) -> None:
        checkpoint.set_rng_state(state, self.device, self.train_batches.generators)

    # -----------------------------------------------------------------------------------------------------
    # What a person sees

    def _bar(self) -> Any:
        steps = self.train_batches.steps
        done = self.position[0] * steps + self.position[1]
        return progress_bar(self.epochs * steps, " steps", self.progress, done)

    @contextlib.contextmanager
    def _events(self) -> Iterator[Any]:
        """TensorBoard's writer, where there is a run folder and the extra is installed."""
        if self.run.folder is None:
            yield None
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            yield None
            return
        with SummaryWriter(str(self.run.folder / "tensorboard"), purge_step=self.position[0] + 1) as writer:
            yield writer


def _say(row: dict[str, Any]) -> str:
    validation = f", validation {row['validation_bound']:.3f}" if "validation_bound" in row else ""
    return f"epoch {row['epoch']}: bound {row['bound']:.3f}{validation} nats per data point"


class _Interruption:
    """Turns the first Ctrl-C or SIGTERM into a flag, so that the loop can save before it stops."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:  # the second time: no patience left
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_again(self, folder: os.PathLike[str] | None) -> None:
        """Ends the program as the signal would have, now that all is saved."""
        if self.signal is None:
            return
        where = f"saved in {folder}; continue with resume=True" if folder else "model and guide hold what was learned"
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(f"fit interrupted; {where}")
        raise SystemExit(128 + self.signal)
