"""TRL's GRPOTrainer, faster, with the same gradient; resumed, with the settings of its recipe."""

import torch
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from support.schedule import take_rate


class Trainer(GRPOTrainer):
    """TRL's trainer, but it spends no time on answers that teach nothing, and little on padding.

    Where all answers of a group earn the same, their advantages are 0, and so are their gradients, as long as there is
    no KL term. That is most groups while the policy can do little, and again once it can do most. Such answers are moved
    into micro-batches of their own, and those are skipped. The others are put in the order of their lengths, and each
    micro-batch is cut to its longest prompt and answer. The sum of the gradients stays what it was (but with bnpo,
    which takes the mean over the tokens of whatever a micro-batch holds).
    """

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        batches = self._buffered_inputs
        if batches is before or self.beta:
            return inputs  # a later micro-batch of the same step, or all answers count
        lengths = torch.cat([batch["completion_mask"].sum(dim=1) for batch in batches])
        idle = torch.cat([batch["advantages"] for batch in batches]) == 0
        # the longest first, the idle ones last
        order = torch.where(idle, lengths, -lengths - 1).argsort(stable=True).cpu()
        step = {
            name: value if value is None or value.ndim == 0 else torch.cat([batch[name] for batch in batches])[order]
            for name, value in inputs.items()
        }
        self._buffered_inputs = split_tensor_dict(step, len(batches))
        for batch in self._buffered_inputs:
            prompt, completion = (batch[f"{part}_mask"].sum(dim=1).max() for part in ("prompt", "completion"))
            for kind in ("ids", "mask"):
                batch[f"prompt_{kind}"] = batch[f"prompt_{kind}"][:, -prompt:]  # padded on the left
                batch[f"completion_{kind}"] = batch[f"completion_{kind}"][:, :completion]  # on the right
        return self._buffered_inputs[0]

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.beta == 0 and not inputs["advantages"].any():
            return 0 * sum(weights.sum() for weights in model.parameters() if weights.requires_grad)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _inner_training_loop(self, batch_size=None, **kwargs):
        """A resumed run has the micro-batches of its recipe; transformers would take those of the checkpoint."""
        return super()._inner_training_loop(batch_size=self.args.train_batch_size, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint):
        """A resumed run takes its learning rate from the recipe, which may have changed, and not from the checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        take_rate(self.lr_scheduler, self.optimizer, self.args.learning_rate)
