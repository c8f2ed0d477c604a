"""The whole recipe on a newer card as on a Tesla T4: its dispatch and Triton code (benchmarks/fake_t4.py), its memory.

    python -m benchmarks.t4 --model NF4_MODEL --shape 7B_SHAPE --dataset DATASET --out FOLDER
    python -m benchmarks.t4 --parts kernels

kernels  vLLM's kernels for the LoRA in float16, at the linear layers of the 7B model, against torch's float32 products:
         with vLLM's blocks and with ours (support/decoding.py)
answers  48 held-out questions, greedy, 48 tokens, float16: on the card as it is and as on a T4, without a LoRA and with
         a random one
train    train_grpo.py, the default recipe on --model, for --steps steps
shape    three steps of the default recipe on --shape, the 7B model's shape with random weights, on all answers

Each part runs in processes of its own; one that fails does not stop the others. Prints Markdown tables; --out keeps
the children's JSON files and logs. Seconds are this card's, not a T4's.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VRAM = ["--vram_gib", "14.56"]  # what a T4 leaves of its 16 GB
ANSWERS = TOKENS = 48
LINEARS = {  # of Qwen2.5-7B: width in, widths out of what vLLM multiplies at once
    "q, k, v": (3584, [3584, 512, 512]),
    "o": (3584, [3584]),
    "gate, up": (3584, [18944, 18944]),
    "down": (18944, [3584]),
}
RANKS = (8, 16, 32)
ROWS = {"decode": (1, 8, 48, 64), "prefill": (512, 2048)}
LIMITS = (
    "Not shown by this: bitsandbytes' 4-bit product for sm_75 (a stub in other cards' code), the cutlass attention "
    "that a T4 trains with, and a T4's speed; seconds are this card's."
)


# --- children: each measures in a process of its own, and writes JSON ---------------------------------


def spill_bytes(ptx: str) -> int:
    """What a thread of the kernel stores outside its registers where `ptx` is assembled for a T4, in bytes."""
    import triton

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_75", file.name, "-o", os.devnull]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", said)[1])


def measure_kernels() -> list[dict]:
    """Every combination of op, linear, rank, number of rows and blocks: error, bytes of spill, microseconds."""
    import train_grpo  # noqa: F401  (unsloth comes before vLLM)

    # isort: split
    import torch
    from triton.testing import do_bench_cudagraph
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand_op, lora_shrink_op, utils

    from support.decoding import tune_lora_kernels

    torch.set_float32_matmul_precision("highest")  # of the references
    launched, spills, results = [], {}, []
    for kernel in (lora_shrink_op._lora_shrink_kernel, lora_expand_op._lora_expand_kernel):

        def run(*args, run=kernel.run, **kwargs):
            launched.append(run(*args, **kwargs))
            return launched[-1]

        kernel.run = run

    def random(*shape, dtype=torch.float16):
        return torch.randn(shape, device="cuda").to(dtype)

    def measure(product, reference) -> dict:
        """`product` returns what one call of the kernel gives; `reference` is what it should give."""
        error = ((product().float() - reference).abs().max() / reference.abs().max()).item()
        compiled = launched[-1]
        if compiled.hash not in spills:
            spills[compiled.hash] = spill_bytes(compiled.asm["ptx"])
        torch.cuda.synchronize()  # the graph has a stream of its own
        # in a graph, as vLLM's decoding steps are: the launches' time in Python does not count
        seconds = do_bench_cudagraph(product, return_mode="median") / 1000
        return {"error": error, "spill": spills[compiled.hash], "us": seconds * 1e6}

    for blocks in ("vLLM's", "ours"):
        if blocks == "ours":
            tune_lora_kernels()
        utils.load_lora_op_config.cache_clear()
        utils.get_lora_op_configs.cache_clear()
        for linear, (width, widths) in LINEARS.items():
            for rank in RANKS:
                torch.manual_seed(0)
                a = [random(1, 1, rank, width) / width**0.5 for _ in widths]
                b = [random(1, 1, out, rank) / rank**0.5 for out in widths]
                # vLLM keeps strides by a weight's address, and another weight may get that of a freed one
                utils._LORA_A_PTR_DICT.clear()
                utils._LORA_B_PTR_DICT.clear()
                for rows in (*ROWS["decode"], *ROWS["prefill"]):
                    # as PunicaWrapperGPU.add_lora_linear calls them: one LoRA, for all rows, and float32 in between
                    meta = LoRAKernelMeta.make(1, rows, "cuda")
                    meta.prepare_tensors(torch.zeros(rows, dtype=torch.long, device="cuda"))
                    x, y = random(rows, width), random(rows, sum(widths))
                    hidden = random(len(widths), rows, rank, dtype=torch.float32)
                    buffer, y_in = torch.empty_like(hidden), y.clone()

                    def shrink(x=x, a=a, buffer=buffer, meta=meta, rows=rows):
                        lora_shrink_op.lora_shrink(x, a, buffer, *meta.meta_args(rows), 1.0)
                        return buffer

                    def expand(hidden=hidden, b=b, y=y, meta=meta, rows=rows):
                        args = meta.meta_args(rows)
                        lora_expand_op.lora_expand(hidden, b, y, *args, offset_start=0, add_inputs=True)
                        return y

                    shrunk = torch.stack([x.float() @ weight[0, 0].float().T for weight in a])
                    parts = [h @ weight[0, 0].float().T for h, weight in zip(hidden, b, strict=True)]
                    expanded = y_in.float() + torch.cat(parts, dim=1)
                    case = {"blocks": blocks, "linear": linear, "rank": rank, "rows": rows}
                    results.append({"op": "shrink", **case, **measure(shrink, shrunk)})
                    results.append({"op": "expand", **case, **measure(expand, expanded)})
    return results


def write_adapter(config, rank: int, folder: Path, seed: int = 0) -> None:
    """Saves a LoRA as PEFT does, random in both factors, on all seven linear layers; `config` as in support.memory.linear_shapes."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from support.memory import linear_shapes

    parts = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn")
    shapes = {f"{parts.get(name, 'mlp')}.{name}": shape for name, shape in linear_shapes(config).items()}
    random, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(config.num_hidden_layers):
        for name, (width, out) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(rank, width, generator=random) / width**0.5
            # some hundredths of what the layer itself gives: the answers change, and stay answers
            weights[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=random) * 0.05 / rank**0.5
    targets = [name.partition(".")[2] for name in shapes]
    LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)
    save_file(weights, folder / "adapter_model.safetensors")


def measure_answers(model: str, dataset: str, adapter: Path) -> dict:
    """The answers to the first held-out questions, as tokens with their log-probabilities."""
    import train_grpo

    # isort: split
    import torch
    from vllm import SamplingParams

    from data import load_questions, train_and_test_splits
    from support.engine import lora_request

    settings = ["--model", model, "--dataset", dataset, "--max_completion_length", str(TOKENS), "--dtype", "float16"]
    recipe = train_grpo.parse_recipe([*settings, *VRAM])
    model, tokenizer = train_grpo.load_base_model(recipe, ANSWERS)
    if not adapter.exists():
        write_adapter(model.config, recipe.lora_rank, adapter)
    split = train_and_test_splits(recipe.dataset)[1]
    questions = load_questions(recipe.dataset, split, tokenizer, recipe.max_prompt_length, recipe.system_prompt)
    prompts = questions["prompt"][:][:ANSWERS]
    texts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0)
    result = {
        "card": torch.cuda.get_device_name(),
        "attention": os.environ.get("VLLM_ATTENTION_BACKEND", "chosen by vLLM"),
    }
    for name, lora in {"without a LoRA": None, "with a LoRA": lora_request(adapter)}.items():
        outputs = model.vllm_engine.generate(texts, sampling, lora_request=lora, use_tqdm=False)
        answers = [output.outputs[0] for output in outputs]
        result[name] = [
            {
                "text": answer.text,
                "tokens": list(answer.token_ids),
                "logprobs": [at[token].logprob for at, token in zip(answer.logprobs, answer.token_ids, strict=True)],
            }
            for answer in answers
        ]
    return result


# --- what the parent makes of it ----------------------------------------------------------------------


def compare(answers: list[dict], others: list[dict]) -> dict:
    """How alike two lists of answers to the same prompts are.

    equal: how many texts are the same. tokens: how many there are before the first that differs, over all answers.
    mean, largest: of the differences of the log-probabilities of these tokens.
    """
    differences = []
    for answer, other in zip(answers, others, strict=True):
        pairs = zip(answer["tokens"], other["tokens"], answer["logprobs"], other["logprobs"], strict=False)
        for token, other_token, logprob, other_logprob in pairs:
            if token != other_token:
                break
            differences.append(abs(logprob - other_logprob))
    return {
        "equal": sum(answer["text"] == other["text"] for answer, other in zip(answers, others, strict=True)),
        "tokens": len(differences),
        "mean": statistics.fmean(differences) if differences else float("nan"),
        "largest": max(differences, default=float("nan")),
    }


def markdown(title: str, heads: list[str], rows: list[list]) -> str:
    lines = [f"**{title}**", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows]) + "\n"


def kernels_table(results: list[dict]) -> str:
    """A row for each op, phase and kind of blocks: the worst error and spill, the time of a layer's four linears."""
    table = []
    for op in ("shrink", "expand"):
        for phase, rows in ROWS.items():
            for blocks in dict.fromkeys(result["blocks"] for result in results):
                group = [r for r in results if (r["op"], r["blocks"]) == (op, blocks) and r["rows"] in rows]
                timed = 48 if phase == "decode" else max(rows)  # 48: the answers of a step
                us = sum(r["us"] for r in group if (r["rank"], r["rows"]) == (16, timed))
                spill = [r["spill"] for r in group]
                spills = f"{min(spill):,} to {max(spill):,}"
                error = f"{max(r['error'] for r in group):.1e}"
                table.append(
                    [f"{op}, {min(rows)} to {max(rows)} rows", blocks, error, spills, f"{us:.0f} ({timed} rows)"]
                )
    heads = ["", "blocks", "largest relative error", "spill on a T4, B a thread", "µs on this card, a layer, rank 16"]
    title = "vLLM's LoRA kernels, sm_75 lowering executed, float16, the 7B model's linear layers, ranks 8 to 32"
    return markdown(title, heads, table)


def answers_table(real: dict, t4: dict) -> str:
    table = []
    for name in ("without a LoRA", "with a LoRA"):
        alike = compare(real[name], t4[name])
        texts = f"{alike['equal']} of {len(real[name])}"
        table.append([name, texts, alike["tokens"], f"{alike['mean']:.4f}", f"{alike['largest']:.4f}"])
    changed = len(t4["with a LoRA"]) - compare(t4["without a LoRA"], t4["with a LoRA"])["equal"]
    heads = ["", "texts equal", "tokens before the first that differs", "log-probabilities differ by, mean", "at most"]
    title = (
        f"{real['card']} (attention {real['attention']}) against {t4['card']} (attention {t4['attention']}), float16"
    )
    return markdown(title, heads, table) + f"\nThe LoRA changes {changed} of the {len(t4['with a LoRA'])} texts.\n"


def training_table(evaluations: dict, metrics: list[dict]) -> str:
    rewards = [line["reward"] for line in metrics]
    table = [["generated by", ", ".join(f"{name} {value}" for name, value in evaluations["generation"].items())]]
    for when in ("before", "after"):
        e = evaluations[when]
        accuracy = f"{e['strict']:.1%} ({e['strict_low']:.1%} to {e['strict_high']:.1%}) of {e['n']}"
        table.append([f"strict accuracy {when}", accuracy])
    first, last = (statistics.fmean(part) for part in (rewards[:10], rewards[-10:]))
    table += [
        ["reward, first and last ten steps", f"{first:.2f} → {last:.2f}"],
        ["median seconds of a step, this card", f"{statistics.median(line['seconds'] for line in metrics):.1f}"],
        ["PyTorch's peak, GiB", f"{metrics[-1]['gib']:.1f}"],
    ]
    return markdown(f"train_grpo.py, {len(metrics)} steps of the default recipe as on a T4", ["", ""], table)


def shape_table(measured: dict) -> str:
    steps = measured["steps"]
    seconds = ", ".join(f"{step['step']:.1f}" for step in steps)
    row = [len(steps), measured["dtype"], steps[-1]["completions"], seconds]
    row += [f"{measured['gib']:.1f}", f"{measured['card_gib']:.1f}"]
    heads = ["steps", "numbers", "answers a step", "seconds of each, this card", "PyTorch's peak, GiB", "on the card"]
    return markdown("The 7B shape as on a T4, every answer trained on", heads, [row])


# --- the parts ----------------------------------------------------------------------------------------


class ChildError(Exception):
    pass


def run(name: str, arguments: list, out: Path, as_t4: bool = True) -> None:
    """Runs Python with `arguments`; what it prints goes to a log in `out`. Raises ChildError where it fails."""
    if as_t4:
        arguments = ["-m", "benchmarks.fake_t4", *arguments]
    # nothing set by hand, and kernels that are for this card
    env = {k: v for k, v in os.environ.items() if k not in ("VLLM_ATTENTION_BACKEND", "VLLM_TUNED_CONFIG_FOLDER")}
    env["TRITON_CACHE_DIR"] = str(out / "triton")
    log, start = out / f"{name}.log", time.perf_counter()
    print(f"--- {name}: log in {log}", flush=True)
    with log.open("w") as file:
        status = subprocess.run(
            [sys.executable, *map(str, arguments)], env=env, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    if status:
        last = log.read_text(errors="replace").splitlines()[-15:]
        raise ChildError("\n".join([f"{name} failed with status {status}; its last lines:", *last]))
    print(f"    {time.perf_counter() - start:.0f} s", flush=True)


def child(*arguments) -> list:
    return ["-m", "benchmarks.t4", *arguments]


def run_kernels(args) -> str:
    path = args.out / "kernels.json"
    run("kernels", child("--child", "kernels", "--json", path), args.out)
    return kernels_table(json.loads(path.read_text()))


def run_answers(args) -> str:
    found = {}
    for name, as_t4 in {"answers-real": False, "answers-t4": True}.items():
        path = args.out / f"{name}.json"
        options = ["--model", args.model, "--dataset", args.dataset, "--out", args.out, "--json", path]
        run(name, child("--child", "answers", *options), args.out, as_t4)
        found[name] = json.loads(path.read_text())
    return answers_table(found["answers-real"], found["answers-t4"])


def run_train(args) -> str:
    folder = args.out / "train"
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run in the same --out, which would have to be resumed
    settings = ["--model", args.model, "--dataset", args.dataset, "--max_steps", args.steps, "--output_dir", folder]
    run("train", ["train_grpo.py", *settings, *VRAM], args.out)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return training_table(json.loads((folder / "eval.json").read_text()), metrics)


def run_shape(args) -> str:
    # The form that benchmarks.training starts its own children with: those would not be told of a T4.
    path, folder = args.out / "shape.json", args.out / "shape"
    shutil.rmtree(folder, ignore_errors=True)
    settings = ["--model", args.shape, "--dataset", args.dataset, "--max_steps", 3, "--output_dir", folder]
    settings += ["--eval_samples", 8, "--dev_samples", 0, "--save_steps", 1000000, "--sample_steps", 1000000]
    command = ["-m", "benchmarks.training", "ours", "--all_answers", *settings, *VRAM]
    run("shape", [*command, "--json", path, "--child", time.time()], args.out)
    return shape_table(json.loads(path.read_text()))


PARTS = {"kernels": run_kernels, "answers": run_answers, "train": run_train, "shape": run_shape}
NEEDED = {"answers": ["model", "dataset"], "train": ["model", "dataset"], "shape": ["shape", "dataset"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", help="a real model in NF4, as of 1.5B")
    parser.add_argument("--shape", help="a model of the 7B model's shape in NF4, with random weights")
    parser.add_argument("--dataset")
    parser.add_argument("--steps", type=int, default=80, help="of training")
    parser.add_argument("--out", type=Path, help="a folder for JSON files and logs; a temporary one by default")
    parser.add_argument("--child", choices=["kernels", "answers"], help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kernels = args.child == "kernels"
        result = measure_kernels() if kernels else measure_answers(args.model, args.dataset, args.out / "adapter")
        args.json.write_text(json.dumps(result))
        return
    for part in args.parts:
        for name in NEEDED.get(part, []):
            if not getattr(args, name):
                parser.error(f"the part {part} needs --{name}")
    args.out = (args.out or Path(tempfile.mkdtemp(prefix="t4-"))).absolute()
    args.out.mkdir(parents=True, exist_ok=True)

    tables, failed = [], []
    for part in args.parts:
        try:
            tables.append(PARTS[part](args))
        except ChildError as error:
            print(error, flush=True)
            failed.append(part)
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name(), '· torch', torch.__version__)"]
    card = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or "no card"  # no CUDA in this process
    report = "\n".join([f"As on a T4, on: {card}\n", *tables, LIMITS])
    (args.out / "report.md").write_text(report + "\n")
    print(f"\n{report}\n\nJSON files and logs: {args.out}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
