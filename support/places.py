"""Where things are: a name that may mean a folder here, one beside the scripts or one on the hub; and the hub's cache."""

import os
import stat
from pathlib import Path

from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils import HFValidationError, validate_repo_id

from support.errors import UserError
from support.screen import say_once

SCRIPTS = Path(__file__).resolve().parents[1]


def find_local(name: str) -> str:
    """`name`, or, where nothing here is called so, the path of what is called so beside the scripts.

    The recipes name `tiny` and `tiny/questions`, which lie there; from another working directory these would be taken for
    names on the hub. Says so where it does.
    """
    beside = str(SCRIPTS / name)
    if not name or kind_of(name) or not kind_of(beside):
        return name
    say_once(f"found       {name} is {beside}", about=name)
    return beside


def find_model(name: str) -> str:
    """What to load the model `name` from: a folder here or beside the scripts, else its name on the hub."""
    found = find_local(name)
    if not kind_of(found):
        check_cache()
    return found


def kind_of(name: str) -> str:
    """What is at the path `name`: `file`, `folder`, `a pipe or a device`, or nothing (an empty string)."""
    try:
        mode = os.stat(name).st_mode
    except PermissionError as error:
        raise UserError(f"cannot read {name}: {error.strerror}.") from error
    except (OSError, ValueError):  # also a link in a circle, a name too long, one with a zero in it
        return ""
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "a pipe or a device"


def check_hub_name(name: str) -> None:
    """Raises UserError for what is no name on the hub, and so was meant to be here: asking for it would take half a minute."""
    try:
        validate_repo_id(name)
        name.encode("ascii")
    except (HFValidationError, UnicodeEncodeError):
        raise UserError(f"there is no file or folder {name!r}, and it cannot be a name on the hub.") from None


def check_cache() -> None:
    """Raises UserError where the folders for what comes from the hub cannot be made, as with a HOME that is not there."""
    for folder in map(Path, (HF_HUB_CACHE, HF_DATASETS_CACHE)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make {folder}, for what is downloaded from the Hugging Face hub ({error.strerror}): "
                "set HF_HOME to a folder that you may write to."
            ) from error
