"""train_grpo.py: its settings, its trainer, and the messages for what a user can get wrong.

The runs themselves are in test_runs.py.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from data import load_questions
from rewards import REWARD_FUNCS, correctness_reward_func
from support.errors import UserError
from support.settings import Recipe, load_recipe, parse_recipe
from support.step_report import recording
from support.trainer import Trainer
from train_grpo import attach_lora, training_arguments, training_questions

# --- settings ------------------------------------------------------------------------------------


def test_the_defaults_are_the_t4_recipe_spelled_out():
    spelled_out = yaml.safe_load(Path("recipes/t4.yaml").read_text(encoding="utf-8"))
    # a file of rewards may bring a prompt of its own, which one in the recipe would win over
    assert list(spelled_out) == [f.name for f in dataclasses.fields(Recipe) if f.name != "system_prompt"]
    assert load_recipe("recipes/t4.yaml") == Recipe() == load_recipe()


@pytest.mark.parametrize("path", sorted(Path("recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_a_recipe(path):
    assert isinstance(load_recipe(path), Recipe)


def test_the_article_recipe_has_the_articles_numbers():
    article = load_recipe("recipes/article.yaml")
    assert (article.learning_rate, article.adam_beta1, article.adam_beta2, article.weight_decay) == (
        5e-6,
        0.9,
        0.99,
        0.1,
    )
    assert (article.warmup_ratio, article.lr_scheduler, article.optim) == (0.1, "cosine", "paged_adamw_8bit")
    assert (article.num_generations, article.max_completion_length, article.prompts_per_step) == (6, 200, 1)
    assert (article.max_steps, article.max_grad_norm, article.seed) == (250, 0.1, 3407)
    assert (article.lora_rank, article.lora_alpha) == (32, 32)
    assert article.max_prompt_length + article.max_completion_length == 1024
    assert article.gpu_memory_utilization == 0.6


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1e-5\nmax_steps: 7\nuse_vllm: false\n")  # YAML reads 1e-5 as a string
    for argv in (["--config", str(path), "--max_steps", "9"], ["--max_steps=9", f"--config={path}"]):
        assert parse_recipe(argv) == Recipe(learning_rate=1e-5, max_steps=9, use_vllm=False)


def test_a_written_recipe_reads_back_the_same(tmp_path):
    recipe = parse_recipe(["--learning_rate", "3e-6", "--dataset", "我的/问题.jsonl", "--no_use_vllm"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe), allow_unicode=True))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


BAD_FLAGS = [
    (["--max_stepz", "5"], "unknown setting --max_stepz; the nearest is --max_steps."),
    (["--config", "recipes/tiny.yaml", "--config=recipes/t4.yaml"], "--config is given more than once: give one file"),
    (["--max_step", "5"], "the nearest is --max_steps."),  # no silent abbreviation
    (["--lr", "5"], "unknown setting --lr; the nearest is --"),
    (["stray"], "stray is neither"),
    (["--max_steps", "many"], "invalid int value: 'many'"),
    (["--max_steps"], "expected one argument"),
    (["--output_dir", ""], "--output_dir is empty: give it a value."),
    (["--dtype", "fp8"], "choose from"),
    (["--loss_type", "ppo"], "choose from"),
    (["--config", "nowhere.yaml"], "cannot read the recipe nowhere.yaml: No such file or directory."),
    (
        ["--config", "tiny.yaml"],
        "cannot read the recipe tiny.yaml: No such file or directory; there is recipes/tiny.yaml.",
    ),
    (["--config", "/nowhere/tiny.yaml"], "cannot read the recipe /nowhere/tiny.yaml: No such file or directory."),
    (["--config", 300 * "x"], "File name too long."),
    (["--max_steps", "0"], "--max_steps 0 is too small: give 1 or more."),
    (["--save_total_limit", "1"], "--save_total_limit 1 is too small: give 2 or more."),
    (["--num_generations", "1"], "--num_generations 1 is too small: give 2 or more."),
    (["--max_completion_length", "-5"], "--max_completion_length -5 is too small"),
    (["--learning_rate", "0"], "--learning_rate 0.0 must be above 0."),
    (["--learning_rate", "nan"], "--learning_rate nan must be above 0."),
    (["--temperature", "-1"], "--temperature -1.0 must be above 0."),
    (["--gpu_memory_utilization", "60"], "must lie between 0 and 1"),
    (["--warmup_ratio", "3"], "must lie between 0 and 1"),
    (["--seed", "-1"], "--seed -1 is too small"),
    (["--seed", str(2**32)], "--seed 4294967296 is too large: give less than 4294967296."),
    (
        ["--report_to", "nonsense"],
        "invalid choice: 'nonsense' (choose from",
    ),
    (["--lr_scheduler", "cosine_with_min_lr"], "invalid choice: 'cosine_with_min_lr'"),
    (["--config"], "not a YAML file"),
    (["--micro_batch_size", "7"], "48 completions do not divide into micro-batches of 7: give --micro_batch_size 6."),
]


@pytest.mark.parametrize("argv, words", BAD_FLAGS, ids=[" ".join(argv) for argv, _ in BAD_FLAGS])
def test_bad_flags(argv, words):
    with pytest.raises(UserError) as error:
        parse_recipe(argv)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


BAD_FILES = [
    ("max_stepz: 5", "the nearest is --max_steps."),
    ("max_steps: 2.5", "max_steps is 2.5: give a value of type int."),
    ("max_steps: true", "max_steps is True: give a value of type int."),
    ("max_steps: many", "invalid int value: 'many'"),
    ("use_vllm: 2", "use_vllm is 2: give a value of type bool."),
    ("loss_type: ppo", "loss_type is 'ppo': choose from grpo"),
    ("dtype: fp8", "dtype is 'fp8': choose from auto"),
    ("- max_steps", "not a YAML file of"),
    ("max_steps: [", "not a YAML file of"),
    ("", "not a YAML file of"),
]


@pytest.mark.parametrize("text, words", BAD_FILES, ids=[text for text, _ in BAD_FILES])
def test_bad_files(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit) as end:
        parse_recipe(["--help"])
    assert end.value.code in (0, None)
    text = "".join(capsys.readouterr().out.split())  # without the line breaks, wherever they fall
    for f in dataclasses.fields(Recipe):
        reason = f.metadata["help"]
        assert f"--{f.name}" in text and "".join(reason.split()) in text
        assert len(reason.split()) >= 2


# --- rewards on their way to TRL -----------------------------------------------------------------


def test_a_recorded_reward_is_the_reward():
    batch = {}
    wrapped = recording(correctness_reward_func, batch)
    completions = [[{"role": "assistant", "content": f"<answer>{n}</answer>"}] for n in (2, 3)]
    prompts = [[{"role": "user", "content": "1+1"}]] * 2
    assert wrapped(prompts=prompts, completions=completions, answer=["2", "2"], trainer_state=None) == [2.0, 0.0]
    assert wrapped.__name__ == "correctness_reward_func"  # TRL logs it under this name
    assert batch["correctness_reward_func"] == [2.0, 0.0] and batch["answers"] == ["2", "2"]


@pytest.mark.parametrize("name, value", [("optim", "adam9"), ("lr_scheduler", "wave")])
def test_a_name_that_transformers_does_not_know(name, value):
    with pytest.raises(UserError, match=value):
        training_arguments(dataclasses.replace(load_recipe("recipes/tiny.yaml"), **{name: value}))


def test_a_setting_that_the_library_changes_is_refused(monkeypatch):
    """unsloth drops arguments that it does not know with no more than a printed line."""

    class Forgetful(GRPOConfig):
        def __post_init__(self):
            super().__post_init__()
            self.beta = 0.04

    monkeypatch.setattr("train_grpo.GRPOConfig", Forgetful)
    with pytest.raises(UserError, match="beta.*0.04"):
        training_arguments(load_recipe("recipes/tiny.yaml"))


def test_trl_has_no_other_limit_for_prompts():
    """TRL 0.24 has one, 512 by default, and vLLM refuses it where prompt and answer together have fewer tokens."""
    recipe = load_recipe("recipes/tiny.yaml")
    arguments = training_arguments(recipe)
    assert getattr(arguments, "max_prompt_length", recipe.max_prompt_length) == recipe.max_prompt_length


def test_trl_knows_every_argument():
    """The run compares the values; that the names exist in TRL 1.15 too was checked when they were chosen."""
    source = Path("train_grpo.py").read_text(encoding="utf-8")
    block = source[source.index("    arguments = {") : source.index("config = GRPOConfig(")]
    names = {line.split('"')[1] for line in block.splitlines() if line.startswith('        "')}
    assert len(names) > 25
    assert names <= {f.name for f in dataclasses.fields(GRPOConfig)}


# --- the trainer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss_type, beta, rows",
    [("dapo", 0.0, 4), ("dapo", 0.0, 2), ("grpo", 0.0, 4), ("dr_grpo", 0.0, 4), ("dapo", 0.04, 4)],
)
def test_less_padding_and_skipped_answers_leave_the_gradient_as_it_is(loss_type, beta, rows, tmp_path):
    """rows: of a micro-batch; four are a group, which then stays together."""
    changes = {"prompts_per_step": 8, "num_generations": 4, "micro_batch_size": rows, "max_steps": 1}
    changes |= {"temperature": 0.3, "loss_type": loss_type, "beta": beta, "output_dir": str(tmp_path)}
    recipe = dataclasses.replace(load_recipe("recipes/tiny.yaml"), **changes)
    tokenizer = AutoTokenizer.from_pretrained("tiny")
    questions = load_questions("tiny/questions", "train", tokenizer, recipe.max_prompt_length, recipe.system_prompt)

    def gradient(trainer_class):
        trained = []

        class Counting(trainer_class):
            def _compute_loss(self, model, inputs):
                trained.append({k: inputs[k] for k in ("advantages", "prompt_ids", "prompt_mask", "completion_mask")})
                return super()._compute_loss(model, inputs)

        class Keep(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
                self.gradient = torch.cat([w.grad.flatten() for w in model.parameters() if w.requires_grad])

        keep = Keep()
        trainer = Counting(
            model=attach_lora(AutoModelForCausalLM.from_pretrained("tiny"), recipe),
            reward_funcs=REWARD_FUNCS,
            args=training_arguments(recipe),
            train_dataset=training_questions(questions, recipe),
            processing_class=tokenizer,
            callbacks=[keep],
        )
        trainer.train()
        return keep.gradient, trained

    expected, everything = gradient(GRPOTrainer)
    found, some = gradient(Trainer)
    assert expected.abs().max() > 0
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())
    zero = sum(int((batch["advantages"] == 0).sum()) for batch in everything)
    assert zero >= 4  # there is something to skip, with this seed
    assert len(everything) == 32 // rows
    assert len(some) == 32 // rows - (zero // rows if beta == 0 else 0)
    if beta == 0 and rows == 4:
        assert all((batch["prompt_ids"] == batch["prompt_ids"][0]).all() for batch in some)

    def nonzero(batches):  # advantage, tokens of the prompt and of the answer
        columns = [
            torch.stack([b["advantages"], b["prompt_mask"].sum(1), b["completion_mask"].sum(1)], dim=1) for b in batches
        ]
        return sorted(row for row in torch.cat(columns).tolist() if row[0])

    def padding(batches):
        return sum(int((batch[mask] == 0).sum()) for batch in batches for mask in ("prompt_mask", "completion_mask"))

    assert nonzero(some) == nonzero(everything)
    assert padding(some) < padding(everything) / 2 if beta == 0 else padding(some) == padding(everything)
