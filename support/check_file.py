"""check.json, which --check writes: made to be pasted into a report, so it has no paths and no names.

The standard library and yaml alone: it is also written where the libraries cannot be imported.
"""

import argparse
import getpass
import json
import os
import platform
import re
from pathlib import Path

import yaml

NAME = "check.json"


def output_dir_of(argv: list[str]) -> Path:
    """The output folder that a command line asks for, as far as can be seen without the recipe's own parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--output_dir", "--output-dir")
    args, _ = parser.parse_known_args(argv)
    text = args.config.read_text(encoding="utf-8") if args.config and args.config.is_file() else ""
    return Path(args.output_dir or (yaml.safe_load(text) or {}).get("output_dir", "outputs"))


def without_names(value, names: dict[str, str]):
    """`value`, as JSON has it, without absolute paths, this user's and machine's names, and the keys of `names` (replaced)."""
    if isinstance(value, dict):
        return {key: without_names(part, names) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_names(part, names) for part in value]
    if not isinstance(value, str):
        return value
    for name in sorted(names, key=len, reverse=True):
        value = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?![\w-])", names[name], value)
    value = re.sub(r"(?<![\w.>/])[~.]{0,2}/(?!/)[^\s'\",;:()]*[^\s'\",;:().]", "PATH", value)
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # in a container, of a user who has no name
        user = ""
    for name in {user, platform.node()} - {"", "root"}:
        value = re.sub(rf"\b{re.escape(name)}\b", "NAME", value)
    return value


def write_check(folder: Path, found: dict, names: dict[str, str]) -> None:
    """Writes what was `found` to check.json in `folder`, which is made if need be; of several processes the first does."""
    if os.environ.get("RANK", "0") != "0":
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_names(found, names), indent=2, ensure_ascii=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")
