"""How a run ends before its time: on Ctrl-C, SIGTERM, a closed terminal or an error it leaves a checkpoint, and says how to go on."""

import contextlib
import shlex
import signal
import sys
import tempfile
from pathlib import Path

from transformers import TrainerCallback
from trl import GRPOTrainer

from support import screen
from support.divergence import diverged
from support.errors import UserError
from support.memory import is_out_of_memory, memory_advice
from support.resuming import (
    check_present,
    checkpoints,
    command,
    flaw,
    mark_complete,
    write_json,
    write_json_lines,
    write_recipe,
)
from support.rules import RewardsError
from support.screen import note, say
from support.settings import Recipe
from support.step_report import Report


class Saving(TrainerCallback):
    """Marks checkpoints as complete and, as a context manager, leaves one on signals and errors.

    In training a signal finishes the step. At any other time, and a second time, it does not wait.
    """

    def __init__(self, recipe: Recipe, trainer: GRPOTrainer, report: Report):
        self.recipe, self.trainer, self.report = recipe, trainer, report
        self.out = Path(recipe.output_dir)
        self.stop_signal, self.in_training = None, False

    def __enter__(self):
        stops = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            stops.append(signal.SIGHUP)  # its terminal has been closed
        self.handlers = {signum: signal.signal(signum, self.on_signal) for signum in stops}
        return self

    def __exit__(self, kind, error, trace):
        try:
            # another UserError: the policy has diverged, and is not worth keeping
            if isinstance(error, RewardsError) or isinstance(error, Exception) and not isinstance(error, UserError):
                self.save_after_error(error)
        finally:
            for signum, handler in self.handlers.items():
                signal.signal(signum, handler)

    def on_signal(self, signum, frame):
        waits = self.in_training and not self.stop_signal
        if waits:
            self.stop_signal = signum
            words = "finishing this step, then saving a checkpoint"
        else:
            newest = next((path for path in checkpoints(self.out) if not flaw(path)), None)
            if self.report.begun:
                how = command(self.recipe, "--resume", *([] if newest else ["auto"]))
            else:  # nothing has changed yet
                how = shlex.join([sys.executable, *sys.argv])
            words = f"the newest checkpoint is {newest}. Go on with: {how}"
        with contextlib.suppress(OSError):  # of `| tee`, which Ctrl-C ends too, and of a terminal that is gone
            say(f"{signal.Signals(signum).name}: {words}")
        if not waits:
            sys.exit(128 + signum)

    def on_train_begin(self, args, state, control, **kwargs):
        self.in_training = True

    def on_train_end(self, args, state, control, **kwargs):
        self.in_training = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop_signal:
            control.should_save = control.should_training_stop = True

    on_log = on_step_end  # a signal may come between the two

    def on_save(self, args, state, control, **kwargs):
        self.mark_complete(state.global_step)

    def mark_complete(self, step: int, mend: bool = False) -> None:
        rules = self.report.rules
        mark_complete(self.out / f"checkpoint-{step}", self.recipe, self.report.used(step), rules, mend)

    def leave_if_stopped(self) -> None:
        """Ends the script where a signal has ended the training."""
        if self.stop_signal:
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
            if isinstance(error, ImportError):  # of an optimiser that needs a package of its own
                raise UserError(" ".join(str(error).split())) from error
            return

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
