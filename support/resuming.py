"""Going on with a run: which of its checkpoints are whole, whether they belong to the same run, and what goes when it goes on."""

import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from support.errors import UserError
from support.rules import Rules
from support.screen import say
from support.settings import Recipe

# recipe.yaml shows the system prompt line by line
yaml.SafeDumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)

# A run with another value for one of these is another run, or cannot take over the optimiser's state.
FIXED = ["model", "dataset", "question_column", "answer_column", "system_prompt", "seed"]
FIXED += ["lora_rank", "lora_alpha", "load_in_4bit"]
FIXED += ["optim", "adam_beta1", "adam_beta2", "weight_decay", "dev_samples"]
# So is one with another content of the user's file of rewards: `rewards` is compared by its digest, as files move.
MOVES = ["resume", "output_dir", "rewards"]


TABLE = ("before", "after", "last")  # of eval.json, in the order in which they are shown
UNFINISHED = "it was not finished"
LOCK = ".lock"
OWN_REWARDS = (
    "own_rewards.py"  # the copy of the user's file beside recipe.yaml; not rewards.py, which ours would be taken for
)


def write_text(path: Path, text: str) -> None:
    """In one piece: whoever is killed while writing leaves the old file as it was."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    if PartialState().is_main_process:  # of several, which all come here, one writes
        replace(path, content)


def replace(path: Path, content: bytes) -> None:
    """Of several processes more than one may come here at once, where the rewards have failed in each."""
    partial = path.with_name(f"{path.name}.{PartialState().process_index}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def write_json(path: Path, content) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_recipe(recipe: Recipe, rules: Rules) -> None:
    """recipe.yaml, and beside it the user's file of rewards, which it names."""
    out, settings = Path(recipe.output_dir), dataclasses.asdict(recipe) | {"resume": ""}
    if rules.file:
        settings["rewards"] = OWN_REWARDS
        write_bytes(out / OWN_REWARDS, rules.source)
    write_text(out / "recipe.yaml", yaml.safe_dump(settings, allow_unicode=True, sort_keys=False))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in `out`, complete or not, newest first."""
    return sorted((path for path in out.glob("checkpoint-*") if path.name[11:].isdigit()), key=step_of, reverse=True)


def mark_complete(checkpoint: Path, recipe: Recipe, questions: int, rules: Rules, mend: bool = False) -> None:
    """Writes complete.json, last: the recipe, how many questions were used up to there, and a digest of every file.

    A checkpoint without it was not finished. `mend`: the user's file of rewards has failed, and a mended one may go on.
    """
    PartialState().wait_for_everyone()  # each process has saved its random state
    if not PartialState().is_main_process:
        return
    (checkpoint / "complete.json").unlink(missing_ok=True)
    files = {
        str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and not path.name.startswith("complete.json")
    }
    content = {"recipe": dataclasses.asdict(recipe), "questions": questions, "files": files}
    content["processes"] = recipe.processes
    if rules.file:
        content |= {"rewards_sha256": rules.digest, "mend": mend}
    write_json(checkpoint / "complete.json", content)


def allow_mending(checkpoint: Path) -> None:
    """As mark_complete's `mend`, by whichever of several processes it was in which the rewards failed."""
    path = checkpoint / "complete.json"
    content = json.loads(path.read_text(encoding="utf-8")) | {"mend": True}
    replace(path, json.dumps(content, indent=2, ensure_ascii=False).encode())


def flaw(checkpoint: Path) -> str | None:
    """Why no run can continue from `checkpoint`; None if one can."""
    try:
        files = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return UNFINISHED
    except (OSError, ValueError, KeyError, TypeError):
        return "its complete.json is damaged"
    for name, digest in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() != digest:
            return f"{name} is damaged"
    return None


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint to continue from, None to start at step 1. Raises UserError where neither is what was asked for."""
    out = Path(recipe.output_dir)
    found = checkpoints(out)
    if not recipe.resume:
        begun = (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size
        if found or begun or (out / "adapter").exists():
            this = [*interpreter(), *sys.argv]
            other = [
                part
                for before, part in zip(["", *this], this, strict=False)
                if not {before, part.split("=")[0]} & {"--output_dir", "--output-dir"}
            ]
            flaws = {flaw(checkpoint) for checkpoint in found}
            if None in flaws:
                held = f". Continue it: {shlex.join([*this, '--resume'])} or start"
            elif flaws <= {UNFINISHED} and not (out / "adapter").exists():
                held = f" that had no checkpoint yet. Begin it anew: {shlex.join([*this, '--resume', 'auto'])} or start"
            else:
                held = ", which cannot be continued. Start"
            raise UserError(
                f"{out} already holds a run{held} another: {shlex.join([*other, '--output_dir', f'{out}-2'])}"
            )
        return None
    if recipe.resume in ("newest", "auto"):
        reasons = set()
        for checkpoint in found:
            if not (reason := flaw(checkpoint)):
                return checkpoint
            say(f"skipped     {checkpoint}: {reason}")
            reasons.add(reason)
        if reasons - {UNFINISHED}:
            raise UserError(
                f"no checkpoint in {out} can be continued from: move them away, or give another --output_dir."
            )
        if (out / "adapter").exists():
            raise UserError(
                f"{out} holds a trained adapter and no checkpoint to go on from: give another --output_dir."
            )
        if recipe.resume == "newest":
            raise UserError(
                f"there is no checkpoint in {out} to continue from: --resume auto begins anew, or give another --output_dir."
            )
        return None
    named = Path(recipe.resume)
    if not named.exists() and (out / named).exists():
        named = out / named
    if named.resolve() not in [path.resolve() for path in found]:
        held = ", ".join(path.name for path in found) or "none"
        raise UserError(f"--resume {named} is no checkpoint in {out}, which holds {held}.")
    if reason := flaw(named):
        raise UserError(f"{named} cannot be continued from: {reason}. --resume alone takes the newest that can.")
    return out / named.name


@dataclass
class Start:
    """Where a run begins: after the last step of `checkpoint`, or, without one, at step 1."""

    lock: TextIO | None  # the folder is held as long as this is open, by the first of several processes
    checkpoint: Path | None = None
    used: int = 0  # questions, by the steps up to there
    changed: list[str] = field(default_factory=list)  # settings with other values than the checkpoint's
    evaluations: dict = field(default_factory=dict)  # eval.json, as far as it was written
    complete: bool = False  # nothing is left to do

    @property
    def step(self) -> int:
        return step_of(self.checkpoint) if self.checkpoint else 0

    def __getstate__(self):  # for the other processes
        return vars(self) | {"lock": None}

    def measured_as(self, now: dict, questions: str) -> bool:
        """Whether the answers to `questions` (dev or test) were measured as they would be `now`: see `measured_with`."""
        before = self.evaluations.get("measured_with", {})
        return all(before.get(name) == now[name] for name in ("max_completion_length", "rewards", questions))

    def say_other_questions(self, now: dict) -> None:
        """A line where the files of questions have changed: a run goes on with them, but it is not quite the same run."""
        before = self.evaluations.get("measured_with", now)
        if before["train"] != now["train"] and "max_prompt_length" not in self.changed:
            say("changed     the questions to train on, or to develop on, are others than before")


def measured_with(recipe: Recipe, rules: Rules, train, dev, test) -> dict:
    """What an accuracy depends on besides the policy, and which questions are trained on; questions by a digest."""
    digests = {
        name: hashlib.sha256(json.dumps([part["prompt"][:], part["answer"][:]]).encode()).hexdigest()
        for name, part in {"train": train, "dev": dev, "test": test}.items()
    }
    return {"max_completion_length": recipe.max_completion_length, "rewards": rules.digest, **digests}


def find_start(recipe: Recipe, rules: Rules) -> Start:
    """Where `recipe` begins, and what an earlier run of it left: of several processes one looks, and tells the others.

    Raises UserError where it cannot begin there.
    """
    start = [look_for_start(recipe, rules) if PartialState().is_main_process else None]
    return broadcast_object_list(start)[0]


def look_for_start(recipe: Recipe, rules: Rules) -> Start:
    out = Path(recipe.output_dir)
    start = Start(hold(out) if out.exists() else None)
    start.checkpoint = find_checkpoint(recipe)
    if not start.checkpoint:
        return start
    written = json.loads((start.checkpoint / "complete.json").read_text(encoding="utf-8"))
    start.changed = check_same_rewards(rules, start.checkpoint, written)
    start.changed += check_same_run(recipe, start.checkpoint, written["recipe"])
    if (before := written.get("processes", 1)) != recipe.processes:
        say(
            f"changed     processes: {before} before, {recipe.processes} from here on; answers are sampled in another order"
        )
    start.used = written.get("questions", start.step * written["recipe"]["prompts_per_step"])
    if (out / "eval.json").exists():
        start.evaluations = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    done = "after" in start.evaluations and (out / "adapter").exists() and start.checkpoint == checkpoints(out)[0]
    if done and start.step >= recipe.max_steps and not start.changed:
        say(f"The run in {out} is complete, with {start.step} steps; --max_steps goes on from there.")
        start.evaluations = {name: start.evaluations[name] for name in TABLE if name in start.evaluations}
        start.complete = True
    elif start.step > recipe.max_steps:
        raise UserError(f"{start.checkpoint} is past --max_steps {recipe.max_steps}: give {start.step} or more.")
    else:
        say(f"resuming    after step {start.step}, from {start.checkpoint}")
    return start


def hold(out: Path) -> TextIO | None:
    """Makes the output folder and holds it for this process, as long as the file that is returned is open.

    Raises UserError where the folder, or a file in it, cannot be made, or where another process holds it. The system
    forgets the lock when the process ends, however it ends; what is left of the file holds nobody up. Of several
    processes of one run the first holds it.
    """
    if not PartialState().is_main_process:
        return None
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("a")
    except FileExistsError as error:
        raise UserError(f"--output_dir {out} is a file: give a folder.") from error
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}. Give another --output_dir.") from error
    try:
        fcntl.lockf(
            file, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # of the process: a child does not keep it, as it would with flock
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"another process is training in {out}: wait until it ends, or give another --output_dir."
        ) from error
    except OSError:  # a mounted folder may know no locks
        pass
    return file


def wait_for(out: Path) -> None:
    """Waits until the first process has made the output folder. Raises UserError, in all, where one does not see it."""
    PartialState().wait_for_everyone()
    blind = [host for host, sees in gather_object([(socket.gethostname(), (out / LOCK).exists())]) if not sees]
    if blind:
        raise UserError(f"{blind[0]} does not see {out}: several hosts need an --output_dir that they share.")


def check_present(out: Path) -> None:
    """Raises FileNotFoundError if the folder of the run has gone away: an empty one in its place would take what follows."""
    if not (out / LOCK).exists():
        raise FileNotFoundError("the folder has gone away")


def check_same_rewards(rules: Rules, checkpoint: Path, written: dict) -> list[str]:
    """Raises UserError where the run had other rewards than `rules`, by their content's digest in complete.json.

    But for a file that failed in the step after the checkpoint: what has been mended is listed as changed.
    """
    before = written.get("rewards_sha256")
    if before == rules.digest:
        return []
    if written.get("mend") and rules.file:
        say(f"changed     {rules.file}, which failed after step {step_of(checkpoint)}")
        return ["rewards"]
    copy = checkpoint.parent / OWN_REWARDS
    had, how = (f"the rewards of {copy}", f"with --rewards {copy}") if before else ("our rewards", "without --rewards")
    has = f"what {rules.file} holds now" if rules.file else "ours"
    raise UserError(
        f"{checkpoint} belongs to a run with {had}, and not with {has}: continue it {how}, "
        "or start another run with another --output_dir."
    )


def check_same_run(recipe: Recipe, checkpoint: Path, written: dict) -> list[str]:
    """Lists the settings that differ from those `written` with the checkpoint. Raises UserError for one that makes it another run."""
    changed = []
    before = dataclasses.asdict(Recipe()) | written  # a setting that came later had its default
    for name, value in dataclasses.asdict(recipe).items():
        if name in MOVES or before[name] == value:
            continue
        if name in FIXED:
            raise UserError(
                f"{checkpoint} belongs to a run with {name} {before[name]!r}, not {value!r}: continue it with that, or "
                "start another run with another --output_dir."
            )
        say(f"changed     {name}: {before[name]} before, {value} from here on")
        changed.append(name)
    return changed


def go_back_to(checkpoint: Path | None, recipe: Recipe) -> None:
    """Removes what the output folder holds from after `checkpoint` (None: everything)."""
    if not PartialState().is_main_process:
        return
    out = Path(recipe.output_dir)
    step = step_of(checkpoint) if checkpoint else 0
    for later in checkpoints(out):
        if step_of(later) > step:
            why = f"which comes after step {step}" if not flaw(later) else "which is not whole"
            say(f"removed     {later}, {why}")
            shutil.rmtree(later)
    for path in (out / "metrics.jsonl", out / "samples.jsonl", out / "evaluations.jsonl"):
        if checkpoint:
            content = path.read_bytes() if path.exists() else b""
            lines = read_json_lines(path)
            if content and (not content.endswith(b"\n") or lines[-1]["step"] > step):
                write_json_lines(path, [line for line in lines if line["step"] <= step])
        else:
            path.unlink(missing_ok=True)


def command(recipe: Recipe, *arguments: str) -> str:
    """A shell command that runs this recipe again, with further `arguments`."""
    written = Path(recipe.output_dir) / "recipe.yaml"
    where = ["--config", str(written), "--output_dir", recipe.output_dir]  # the folder may have been moved
    return shlex.join([*interpreter(), sys.argv[0], *where, *arguments])


def interpreter() -> list[str]:
    """What starts the script: Python or, as torchrun has started this, torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return [sys.executable]
    if os.environ["GROUP_WORLD_SIZE"] != "1":  # its arguments are each host's own
        return ["torchrun", "..."]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", os.environ["LOCAL_WORLD_SIZE"]]


def read_json_lines(path: Path) -> list[dict]:
    """The lines of a JSONL file; none if there is no file. A last line that was not finished is left out."""
    if not path.exists():
        return []
    # Bytes: it may have been cut inside a character. And not splitlines(), which takes \\r for an end, too.
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]


def write_json_lines(path: Path, records: list[dict], append: bool = False) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if not append:
        write_text(path, text)
    elif PartialState().is_main_process:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
