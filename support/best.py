"""Accuracy on the way: development questions every few steps, and which checkpoint is kept by them.

The development questions are held out of the training split. The policy is chosen on them; the test split is for before and after.
"""

import shutil
import time
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import TrainerCallback

from support.divergence import DivergenceCheck
from support.evaluation import best_evaluation, measure
from support.resuming import checkpoints, step_of
from support.settings import Recipe
from support.step_report import Report
from support.stopping import Saving


def hold_out(train: Dataset, recipe: Recipe) -> tuple[Dataset, Dataset]:
    """The questions to train on and those to develop on: `dev_samples`, but at most a tenth, always the same ones."""
    dev = min(recipe.dev_samples, len(train) // 10)
    if not dev:
        return train, train.select([])
    parts = train.train_test_split(test_size=dev, seed=0)
    return parts["train"], parts["test"]


class Development(TrainerCallback):
    """Answers the development questions before the first step, every `eval_steps` and after the last.

    Each time but the first there is a checkpoint, and it is the adapter in it that answers. Then the oldest checkpoints go.
    """

    def __init__(
        self,
        recipe: Recipe,
        trainer,
        tokenizer,
        questions: Dataset,
        report: Report,
        saving: Saving,
        divergence: DivergenceCheck,
    ):
        self.recipe, self.trainer, self.tokenizer, self.questions = recipe, trainer, tokenizer, questions
        self.report, self.saving, self.divergence = report, saving, divergence

    def due(self, step: int) -> bool:
        """Whether the questions are answered after `step`, and have not been."""
        if not len(self.questions) or any(line["step"] == step for line in self.report.development):
            return False
        return step % self.recipe.eval_steps == 0 or step == self.recipe.max_steps

    def evaluate(self, step: int) -> None:
        adapter = self.saving.out / f"checkpoint-{step}" if step else None
        start = time.perf_counter()
        figures, _ = measure(
            self.trainer.model,
            self.tokenizer,
            self.questions,
            self.recipe.max_completion_length,
            adapter,
            rules=self.report.rules,
        )
        self.report.write_development(step, figures, time.perf_counter() - start)

    def on_step_end(self, args, state, control, **kwargs):
        if self.due(state.global_step):
            control.should_save = True

    def evaluate_if_due(self, state, control) -> None:
        if self.due(state.global_step) and not self.saving.stop():
            self.evaluate(state.global_step)
        control.should_training_stop |= self.saving.stop()  # a signal may have come meanwhile

    def on_train_begin(self, args, state, control, **kwargs):
        self.evaluate_if_due(state, control)  # what the process before did not come to, before it was killed

    def on_save(self, args, state, control, **kwargs):
        self.evaluate_if_due(state, control)
        if PartialState().is_main_process:
            # the newest, the best and, should the policy diverge, the last good one stay
            newest, *older = checkpoints(self.saving.out)
            order = dict.fromkeys(filter(None, [newest, self.best(), self.divergence.good(), *older]))
            for old in list(order)[self.recipe.save_total_limit :]:
                shutil.rmtree(old, ignore_errors=True)

    def best(self) -> Path | None:
        """The checkpoint of the best policy; None where there is none yet, or it has been lost."""
        line = best_evaluation(self.report.development)
        return next((path for path in checkpoints(self.saving.out) if line and step_of(path) == line["step"]), None)


def keep_adapter(checkpoint: Path, tokenizer, out: Path) -> None:
    """Copies the LoRA in `checkpoint` to adapter/ in `out`, with the tokenizer: in one piece, whoever kills the process."""
    if PartialState().is_main_process:
        partial = out / "adapter.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for path in checkpoint.glob("adapter_*"):
            shutil.copy2(path, partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(out / "adapter", ignore_errors=True)
        partial.rename(out / "adapter")
    PartialState().wait_for_everyone()
