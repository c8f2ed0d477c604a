"""How the learning rate goes over a run: the schedules to choose from, and a resumed run that has another one."""

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")  # transformers' names


def schedule_arguments(recipe) -> dict:
    """What transformers' training arguments need for the schedule of `recipe`."""
    return {
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.lr_scheduler,
        "lr_scheduler_kwargs": {},  # what a schedule of another kind needs: num_decay_steps and the like
        "warmup_steps": round(recipe.warmup_ratio * recipe.max_steps),  # transformers 5 has no warmup_ratio
    }


def take_rate(scheduler, optimizer, learning_rate: float) -> None:
    """Lets a schedule that was loaded from a checkpoint go on with `learning_rate` as its highest."""
    scheduler.base_lrs = [learning_rate] * len(scheduler.base_lrs)
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group["lr"] = learning_rate * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged
