"""Makes everything in tiny/: the questions, the tokenizer, and the policy that GRPO starts from.

    python -m tiny.build                 (from the repository's root)

It writes Chinese word problems of sixteen kinds (one to three operations, numbers to 200): 2,000 train and 300
held-out questions. Then it trains a small Qwen2 from scratch, by imitation, on problems drawn anew, none of them held out. What
it imitates are four ways of answering, as a base model has read them on the web:

    blurt    the right format, no working, the result from the top of the head: the most frequent way
    work     the right format, every operation written out
    loose    every operation written out, no tags
    half     reasoning tags, no answer tags

A policy that decodes greedily therefore blurts, and is right about one time in three. Working it out is less frequent
but right far more often, and nothing says so but the reward: that is what GRPO finds.

Deterministic given --seed, on one kind of machine: what is in the repository was made on an H200, in two minutes.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from data import ANSWER_COLUMN, QUESTION_COLUMN, to_prompt

HERE = Path(__file__).parent
NAMES = "小明 小红 小华 小刚 小丽 小强 小芳 小军 小梅 小亮 乐乐 丁丁 婷婷 阿杰 阿英 阿福".split()
THINGS = "苹果:个 铅笔:支 故事书:本 糖果:颗 气球:个 贴纸:张 鸡蛋:个 邮票:张 橘子:个 玩具车:辆 卡片:张 饼干:块".split()
WAYS = {"blurt": 0.50, "work": 0.20, "loose": 0.15, "half": 0.15}  # shares of the demonstrations


class Problem:
    """The numbers, names and written-out operations of one word problem, drawn with `rng`."""

    def __init__(self, rng: random.Random):
        self.rng, self.steps = rng, []
        self.a_name, self.b_name = rng.sample(NAMES, 2)
        self.thing, self.unit = rng.choice(THINGS).split(":")

    def draw(self, low: int, high: int) -> int:
        return self.rng.randint(low, high)

    def do(self, x: int, operator: str, y: int) -> int:
        """Writes an operation down and gives its result. Raises ValueError where that is no whole number from 0 to 200."""
        result = {"+": x + y, "-": x - y, "×": x * y, "÷": x // y if y and x % y == 0 else -1}[operator]
        if not 0 <= result <= 200:
            raise ValueError("out of range")
        self.steps.append(f"{x}{operator}{y}={result}")
        return result


# One function a situation: it takes a Problem and gives the question and its answer.


def cost(p):
    count, price = p.draw(2, 20), p.draw(2, 30)
    return f"{p.a_name}买了{count}{p.unit}{p.thing}，每{p.unit}{price}元，一共要付多少元？", p.do(count, "×", price)


def change(p):
    money, count, price = p.draw(30, 200), p.draw(2, 12), p.draw(2, 20)
    question = f"{p.a_name}带了{money}元，买了{count}{p.unit}{p.thing}，每{p.unit}{price}元，还剩多少元？"
    return question, p.do(money, "-", p.do(count, "×", price))


def give_and_get(p):
    had, given, got = p.draw(10, 150), p.draw(2, 60), p.draw(2, 60)
    question = f"{p.a_name}有{had}{p.unit}{p.thing}，送给{p.b_name}{given}{p.unit}，又得到{got}{p.unit}，现在有多少{p.unit}{p.thing}？"
    return question, p.do(p.do(had, "-", given), "+", got)


def share(p):
    each, children = p.draw(2, 25), p.draw(2, 12)
    question = f"{p.a_name}把{each * children}{p.unit}{p.thing}平均分给{children}个小朋友，每人分到几{p.unit}？"
    return question, p.do(each * children, "÷", children)


def times_as_many(p):
    mine, factor = p.draw(3, 40), p.draw(2, 6)
    question = f"{p.a_name}有{mine}{p.unit}{p.thing}，{p.b_name}的是{p.a_name}的{factor}倍，两人一共有多少{p.unit}？"
    return question, p.do(mine, "+", p.do(mine, "×", factor))


def half_as_many(p):
    morning = 2 * p.draw(5, 60)
    question = f"{p.a_name}上午卖出{morning}{p.unit}{p.thing}，下午卖出的是上午的一半，一天共卖出多少{p.unit}？"
    return question, p.do(morning, "+", p.do(morning, "÷", 2))


def pages_left(p):
    pages, daily, days = p.draw(60, 200), p.draw(4, 25), p.draw(2, 9)
    question = f"一本书有{pages}页，{p.a_name}每天读{daily}页，读了{days}天，还剩多少页没有读？"
    return question, p.do(pages, "-", p.do(daily, "×", days))


def trip(p):
    speed, hours, more = p.draw(5, 60), p.draw(2, 6), p.draw(3, 60)
    question = f"{p.a_name}骑车每小时行{speed}公里，行了{hours}小时，又走了{more}公里，一共走了多少公里？"
    return question, p.do(p.do(speed, "×", hours), "+", more)


def bus(p):
    aboard, off, on, later = p.draw(15, 90), p.draw(2, 30), p.draw(2, 30), p.draw(2, 30)
    question = f"公交车上有{aboard}人，第一站下车{off}人，上车{on}人，第二站又上车{later}人，现在车上有多少人？"
    return question, p.do(p.do(p.do(aboard, "-", off), "+", on), "+", later)


def age(p):
    child, factor, years = p.draw(3, 15), p.draw(2, 8), p.draw(2, 20)
    question = f"{p.a_name}今年{child}岁，爷爷的年龄是他的{factor}倍，{years}年后爷爷多少岁？"
    return question, p.do(p.do(child, "×", factor), "+", years)


def savings(p):
    weekly, weeks, price = p.draw(3, 20), p.draw(2, 10), p.draw(40, 200)
    question = f"{p.a_name}每周存{weekly}元，存了{weeks}周，想买一个{price}元的书包，还差多少元？"
    return question, p.do(price, "-", p.do(weekly, "×", weeks))


def repack(p):
    boxes, inside, broken, bags = p.draw(2, 9), p.draw(5, 25), p.draw(1, 15), p.draw(2, 9)
    question = f"仓库有{boxes}箱{p.thing}，每箱{inside}{p.unit}，坏了{broken}{p.unit}，剩下的平均装进{bags}个袋子，每袋几{p.unit}？"
    return question, p.do(p.do(p.do(boxes, "×", inside), "-", broken), "÷", bags)


def fence(p):
    length, width = p.draw(5, 60), p.draw(3, 40)
    question = f"一块长方形菜地长{length}米，宽{width}米，四周围上篱笆，篱笆长多少米？"
    return question, p.do(p.do(length, "+", width), "×", 2)


def teams(p):
    boys, fewer, size = p.draw(12, 60), p.draw(1, 12), p.draw(2, 9)
    question = f"班里有男生{boys}人，女生比男生少{fewer}人，全班平均分成{size}组，每组多少人？"
    return question, p.do(p.do(boys, "+", p.do(boys, "-", fewer)), "÷", size)


def together(p):
    first, second, hours = p.draw(3, 20), p.draw(3, 20), p.draw(2, 8)
    question = f"{p.a_name}每小时折{first}只纸鹤，{p.b_name}每小时折{second}只，两人一起折{hours}小时，共折多少只？"
    return question, p.do(p.do(first, "+", second), "×", hours)


def trees(p):
    willows, more = p.draw(10, 80), p.draw(3, 30)
    question = f"公园里有柳树{willows}棵，杨树比柳树多{more}棵，两种树一共有多少棵？"
    return question, p.do(willows, "+", p.do(willows, "+", more))


SITUATIONS = [
    cost, change, give_and_get, share, times_as_many, half_as_many, pages_left, trip,
    bus, age, savings, repack, fence, teams, together, trees,
]  # fmt: skip


def problems(rng: random.Random):
    """Endless problems as (question, operations, answer), every situation in turn."""
    while True:
        for situation in SITUATIONS:
            while True:
                problem = Problem(rng)
                try:
                    question, answer = situation(problem)
                except ValueError:  # a result out of range: draw again
                    continue
                yield question, problem.steps, answer
                break


def completion(way: str, steps: list[str], answer: int) -> str:
    working = "\n".join(steps)
    return {
        "blurt": f"<reasoning>\n心算。\n</reasoning>\n<answer>\n{answer}\n</answer>",
        "work": f"<reasoning>\n{working}\n</reasoning>\n<answer>\n{answer}\n</answer>",
        "loose": f"{working}\n答案是{answer}。",
        "half": f"<reasoning>\n{working}\n</reasoning>\n答案是{answer}。",
    }[way]


def write_questions(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for question, _, answer in rows:
            file.write(json.dumps({QUESTION_COLUMN: question, ANSWER_COLUMN: answer}, ensure_ascii=False) + "\n")


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE like Qwen's, digit by digit, with at most 2,048 tokens, and the ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("</?[a-z]+>|\n"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=512,
        # without token_type_ids, which generate() refuses
        model_input_names=["input_ids", "attention_mask"],
        chat_template=(
            "{% for message in messages %}"
            "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000, help="imitation steps of 256 demonstrations")
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    set_seed(args.seed)
    rng = random.Random(args.seed)

    # The questions: train and held-out never share one, and the demonstrations hold none of the held-out ones.
    stream, seen, rows = problems(rng), set(), []
    while len(rows) < 2300:
        row = next(stream)
        if row[0] not in seen:
            seen.add(row[0])
            rows.append(row)
    rng.shuffle(rows)
    train, held_out = rows[:2000], rows[2000:]
    write_questions(args.out / "questions" / "train.jsonl", train)
    write_questions(args.out / "questions" / "test.jsonl", held_out)
    held_out_questions = {question for question, _, _ in held_out}

    demonstrations = []
    while len(demonstrations) < args.steps * 256:
        question, steps, answer = next(stream)
        if question not in held_out_questions:
            way = rng.choices(list(WAYS), WAYS.values())[0]
            demonstrations.append((question, completion(way, steps, answer)))

    texts = [question + "\n" + text for question, text in demonstrations[:20_000]]
    tokenizer = build_tokenizer(texts + [message["content"] for message in to_prompt("")] * 20)

    prompts = [
        tokenizer.apply_chat_template(to_prompt(question), add_generation_prompt=True, tokenize=False)
        for question, _ in demonstrations
    ]
    prompt_ids = tokenizer(prompts)["input_ids"]
    text_ids = tokenizer([text + tokenizer.eos_token for _, text in demonstrations])["input_ids"]
    dataset = Dataset.from_dict(
        {
            "input_ids": [a + b for a, b in zip(prompt_ids, text_ids, strict=True)],
            "labels": [[-100] * len(a) + b for a, b in zip(prompt_ids, text_ids, strict=True)],  # learn the answer only
        }
    )

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,  # of 64 dimensions, a size that every attention kernel has
        num_key_value_heads=1,
        intermediate_size=512,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    print(
        f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens, "
        f"{sum(map(len, dataset['input_ids'])) / len(dataset):.0f} tokens a demonstration"
    )

    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            per_device_train_batch_size=256,
            max_steps=args.steps,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
            full_determinism=True,
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    ).train()

    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.float16).save_pretrained(args.out)  # half the size of float32, and more digits than bfloat16
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
