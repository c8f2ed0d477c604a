"""How a run ends before its time: on Ctrl-C, SIGTERM, a closed terminal or an error it leaves a checkpoint, and says how to go on."""

import contextlib
import os
import shlex
import signal
import sys
import tempfile
import threading
from pathlib import Path

from accelerate.utils import gather_object
from transformers import TrainerCallback
from trl import GRPOTrainer

from support import screen
from support.divergence import diverged
from support.errors import UserError
from support.memory import is_out_of_memory, memory_advice
from support.resuming import (
    allow_mending,
    check_present,
    checkpoints,
    command,
    flaw,
    interpreter,
    mark_complete,
    write_json,
    write_json_lines,
    write_recipe,
)
from support.rules import RewardsError
from support.screen import note, say
from support.settings import Recipe
from support.step_report import Report

PATIENCE = 20  # seconds: torchrun gives a process 30 between the signal and the end


class Saving(TrainerCallback):
    """Marks checkpoints as complete and, as a context manager, leaves one on signals and errors.

    In training a signal finishes the step. At any other time, and a second time, it does not wait. Several processes
    agree on what a signal has told any of them, and after an error save nothing: to save takes all of them.
    """

    def __init__(self, recipe: Recipe, trainer: GRPOTrainer, report: Report):
        self.recipe, self.trainer, self.report = recipe, trainer, report
        self.out = Path(recipe.output_dir)
        self.told, self.stop_signal, self.in_training = (
            None,
            None,
            False,
        )  # told: this process; stop_signal: all of them
        self.ended = threading.Event()

    def __enter__(self):
        stops = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            stops.append(signal.SIGHUP)  # its terminal has been closed
        self.handlers = {signum: signal.signal(signum, self.on_signal) for signum in stops}
        if self.recipe.processes > 1:
            self.read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write)
            threading.Thread(target=self.end_in_time, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        try:
            # another UserError: the policy has diverged, and is not worth keeping
            if isinstance(error, RewardsError) or isinstance(error, Exception) and not isinstance(error, UserError):
                self.save_after_error(error)
        finally:
            self.ended.set()
            for signum, handler in self.handlers.items():
                # torchrun tells the others of an error, and this process shall say why it ends
                signal.signal(signum, signal.SIG_IGN if error and self.recipe.processes > 1 else handler)

    def end_in_time(self):
        """In a thread: after a signal ends the process before torchrun does, where it is still waiting for another one.

        That one may have ended. Python's handlers wait for the library that waits for it; a wake-up does not.
        """
        signum = os.read(self.read, 1)[0]
        if not self.ended.wait(PATIENCE) and screen.first_to_end():
            note(f"{signal.Signals(signum).name}: this did not end within {PATIENCE} s; {self.how_to_go_on()}")
        if not self.ended.is_set():
            os._exit(128 + signum)

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return next((path for path in checkpoints(self.out) if not flaw(path)), None)

    def how_to_go_on(self) -> str:
        newest = self.newest()
        if self.report.begun:
            how = command(self.recipe, "--resume", *([] if newest else ["auto"]))
        else:  # nothing has changed yet
            how = shlex.join([*interpreter(), *sys.argv])
        return (
            f"the newest checkpoint is {newest}. Go on with: {how}"
            if newest
            else f"there is no checkpoint yet. Begin anew with: {how}"
        )

    def on_signal(self, signum, frame):
        waits = self.in_training and not self.told
        if waits:
            self.told = signum
            words = "finishing this step, then saving a checkpoint"
            words += ", if all processes still can" * (self.recipe.processes > 1)
        else:
            words = self.how_to_go_on()
        with contextlib.suppress(OSError):  # of `| tee`, which Ctrl-C ends too, and of a terminal that is gone
            say(f"{signal.Signals(signum).name}: {words}")
        if not waits:
            sys.exit(128 + signum)

    def on_train_begin(self, args, state, control, **kwargs):
        self.in_training = True
        state.save_steps = args.save_steps  # transformers would take a resumed run's from its checkpoint

    def on_train_end(self, args, state, control, **kwargs):
        self.in_training = False

    def stop(self) -> bool:
        """Whether a signal has told any of the processes to stop. All of them ask at the same points."""
        self.stop_signal = next(filter(None, gather_object([self.told])), None)
        return bool(self.stop_signal)

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop():
            control.should_save = control.should_training_stop = True

    on_log = on_step_end  # a signal may come between the two

    def on_save(self, args, state, control, **kwargs):
        self.mark_complete(state.global_step)

    def mark_complete(self, step: int, mend: bool = False) -> None:
        rules = self.report.rules
        mark_complete(self.out / f"checkpoint-{step}", self.recipe, self.report.used(step), rules, mend)

    def leave_if_stopped(self) -> None:
        """Ends the script where a signal has ended the training."""
        if self.stop():
            screen.done()
            say(f"stopped after step {self.trainer.state.global_step}; the checkpoint is in {checkpoints(self.out)[0]}")
            say(f"continue with: {command(self.recipe, '--resume')}")
            sys.exit(128 + self.stop_signal)

    def save_after_error(self, error: Exception) -> None:
        """Saves a checkpoint of the last finished step, in a new folder if output_dir can no longer be written to.

        Raises UserError for what the user can put right; prints where the checkpoint is for any other `error`.
        """
        recipe, trainer, out, step = self.recipe, self.trainer, self.out, self.trainer.state.global_step
        if "probability tensor" in str(error):  # the weights are finite, but the next token's chances are not
            raise diverged(recipe, "the policy's probabilities are not finite", step - 1) from error
        if not self.report.begun:
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                raise UserError(f"cannot write to {out}: {error}. No step was finished.") from error
            if isinstance(error, RewardsError) and (newest := self.newest()):
                allow_mending(newest)
                raise UserError(f"{error} Mend it, then: {shlex.join([*interpreter(), *sys.argv])}") from None
            if recipe.processes == 1:
                return
        if recipe.processes > 1:
            go_on = self.how_to_go_on()
            if isinstance(error, RewardsError):
                if newest := self.newest():
                    allow_mending(newest)
                auto = [] if newest else ["auto"]
                again = command(recipe, "--rewards", str(self.report.rules.file), "--resume", *auto)
                raise UserError(f"{error} Mend it, then: {again}") from None
            reason = f"{type(error).__name__}: {error}"
            if is_out_of_memory(error):
                reason = f"out of GPU memory: {memory_advice(recipe, resumed=True).rstrip('.')}"
                go_on = go_on.replace("Go on with: ", "Go on with one of these after: ")
            raise UserError(f"process {screen.RANK} of {recipe.processes} stopped ({reason}); {go_on}") from error

        def save():
            trainer._save_checkpoint(trainer.model, trial=None)
            self.mark_complete(step)

        try:
            check_present(out)  # before saving makes a folder in its place
            if flaw(out / f"checkpoint-{step}"):
                save()
            if isinstance(error, RewardsError):
                self.mark_complete(step, mend=True)
            write_json_lines(out / "metrics.jsonl", self.report.metrics)
            write_json_lines(out / "samples.jsonl", self.report.samples)
        except Exception:  # OSError, and what torch and safetensors make of one
            try:
                self.out = Path(tempfile.mkdtemp(prefix="rescued-", dir=Path(__file__).parents[1]))
                recipe.output_dir = trainer.args.output_dir = str(self.out)
                write_recipe(recipe, self.report.rules)
                screen.log_to(self.out)
                write_json(self.out / "eval.json", self.report.evaluations)
                write_json_lines(self.out / "metrics.jsonl", self.report.metrics)
                write_json_lines(self.out / "samples.jsonl", self.report.samples)
                write_json_lines(self.out / "evaluations.jsonl", self.report.development)
                write_json_lines(self.out / "answers.jsonl", self.report.answers)
                save()
            except Exception as second:
                raise UserError(f"training stopped ({error}), and nothing could be saved: {second}") from error
        saved = f"The checkpoint of step {step} is in {self.out}. Continue with: {command(recipe, '--resume')}"
        if self.out != out:
            raise UserError(f"cannot write to {out} any more ({error}). {saved}") from error
        if isinstance(error, RewardsError):
            again = command(recipe, "--rewards", str(self.report.rules.file), "--resume")
            raise UserError(f"{error} The checkpoint of step {step} is in {self.out}. Mend it, then: {again}") from None
        if is_out_of_memory(error):
            advice = memory_advice(recipe, resumed=True)
            saved = saved.replace("Continue with: ", "Continue with one of these after: ")
            raise UserError(f"out of GPU memory: {advice} {saved}") from error
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise UserError(f"cannot read or write {error.filename or out} ({error}). {saved}") from error
        note(saved)
