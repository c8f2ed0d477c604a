"""The screen belongs to the recipe; what the libraries write goes to a log.

unsloth, vLLM, NCCL, Gloo, transformers and PyTorch put some forty lines around a run's own, from Python and from C++. So a
script calls `start` before it imports them: the file descriptors 1 and 2 then lead to the log, and what `say`, `doing` and
`fail` write goes where those led before. With --verbose, and where `start` was not called (tests, benchmarks), nothing is redirected.
"""

import atexit
import contextlib
import functools
import os
import re
import shutil
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from support.check_file import output_dir_of, write_check
from support.pins import INSTALL, differences, differing

RANK = os.environ.get("RANK", "0")  # of this process among those of torchrun: the first one has the screen
LOG = "libraries.log" if RANK == "0" else f"libraries-{RANK}.log"
LINES = 15  # of the log, under an error

_out: TextIO | None = None  # the real standard output and error, while 1 and 2 lead to the log
_err: TextIO | None = None
_log: Path | None = None
_temporary = False  # the log: until the output folder is known, and for good in infer.py
_since = 0  # the length of the log, in bytes, when the last `doing` began
_live: Progress | None = None  # the line that counts the seconds, on a terminal


def start() -> None:
    """Sends what the libraries write to a log in a temporary folder, unless the command line has --verbose."""
    global _out, _err, _temporary
    if "--verbose" in sys.argv or sys.stdout is None or sys.stderr is None:
        return
    _out, _err = (
        open(os.dup(stream.fileno()), "w", buffering=1, encoding=stream.encoding, errors=errors)
        for stream, errors in ((sys.stdout, "replace"), (sys.stderr, sys.stderr.errors))
    )
    _lead_to(Path(tempfile.mkdtemp(prefix="grpo-")) / LOG)
    _temporary = True
    atexit.register(_end)
    sys.stdout.reconfigure(line_buffering=True)
    sys.excepthook = _unexpected
    doing("importing", f"the libraries, which write to {_log}")


def stop() -> None:
    """Leads 1 and 2 back to where they led, for the process that takes the place of this one."""
    done()
    if _out:
        _point(_out.fileno(), _err.fileno())
        _end()


def log_to(folder: Path) -> None:
    """Moves the log to `folder`, behind what an earlier run left there, and says so."""
    global _temporary
    if _log is None:
        return
    before, temporary = _log, _temporary
    with (folder / LOG).open("ab") as file, contextlib.suppress(OSError):  # a mounted folder may have gone away
        file.write(before.read_bytes())
    _lead_to(folder / LOG)
    _temporary = False
    if temporary:
        shutil.rmtree(before.parent)
    say(f"log         {folder / LOG} has what the libraries say; --verbose shows it here")


def _lead_to(log: Path) -> None:
    global _log, _since
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _point(file, file)
    os.close(file)
    _log, _since = log, os.fstat(1).st_size


def _point(out: int, err: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


def shown(function):
    """`function` with the real standard output and error, as for input() and argparse's help, which write there themselves."""

    def wrapper(*args, **kwargs):
        if _out is None:
            return function(*args, **kwargs)
        done()
        log = os.dup(1)
        _point(_out.fileno(), _err.fileno())
        try:
            return function(*args, **kwargs)
        finally:
            _point(log, log)
            os.close(log)

    return wrapper


def output() -> TextIO:
    """The real standard output."""
    return _out or sys.stdout


def say(text: str, end: str = "\n") -> None:
    """Prints `text`, and ends the line that counts seconds, but for a bar, which stays below."""
    if RANK != "0":
        return
    try:
        if _live and _live.tasks[0].total:
            _live.console.out(text, highlight=False, end=end)
        else:
            done()
            output().write(text + end)
            output().flush()
    except RuntimeError:  # reentrant: this is a signal's handler, and the signal came while a line was being written
        os.write(output().fileno(), f"\n{text}{end}".encode())


def one_line(text: str) -> str:
    """`text` with escapes for what does not print, as the line ends and the bytes that are not UTF-8 in the name of a file."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@functools.cache
def say_once(text: str, about: str) -> None:
    """`say`, but once a process: what is true of a file that is read more than once. `about`: which one."""
    say(one_line(text))


def note(text: str) -> None:
    """Prints `text` on the real standard error."""
    done()
    print(text, file=_err or sys.stderr, flush=True)


def doing(label: str, what: str, total: int | None = None) -> None:
    """Says that something slow has begun: on a terminal in one line that counts the seconds until the next line of ours comes.

    With a `total` it is a bar, which `advance` moves and `done` ends. Elsewhere it is a line on standard error.
    """
    global _live, _since
    done()
    if _log:
        _since = os.fstat(1).st_size
    if RANK != "0":
        return
    text = f"{label:12}{what}"
    if _out and _out.isatty() and _err.isatty():
        columns = [TextColumn("{task.description}", markup=False), TimeElapsedColumn()]
        columns += [BarColumn(), MofNCompleteColumn()] if total else []
        console = Console(file=_out, soft_wrap=True)
        _live = Progress(
            *columns,
            console=console,
            transient=True,
            refresh_per_second=2,  # the thread that draws takes Python's time from the work
            redirect_stdout=False,
            redirect_stderr=False,
        )
        _live.add_task(text, total=total)
        _live.start()
    else:
        note(text)


def advance(completed: int) -> None:
    """Moves the bar of `doing` to `completed`."""
    if _live:
        _live.update(_live.tasks[0].id, completed=completed)


def done() -> None:
    """Ends what `doing` began."""
    global _live
    if _live:
        _live.stop()
        _live = None


def processes() -> int:
    """How many processes torchrun or accelerate launch has started for this run."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first_to_end() -> bool:
    """Whether no other process of this run has said yet why it ends: torchrun keeps the count, and then ends them all."""
    if processes() == 1:
        return True
    from torch.distributed import TCPStore

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"ended/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except Exception:  # without torchrun the first process has kept it, and may be gone
        return True


def fail(sentence: str, show_log: bool) -> None:
    """Prints `error: sentence` and, with `show_log`, what the libraries wrote last since `doing`, and where the rest is.

    Of the processes of one run the first that ends says so; the others end because it did.
    """
    global _temporary
    if not first_to_end():
        return
    note(f"error: {sentence}")
    if show_log and (lines := _last_lines()):
        note("\n".join(f"    {line}" for line in [*lines, f"… more in {_log}"]))
        _temporary = False  # it stays


def _end() -> None:
    done()
    if _temporary:
        shutil.rmtree(_log.parent, ignore_errors=True)


def _last_lines() -> list[str]:
    if _log is None:
        return []
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        with _log.open("rb") as file:
            file.seek(_since)
            text = file.read().decode(errors="replace")
    except OSError:  # the folder has gone away
        return []
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)  # colours
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n"))  # the last state of a bar
    return [line for line in lines if line][-LINES:]


def _unexpected(kind, error, trace) -> None:
    """What no part of the recipe expects: the traceback goes to the log, and its end under our line."""
    if issubclass(kind, KeyboardInterrupt):
        return
    traceback.print_exception(kind, error, trace)
    sentence = f"{kind.__name__}: {' '.join(str(error).split())[:300]}"
    if issubclass(kind, ImportError | AttributeError) and (different := differences()):
        sentence = f"{sentence.rstrip('.')}. {different}: {INSTALL}"
    fail(sentence, show_log=True)
    if "--check" in sys.argv:  # and the libraries cannot even be imported
        failure = {"part": "importing", "sentence": sentence}
        found = {"passed": False, "failure": failure, "packages": {"differing": differing()}}
        write_check(output_dir_of(sys.argv[1:]), found, names={})
        _end()
        os._exit(2)  # a hook cannot set the status
