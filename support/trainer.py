"""TRL's GRPOTrainer, faster, with the same gradient; it compares vLLM's log-probabilities with its own."""

import contextlib
import sys
from types import SimpleNamespace

import torch
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from support.errors import UserError
from support.schedule import take_rate
from support.training_pass import prompts_shared, share_prompts, trust_pass

# torch does not know the name that accelerate has for the CPU of several processes, to which a checkpoint is loaded
torch.serialization.register_package(5, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None)


class Trainer(GRPOTrainer):
    """TRL's trainer, but it spends no time on answers that teach nothing, and little on padding.

    Where all answers of a group earn the same, their advantages are 0, and so are their gradients, as long as there is
    no KL term. That is most groups while the policy can do little, and again once it can do most. Such answers are moved
    into micro-batches of their own, and those are skipped: as many as every process has, and first, for DDP averages the
    gradients over the processes in the last one. The others are put in the order of their lengths, and each
    micro-batch is cut to its longest prompt and answer. The sum of the gradients stays what it was (but with bnpo,
    which takes the mean over the tokens of whatever a micro-batch holds). Where a micro-batch holds whole groups, all of
    this is done with whole groups, so that unsloth computes a prompt once for its group (support/training_pass.py).

    The log-probabilities that the loss computes anyway are compared with those that vLLM sampled the tokens with, and logged
    under TRL's names for it: `sampling/sampling_logp_difference/mean` and `…/max`, absolute, over the tokens trained on.
    Minus their mean, over all tokens of the step, is logged as `sampling/entropy`: an estimate, in nats a token, of the
    entropy of what is sampled from (E[−log p] is the entropy), which unsloth's loss does not compute.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sampled, self._computed = None, []
        self._shared = contextlib.nullcontext
        if share_prompts():
            self._shared = prompts_shared
            if self.use_vllm:  # whose log-probabilities each step is compared with
                trust_pass(self.model)
        unsloth = vars(sys.modules[GRPOTrainer.__module__])  # its loss, which it writes into a file of its own
        if loss := unsloth.get("UnslothEfficientGRPO"):

            def apply(logps, *rest):  # rest: old, reference and sampled ones, output layer, tokens, mask, …
                self._computed.append((logps.detach(), rest[5]))
                return loss.apply(logps, *rest)

            unsloth["UnslothEfficientGRPO"] = SimpleNamespace(apply=apply)

    def _generate_single_turn(self, *args, **kwargs):
        result = super()._generate_single_turn(*args, **kwargs)
        self._sampled = result[2]  # a list of log-probabilities an answer; None without vLLM
        return result

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self._sampled is not None:  # beside the tokens, wherever these go
            sampled = torch.zeros(batch["completion_mask"].shape, device=batch["completion_mask"].device)
            for row, logps in zip(sampled, self._sampled, strict=True):
                row[: len(logps)] = torch.tensor(logps, device=row.device)
            batch["sampled_logps"] = sampled
            mean = sampled.sum() / sum(map(len, self._sampled))
            self._metrics["train"]["sampling/entropy"].append(-self.accelerator.gather(mean).mean().item())
        # The advantage of answers that all earned the same is the rounding error of their mean over 1e-4: 0.002, not 0
        groups = batch["advantages"].view(-1, self.num_generations)
        same = (groups == groups[:, :1]).all(dim=1)
        groups[same] = 0
        if self.scale_rewards == "batch":  # TRL counts the answers of all questions as one group
            share = self.accelerator.gather(same).float().mean().item()
            self._metrics["train"]["frac_reward_zero_std"][-1] = share
        batch["group"] = (
            torch.arange(len(batch["advantages"]), device=batch["advantages"].device) // self.num_generations
        )
        return batch

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if torch.is_grad_enabled() and found[0] is not None:  # TRL's own loss
            self._computed.append((found[0].detach(), None))
        return found

    def _log_difference(self, inputs) -> None:
        """Logs how far what the loss has just computed for `inputs` is from what vLLM sampled them with."""
        computed, self._computed = self._computed, []
        if not computed or inputs.get("sampled_logps") is None:
            return
        logps, mask = computed[-1]
        kept = inputs["completion_mask"].bool()
        if mask is not None:  # unsloth's, of another width, and without the padding token, with which an answer may end
            kept &= inputs["completion_ids"] != self.processing_class.pad_token_id
        ours = logps[kept if mask is None else mask.bool()].float()
        sampled = inputs["sampled_logps"][:, : kept.shape[1]][kept]
        if ours.shape == sampled.shape and len(ours):
            difference, metrics = (ours - sampled).abs(), self._metrics["train"]
            metrics["sampling/sampling_logp_difference/mean"].append(difference.mean().item())
            largest = metrics["sampling/sampling_logp_difference/max"]
            largest[:] = [max([difference.max().item(), *largest])]  # TRL logs the mean of what is in the list

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        batches = self._buffered_inputs
        if batches is before or self.beta:
            return inputs  # a later micro-batch of the same step, or all answers count
        step = {
            name: value if value is None or value.ndim == 0 else torch.cat([batch[name] for batch in batches])
            for name, value in inputs.items()
        }
        groups = step["group"]
        if len(inputs["group"]) % self.num_generations:
            groups = torch.arange(len(groups), device=groups.device)  # each answer by itself
        ones, nothing = torch.ones_like(groups), (step["advantages"] == 0).long()
        idle = ones.scatter_reduce(0, groups, nothing, "amin").bool()[groups]
        longest = ones.scatter_reduce(0, groups, step["completion_mask"].sum(dim=1), "amax")[groups]
        # the idle ones first, then the longest
        order = torch.where(idle, longest - 2**30, -longest) * len(groups) + groups
        order = order.argsort(stable=True).cpu()
        step = {name: value if value is None or value.ndim == 0 else value[order] for name, value in step.items()}
        self._buffered_inputs = split_tensor_dict(step, len(batches))
        busy = sum(batch["advantages"].any() for batch in self._buffered_inputs)
        skipped = len(batches) - self.accelerator.gather(busy).max().item()
        for place, batch in enumerate(self._buffered_inputs):
            batch["skip"] = place < skipped
            prompt, completion = (batch[f"{part}_mask"].sum(dim=1).max() for part in ("prompt", "completion"))
            for kind in ("ids", "mask"):
                batch[f"prompt_{kind}"] = batch[f"prompt_{kind}"][:, -prompt:]  # padded on the left
                batch[f"completion_{kind}"] = batch[f"completion_{kind}"][:, :completion]  # on the right
        return self._buffered_inputs[0]

    def compute_loss(self, model, inputs, *args, **kwargs):
        if inputs.get("skip"):
            return 0 * sum(weights.sum() for weights in model.parameters() if weights.requires_grad)
        with self._shared(self):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._log_difference(inputs)
        return loss

    def create_optimizer(self, *args, **kwargs):
        """As transformers. Raises UserError where it needs a package, or settings, that are not there."""
        try:
            return super().create_optimizer(*args, **kwargs)
        except (ImportError, ValueError) as error:
            raise UserError(f"--optim {self.args.optim.value}: {' '.join(str(error).split())}") from error

    def create_model_card(self, *args, **kwargs):
        """None: TRL's would name no base model."""

    def _inner_training_loop(self, batch_size=None, **kwargs):
        """A resumed run has the micro-batches of its recipe; transformers would take those of the checkpoint."""
        return super()._inner_training_loop(batch_size=self.args.train_batch_size, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """A resumed run takes its learning rate from the recipe, which may have changed, and not from the checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        take_rate(self.lr_scheduler, self.optimizer, self.args.learning_rate)
