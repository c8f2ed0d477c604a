"""The screen is the recipe's: what libraries write, from whatever language, is in the log, and the log's place is in sight."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOISE = """
import logging, os, subprocess, sys, warnings
print("from Python")
os.write(1, b"from C, out\\n"); os.write(2, b"from C, err\\n")
subprocess.run(["echo", "from a child"])
logging.warning("from logging"); warnings.warn("from warnings")
print("33%\\r66%\\r100%\\n\\x1b[31mred\\x1b[0m")
"""
SAID = ["from Python", "from C, out", "from C, err", "from a child", "WARNING:root:from logging", "100%", "red"]


def script(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs `code` after `screen.start()`, piped."""
    code = f"from support import screen\nscreen.start()\n{NOISE}\n{code}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


def named_log(stderr: str) -> Path:
    return Path(re.search(r"importing +the libraries, which write to (\S+)", stderr)[1])


def on_a_terminal(command: list[str]) -> str:
    """What `command` writes to a terminal, escape sequences and all."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], command)
    text = b""
    try:
        while data := os.read(terminal, 65536):
            text += data
    except OSError:  # how Linux says that the other end is closed
        pass
    os.waitpid(pid, 0)
    return text.decode()


def test_only_our_lines_are_on_the_screen(tmp_path):
    (tmp_path / "libraries.log").write_text("of an earlier run\n")
    result = script(f"from pathlib import Path; screen.log_to(Path({str(tmp_path)!r})); screen.say('ours'); {NOISE}")
    log, line, ours = result.stdout.splitlines()[0], *result.stdout.splitlines()[-2:]
    assert line.startswith("log         ") and ours == "ours" and log == line
    assert result.stderr.splitlines() == [f"importing   the libraries, which write to {named_log(result.stderr)}"]
    lines = (tmp_path / "libraries.log").read_text().split("\n")
    assert lines[0] == "of an earlier run"
    for said in SAID[:5]:
        assert lines.count(said) == 2  # before and after the log was moved
    assert not named_log(result.stderr).parent.exists()


def test_verbose_redirects_nothing():
    result = script("screen.say('ours')", "--verbose")
    assert "from Python\nfrom C, out\nfrom a child\n" in result.stdout.replace("33%\r66%\r100%\n", "")
    assert result.stdout.endswith("ours\n") and "from C, err" in result.stderr


def test_under_an_error_of_a_library_stand_its_last_words():
    code = """
from support.errors import UserError, run_script
def main():
    screen.doing("loading", "a model")
    print("while loading\\n33%\\r66%\\r100%\\n\\x1b[31mred\\x1b[0m")
    raise UserError("no model.") from ValueError("x")
run_script(main)"""
    result = script(code)
    assert result.returncode == 2 and result.stdout == ""
    loading, error, *lines, more = result.stderr.splitlines()[1:]
    assert (loading, error) == ("loading     a model", "error: no model.")
    assert lines == ["    while loading", "    100%", "    red"]  # since the loading began, as one would read it
    assert more == f"    … more in {named_log(result.stderr)}"
    assert "from a child" in named_log(result.stderr).read_text()

    result = script(code.replace(' from ValueError("x")', ""))  # our own judgement: the libraries have no part in it
    assert result.stderr.splitlines()[1:] == ["loading     a model", "error: no model."]
    assert not named_log(result.stderr).exists()


def test_a_name_that_is_not_utf8_is_refused_at_once_and_in_one_line():
    """It could not be written into recipe.yaml and complete.json: the run would end at its first checkpoint."""
    code = "from support.errors import run_script\nrun_script(lambda: screen.say('began'))"
    result = script(code, b"--dataset", b"\xcc\xe2\n.jsonl")
    assert result.returncode == 2 and result.stdout == ""
    assert "\nerror: \\udccc\\udce2\\n.jsonl is not in UTF-8: rename the file" in result.stderr


def test_an_unexpected_error_keeps_its_traceback():
    result = script("1 / 0")
    assert result.returncode == 1
    assert result.stderr.splitlines()[1] == "error: ZeroDivisionError: division by zero"
    assert "    Traceback (most recent call last):" in result.stderr.splitlines()
    assert named_log(result.stderr).read_text().endswith("ZeroDivisionError: division by zero\n")


def test_after_a_crash_of_the_process_the_log_is_known():
    result = script("sys.stdout.flush(); os.abort()")
    assert result.returncode < 0
    assert "from C, err" in named_log(result.stderr).read_text()


def test_a_terminal_has_one_line_that_counts_the_seconds():
    code = f"""from support import screen\nscreen.start()\n{NOISE}
import time
screen.doing("loading", "a model"); time.sleep(1.2); screen.say("loaded")
screen.doing("training", "3 steps", total=3); screen.say("step 1"); screen.advance(1); time.sleep(0.6); screen.done()"""
    text = on_a_terminal([sys.executable, "-c", code])
    for said in SAID:
        assert said not in text
    assert {"0:00:00", "0:00:01"} <= set(re.findall(r"a model \S*?(0:00:\d\d)", text))
    plain = re.sub(r"\x1b\[([\d;]*m|\?25[lh])", "", text)  # without colours
    left = re.sub(r"[^\r\n]*(\r?\n)?\r(\x1b\[1A)?\x1b\[2K", "", plain)  # without what was written over or erased
    assert left.split() == ["loaded", "step", "1"]
    assert "1/3" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_help_is_on_the_screen():
    result = subprocess.run([sys.executable, "train_grpo.py", "--help"], capture_output=True, text=True)
    assert "--verbose" in result.stdout and result.returncode == 0
    assert not named_log(result.stderr).exists()


@pytest.mark.parametrize("version, ends", [((3, 9), True), ((3, 10), False), ((3, 13), False), ((3, 14), True)])
def test_a_python_without_pins_is_told_so_before_anything_fails(version, ends):
    code = "import sys, packaging.requirements\n"  # which looks at the version, too
    code += f"sys.version_info = {(*version, 0)}; sys.path.insert(0, '/nowhere'); sys.argv = ['train_grpo.py']\n"
    code += "import builtins; real = builtins.__import__\n"
    code += "def no_torch(name, *rest):\n    if name == 'torch': sys.exit(7)\n    return real(name, *rest)\n"
    code += "builtins.__import__ = no_torch\nimport train_grpo"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if ends:
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("error: the pinned packages are for Python 3.10 to 3.13, and this is 3.")
    else:
        assert result.returncode == 7, result.stderr
