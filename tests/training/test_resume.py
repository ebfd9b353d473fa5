"""A fit that was stopped and resumed is the fit that was not, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fit_helpers import (
    BATCH,
    NormedGuide,
    Rows,
    assert_identical,
    assert_same_run,
    binary,
    fit,
    parameters,
    seeded,
    signal_after,
    training_state,
    untimed,
    vae,
)
from torch.utils.data import DataLoader

import pyrovae
from pyrovae.datasets import Split

Arguments = dict[str, Any]


def grey(points: int = 24) -> torch.Tensor:
    return torch.rand(points, 4, generator=seeded(5))


def plain(**settings: Any) -> Arguments:
    model, guide = vae()
    return {"model": model, "guide": guide, "data": binary(), **settings}


def momentum(parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def normed() -> Arguments:
    arguments = plain(validation=binary(16, seed=2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return arguments | {"guide": NormedGuide()}


def warmed_up() -> Arguments:
    return plain(objective=pyrovae.ELBO(beta=pyrovae.LinearWarmup(steps=11), kl="analytic"))


def stepped(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)


# Each makes everything anew: a resumed fit is usually another process.
CASES: dict[str, Callable[[], Arguments]] = {
    "adam": plain,
    "sgd-momentum-factory": lambda: plain(optimizer=momentum),
    "adamw-step-schedule": lambda: plain(optimizer="adamw", schedule=stepped),
    "dynamic-binarization": lambda: plain(data=Split(grey(), None, "dynamic")),
    "dataset": lambda: plain(data=Rows(binary())),
    "dataset-that-draws": lambda: plain(data=Rows(Split(grey(), None, "dynamic"))),
    "dataloader-shuffled": lambda: plain(data=DataLoader(binary(), BATCH, shuffle=True), batch_size=None),
    "dataloader-that-draws": lambda: plain(
        data=DataLoader(Split(grey(), None, "dynamic"), BATCH, shuffle=True), batch_size=None
    ),
    "dataloader-own-generator": lambda: plain(
        data=DataLoader(binary(), BATCH, shuffle=True, generator=seeded(7)), batch_size=None
    ),
    "kl-warmup": warmed_up,
    "batch-norm": normed,
    "early-stopping": lambda: plain(validation=binary(16, seed=2), early_stopping=5),
    "bf16": lambda: plain(precision="bf16"),
}
SCHEDULED = {name: lambda name=name: plain(optimizer="adamw", schedule=name) for name in ("cosine", "linear")}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "resumed", tmp_path / "uninterrupted"


def assert_same_fit(ours: pyrovae.Run, theirs: pyrovae.Run) -> None:
    """The runs and their folders agree: parameters, optimizer state, random state, sums, best epoch, history."""
    assert_same_run(ours, theirs)
    assert ours.folder is not None
    assert theirs.folder is not None
    assert_identical(training_state(ours.folder), training_state(theirs.folder))
    for name in ("model.safetensors", "config.json"):
        assert (ours.folder / name).read_bytes() == (theirs.folder / name).read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_resumed_fit_equals_uninterrupted_fit_exactly(case: str, folders: tuple[Path, Path]) -> None:
    whole = fit(**CASES[case](), epochs=5, run_dir=folders[1])
    first = fit(**CASES[case](), epochs=2, run_dir=folders[0])
    resumed = fit(**CASES[case](), epochs=5, run_dir=folders[0], resume=True)
    assert [row["epoch"] for row in resumed.history] == [1, 2, 3, 4, 5]
    assert untimed(resumed.history[:2]) == untimed(first.history)
    assert_same_fit(resumed, whole)


@pytest.mark.parametrize("steps", [1, 3, 4, 8])
@pytest.mark.parametrize("case", [*CASES, *SCHEDULED])
def test_fit_interrupted_after_any_step_resumes_exactly(case: str, steps: int, folders: tuple[Path, Path]) -> None:
    make = (CASES | SCHEDULED)[case]
    whole = fit(**make(), epochs=4, run_dir=folders[1])
    with signal_after(steps), pytest.raises(KeyboardInterrupt, match="resume=True"):
        fit(**make(), epochs=4, run_dir=folders[0])
    assert training_state(folders[0])["position"] in {(steps // 3, steps % 3), (steps // 3 - 1, 3)}
    resumed = fit(**make(), epochs=4, run_dir=folders[0], resume=True)
    assert_same_fit(resumed, whole)


@pytest.mark.parametrize("case", SCHEDULED)
def test_scheduled_fit_stopped_by_a_callback_resumes_exactly(case: str, folders: tuple[Path, Path]) -> None:
    make = SCHEDULED[case]
    whole = fit(**make(), epochs=5, run_dir=folders[1])
    first = fit(**make(), epochs=5, run_dir=folders[0], callbacks=[lambda run: len(run.history) == 2])
    assert len(first.history) == 2
    assert_same_fit(fit(**make(), epochs=5, run_dir=folders[0], resume=True), whole)


def test_fit_interrupted_twice_resumes_exactly(folders: tuple[Path, Path]) -> None:
    whole = fit(**plain(), epochs=4, run_dir=folders[1])
    for steps, resume in ((2, False), (3, True)):
        with signal_after(steps), pytest.raises(KeyboardInterrupt):
            fit(**plain(), epochs=4, run_dir=folders[0], resume=resume)
    assert_same_fit(fit(**plain(), epochs=4, run_dir=folders[0], resume=True), whole)


def stopping() -> Arguments:
    """A fit whose validation bound soon falls: the data to watch are the opposite of those to learn."""
    return plain(validation=1.0 - binary(16, seed=2), early_stopping=2)


def test_early_stopping_counts_across_a_resume(folders: tuple[Path, Path]) -> None:
    whole = fit(**stopping(), epochs=20, run_dir=folders[1])
    assert whole.best_epoch is not None
    assert len(whole.history) == whole.best_epoch + 2 < 20
    fit(**stopping(), epochs=whole.best_epoch + 1, run_dir=folders[0])
    resumed = fit(**stopping(), epochs=20, run_dir=folders[0], resume=True)
    assert_same_fit(resumed, whole)


def test_resuming_an_early_stopped_fit_trains_no_further(tmp_path: Path) -> None:
    stopped = fit(**stopping(), epochs=20, run_dir=tmp_path)
    again = fit(**stopping(), epochs=20, run_dir=tmp_path, resume=True)
    assert_same_run(again, stopped)


def test_resuming_a_finished_fit_changes_nothing(tmp_path: Path) -> None:
    done = fit(**plain(), epochs=2, run_dir=tmp_path)
    before = training_state(tmp_path)
    again = fit(**plain(), epochs=2, run_dir=tmp_path, resume=True)
    assert_same_run(again, done)
    assert_identical(training_state(tmp_path), before)


def test_resume_in_a_folder_without_a_run_starts_one(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "new"
    assert_same_run(fit(**plain(), run_dir=folder, resume=True), fit(**plain()))
    assert (folder / "model.safetensors").exists()


def test_resume_before_the_first_checkpoint_starts_again(tmp_path: Path) -> None:
    def fail(run: pyrovae.Run) -> None:
        raise RuntimeError("the machine went away")

    with pytest.raises(RuntimeError, match="went away"):
        fit(**plain(), run_dir=tmp_path, callbacks=[fail])
    assert_same_run(fit(**plain(), run_dir=tmp_path, resume=True), fit(**plain()))


def test_fit_resumes_from_the_last_checkpoint_when_it_was_killed_between_two(folders: tuple[Path, Path]) -> None:
    def fail_in_epoch_4(run: pyrovae.Run) -> None:
        if len(run.history) == 4:
            raise RuntimeError("killed")

    whole = fit(**plain(), epochs=5, run_dir=folders[1])
    with pytest.raises(RuntimeError, match="killed"):
        fit(**plain(), epochs=5, run_dir=folders[0], checkpoint_every=3, callbacks=[fail_in_epoch_4])
    assert training_state(folders[0])["position"] == (3, 0)
    assert_same_fit(fit(**plain(), epochs=5, run_dir=folders[0], resume=True), whole)


def test_resume_takes_the_saved_parameters_and_not_those_of_the_new_objects(tmp_path: Path) -> None:
    first = fit(**plain(), run_dir=tmp_path)
    model, guide = vae(seed=99)
    again = fit(model, guide, binary(), run_dir=tmp_path, resume=True)
    assert_identical(parameters(again), parameters(first))
