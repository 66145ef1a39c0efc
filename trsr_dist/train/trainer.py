"""The training loop: steps, what is watched, checkpoints, validation, and when to stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from trsr_dist.distributed import gather_objects
from trsr_dist.errors import ModelError
from trsr_dist.log import get_logger
from trsr_dist.shards.steps import Step
from trsr_dist.shards.stream import TrainStream
from trsr_dist.train.checkpoints import TrainerState
from trsr_dist.train.elastic import Saving
from trsr_dist.train.engine import Engine, StepOutcome, check_gradients
from trsr_dist.train.lifecycle import DATA, END, SAVING, UPDATE, Heartbeat, StopReasons
from trsr_dist.train.monitor import Monitor, Progress
from trsr_dist.train.step import StepRunner, learning_rate
from trsr_dist.train.validation import Validator

NAMED_USERS = 10
"""At most this many users of a bad step are named in an error."""

log = get_logger("train")


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """Numbers of the loop, from the run's config."""

    num_steps: int
    learning_rate: float
    warmup_ratio: float
    schedule: str
    save_every_steps: int
    evaluate_every_steps: int
    """0: never."""
    best_metric: str
    early_stopping_patience: int
    """0: never."""
    max_bad_steps: int


@dataclass(frozen=True, slots=True)
class Control:
    """What watches over this rank."""

    reasons: StopReasons
    heartbeat: Heartbeat


@dataclass(frozen=True, slots=True)
class Ending:
    """How a training ended."""

    is_complete: bool
    """False where it was interrupted and is to be run again."""
    reason: str
    """Empty where all steps were made."""


class Trainer:
    """Runs a training to its end, or to a reason to stop.

    Args:
        engine: built and restored.
        steps: from where the state stands.
        runner: of steps.
        settings: of the loop.
        saving: writes the checkpoints.
        validator: ranks the validation users; None: never.
        state: where to go on.
        monitor: shows what happens.
        control: what watches over this rank.
    """

    def __init__(
        self,
        engine: Engine,
        steps: TrainStream,
        runner: StepRunner,
        settings: LoopSettings,
        saving: Saving,
        validator: Validator | None,
        state: TrainerState,
        monitor: Monitor,
        control: Control,
    ) -> None:
        self._engine = engine
        self._steps = steps
        self._runner = runner
        self._settings = settings
        self._saving = saving
        self._validator = validator
        self.state = state
        self._monitor = monitor
        self._control = control
        self._num_bad_steps = 0
        self._saved = state
        self._gradients_checked = False

    def run(self) -> Ending:
        """Train.

        Raises:
            ModelError: too many steps in a row were not finite, or a LoRA layer gets no gradient.
            DataError: a sample is damaged, or too many are.
        """
        try:
            return self._run()
        finally:
            self._saving.close()

    def _run(self) -> Ending:
        steps = iter(self._steps)
        reason = ""
        self._validate(at_start=True)
        while not reason and not self._is_over():
            reason = self._step(steps)
            if self._validator is not None and self._is_due(self._settings.evaluate_every_steps):
                self.state = replace(self.state, awaits_validation=True)
            if self._is_due(self._settings.save_every_steps):
                self._save()
            self._validate()
        self._save()
        self._control.heartbeat.at(self.state.step, SAVING)
        self._saving.wait()
        self._control.heartbeat.at(self.state.step, END)
        best = {} if self.state.best_value is None else {self._settings.best_metric: self.state.best_value}
        self._monitor.close(self.state.settings or {}, best)
        return self._ending(reason)

    def _ending(self, reason: str) -> Ending:
        if self._awaits_validation:
            return Ending(False, reason or "no time is left for the validation")
        if self._is_over() and self.state.step < self._settings.num_steps:
            return Ending(True, f"no better validation in {self.state.num_bad_evaluations} evaluations")
        return Ending(self._is_over(), reason)

    def _step(self, steps: Iterator[Step]) -> str:
        """One step; returns a reason to stop that some rank has."""
        started = time.perf_counter()
        self._control.heartbeat.at(self.state.step + 1, DATA)
        step = next(steps)
        waited = time.perf_counter() - started
        own, bad_users = self._runner.backward(step)
        own.wait_seconds = waited
        # The last one that is due before leaving may have to wait for another.
        self._control.reasons.walltime.saw("save", 2 * self._saving.write_seconds)
        reason = "a checkpoint was not written" if self._saving.has_failed else self._control.reasons.reason()
        total = self._runner.reduce(step, own, bool(reason))
        if total.loss and not self._gradients_checked:
            check_gradients(self._engine)
            self._gradients_checked = True
        self._control.heartbeat.at(step.state.step, UPDATE)
        s = self._settings
        rate = learning_rate(self.state.step, s.num_steps, s.learning_rate, s.warmup_ratio, s.schedule)
        outcome = self._engine.step(rate)
        seconds = time.perf_counter() - started
        self._control.reasons.walltime.saw("step", seconds)
        self.state = replace(
            self.state,
            step=step.state.step,
            adam_step=self.state.adam_step + outcome.is_applied,
            skipped_steps=self.state.skipped_steps + (not outcome.is_applied),
            data_errors=self.state.data_errors + round(total.errors),
            stream=step.state.to_dict(),
            seconds=self.state.seconds + seconds,
        )
        made = Progress(self.state.step, step.epoch, rate, outcome.grad_norm, seconds, outcome.is_applied)
        self._monitor.add(made, total)
        self._note_outcome(step, outcome, bad_users)
        if total.errors:
            errors = [error for found in gather_objects(step.errors) for error in found]
            self._steps.check_errors(self.state.data_errors, errors[0])
        return self._all_reasons(reason) if total.stops else ""

    def _all_reasons(self, own: str) -> str:
        """Why the ranks stop: each reason once, with the first rank that has it."""
        reasons = gather_objects(own)
        first = {reason: rank for rank, reason in reversed(list(enumerate(reasons))) if reason}
        return "; ".join(f"{reason} (rank {rank})" for reason, rank in sorted(first.items(), key=lambda pair: pair[1]))

    def _note_outcome(self, step: Step, outcome: StepOutcome, bad_users: tuple[str, ...]) -> None:
        """Count steps that were skipped. Without a bad loss the gradient was: then any user of the step may be why."""
        if outcome.is_applied:
            self._num_bad_steps = 0
            return
        found = [user for users in gather_objects(bad_users) for user in users]
        if not found:
            here = tuple(user for row in step.rows for user in row.users)
            found = [user for users in gather_objects(here) for user in users]
        self._num_bad_steps += 1
        text = f"step {step.state.step}: loss or gradient not finite, skipped; users {found[:NAMED_USERS]}"
        if self._num_bad_steps > self._settings.max_bad_steps:
            raise ModelError(
                f"{text}; {self._num_bad_steps} such steps in a row, train.max_bad_steps allows "
                f"{self._settings.max_bad_steps}: lower train.learning_rate, or look at these users' texts"
            )
        log.info(text)

    def _is_due(self, every: int) -> bool:
        return bool(every) and (self.state.step % every == 0 or self.state.step == self._settings.num_steps)

    def _save(self) -> None:
        if self._saved == self.state:
            return
        started = time.perf_counter()
        self._control.heartbeat.at(self.state.step, SAVING)
        self._saving.save(self.state)
        self._saved = self.state
        self._monitor.saved(self.state.step, time.perf_counter() - started)

    def _validate(self, at_start: bool = False) -> None:
        """Rank the validation users if that is due and there is time for it; else a later start will.

        The step is saved before, since a validation may take long, and after, with its result.
        """
        if not self._awaits_validation or not all(gather_objects(self._control.reasons.allow_validation(at_start))):
            return
        self._save()
        started = time.perf_counter()
        self.state = self.state.validated(self._rank_validation_users())
        self._control.reasons.walltime.saw("validation", time.perf_counter() - started)
        self._save()

    def _rank_validation_users(self) -> float:
        """The value of the metric that names the best step."""
        step, name = self.state.step, self._settings.best_metric
        metrics = self._validator.run(self._engine, lambda phase: self._control.heartbeat.at(step, phase))
        self._monitor.evaluated(step, metrics)
        log.info("step %d  validation of %d users  %s %.4f", step, self._validator.num_users, name, metrics[name])
        return metrics[name]

    @property
    def _awaits_validation(self) -> bool:
        return self._validator is not None and self.state.awaits_validation

    def _is_over(self) -> bool:
        return self.state.is_over(self._settings.num_steps, self._settings.early_stopping_patience)
