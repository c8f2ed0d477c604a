"""train_grpo.py as one of several processes, which leaves its LoRA after each step in $PROBE, and dies where $DIES says.

torchrun tests/ranks.py …, for test_ranks.py. With $FIXED the answers are made up, the same ones however many processes
there are, and so are their advantages: of rank 0 three groups of four are worth nothing, of the others one. The picture
is drawn with $PICTURE alone.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import screen

screen.start()

import torch
from transformers import TrainerCallback

import train_grpo
from support import step_report
from support.errors import run_script

PROBE, DIES, FIXED = Path(os.environ["PROBE"]), os.environ.get("DIES", ""), "FIXED" in os.environ


class Probe(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if f"{screen.RANK}:{state.global_step + 1}" in DIES.split():
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weights = {name: weights.detach().clone() for name, weights in model.named_parameters() if "lora" in name}
        torch.save(
            {name.removeprefix("module."): w for name, w in weights.items()},
            PROBE / f"{screen.RANK}-{state.global_step}.pt",
        )


class Probed(train_grpo.Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(Probe())

    def place(self, i: int) -> int:
        """Of the answer `i` of this process among those of all."""
        return (
            self.accelerator.process_index * self.args.per_device_train_batch_size * self.args.steps_per_generation + i
        )

    def _generate_single_turn(self, prompts, *args, **kwargs):
        prompt_ids, completion_ids, *rest = super()._generate_single_turn(prompts, *args, **kwargs)
        if FIXED:
            for i in range(len(completion_ids)):
                made = torch.Generator().manual_seed(1000 * self.state.global_step + self.place(i))
                length = int(torch.randint(3, 20, (1,), generator=made))
                completion_ids[i] = torch.randint(5, 50, (length,), generator=made).tolist()
        return prompt_ids, completion_ids, *rest

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if FIXED:
            places = torch.tensor([self.place(i) for i in range(len(inputs))])
            groups = places // self.num_generations
            worth = torch.where(groups < 4, groups == 0, groups != 5)
            batch["advantages"] = torch.where(worth, (places + 1.0).sin(), 0.0)
        return batch

    def compute_loss(self, model, inputs, *args, **kwargs):
        with (PROBE / f"skipped-{screen.RANK}").open("a") as file:
            file.write("x" if inputs.get("skip") else ".")
        return super().compute_loss(model, inputs, *args, **kwargs)


train_grpo.Trainer = Probed
if "PICTURE" not in os.environ:  # it takes a second or two at each checkpoint
    step_report.draw_reward_curve = lambda *_: None
run_script(train_grpo.main)
