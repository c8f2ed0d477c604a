"""What grpo_colab.ipynb runs the scripts with. It is imported by Colab's own Python: the standard library and IPython alone."""

import html
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

from IPython.display import HTML, Image, display

SETTINGS = os.environ | {"COLUMNS": "1000"}  # the browser breaks lines
SETTINGS.pop("FORCE_COLOR", None)  # the kernel's, for what can show colours


class Stopped(Exception):
    """Ends a cell with one message, in both languages where it is ours."""

    def _render_traceback_(self) -> list[str]:  # IPython then shows this message and no traceback
        return [str(self)]


def run(*command: str, picture: Path | None = None) -> None:
    """Runs `command` and shows what it prints; one line is kept up to date with the latest step, and in the end with the seconds.

    `picture`: a file that is shown above, and again whenever it has changed. The stop button's signal goes to the command,
    which saves a checkpoint. Raises Stopped where it was stopped, or failed: with its line that starts with `error:`.
    """
    start, error, step, rows, seen, stopped = time.time(), "", "", [], 0.0, False
    image = display(display_id=True) if picture else None
    newest = display({"text/plain": shlex.join(command)}, raw=True, display_id=True)
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=SETTINGS,
        start_new_session=True,  # the stop button's signal reaches the script once, from here
    )
    while True:
        try:
            for line in process.stdout:
                text = line.rstrip()
                if re.match(r"step +\d+  reward", text):
                    step = text.replace("  no variance", "\n          no variance")
                    newest.update({"text/plain": step}, raw=True)
                elif text.startswith(tuple("┏┃┡│└")):
                    if text[0] in "┃│":
                        rows.append(re.split("[┃│]", text)[1:-1])
                else:
                    print(f"{step}\n{text}" if text.startswith("    question: ") else text)
                    error = text if text.startswith(("error:", "fatal:")) else error
                if picture and picture.exists() and picture.stat().st_mtime != seen:
                    seen = picture.stat().st_mtime
                    image.update(Image(filename=str(picture), width=560))
            break
        except KeyboardInterrupt:
            stopped = True
            process.send_signal(signal.SIGINT)
    status = process.wait()
    newest.update({"text/plain": f"{shlex.join(command)}  # {time.time() - start:.0f} s"}, raw=True)
    if stopped:
        raise Stopped("已停止；再运行一次即可继续。 Stopped; run it again to go on.")
    if status:
        raise Stopped(error or f"exit status {status}: {shlex.join(command)}")
    if rows:
        display(side_by_side(rows))


def side_by_side(rows: list[list[str]]) -> HTML:
    """The table of infer.py --compare as HTML: in a browser a Chinese character is not as wide as two others."""
    style = "text-align: left; vertical-align: top; white-space: pre-wrap"
    cells = ["\n".join(part.strip() for part in column) for column in zip(*rows[1:], strict=False)]
    head = "".join(f"<th style='{style}'>{html.escape(name.strip())}</th>" for name in rows[0])
    body = "".join(f"<td style='{style}'>{html.escape(cell)}</td>" for cell in cells)
    return HTML(f"<table><tr>{head}</tr><tr>{body}</tr></table>")
