"""Where things are: a name that may mean a folder here, one beside the scripts or one on the hub; the hub's cache; a folder's files by split."""

import os
import re
import stat
from collections import Counter
from pathlib import Path

from datasets.config import HF_DATASETS_CACHE
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.utils import HFValidationError, validate_repo_id

from support.errors import UserError
from support.screen import say_once
from support.tables import FILE_TYPES, SPLIT_WORDS, TABLE_TYPES, shown

SCRIPTS = Path(__file__).resolve().parents[1]

ABOUT = r"(dataset_?)?infos?|meta(data)?|state|config|readme|license|notes?|requirements"  # names of files about a set
OTHER_TYPES = (".txt", ".ndjson", ".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar", ".tar", ".tgz", ".xlsx", ".xls")


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


# --- the files of a folder ----------------------------------------------------------------------------


def files_in(folder: Path) -> list[Path]:
    """All files in `folder` and the folders in it, also behind links, but no hidden ones. Raises OSError for what cannot be listed."""

    def stop(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for place, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")) and real not in seen)
        found += [Path(place, name) for name in files if not name.startswith(".") and real not in seen]
        seen.add(real)  # links may run in a circle
    return sorted(found)


def split_of(name: str) -> str:
    """The split that the last telling word of a path says: `train` for `GSM8K_train.jsonl`, `TrainData.jsonl`, `训练集.csv`."""
    text = re.sub("(?<=[a-z])(?=[A-Z])", " ", name).casefold()
    words = re.findall("[a-z]+|训练|测试|验证|訓練|測試|驗證", text)
    splits = [SPLIT_WORDS.get(re.sub("(set|data)$", "", word), "") for word in words]
    return next(filter(None, reversed(splits)), "")


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files in `folder` by split, told by the words in their names or their folders'; files without one are `train` where none is.

    Of a split in several types, the type of which there are most. Raises UserError where there is nothing to read, and
    OSError where the system does not let it.
    """
    paths = files_in(folder)
    if any(path.suffix == ".arrow" for path in paths):
        raise UserError(f"{folder} was written by save_to_disk: write it with to_json or to_parquet.")
    card = folder / "README.md"
    head = re.match(rb"(\xef\xbb\xbf)?---\s*\n.*?\n---", card.read_bytes() if card.is_file() else b"", re.DOTALL)
    configurations = dict.fromkeys(re.findall(rb"config_name: *(\S+)", head[0] if head else b""))
    if len(configurations) > 1:
        names = b", ".join(configurations).decode(errors="replace")
        raise UserError(f"{folder} holds several sets ({shown(names)}): give the folder or the file of one.")
    telling = [path for path in paths if not re.fullmatch(ABOUT, path.stem.casefold())] or paths
    files = {}
    for file in telling:
        if file.suffix.lower() in TABLE_TYPES:
            if (kind := kind_of(str(file))) != "file":
                raise UserError(f"cannot read {file}: it is {kind or 'a link to nothing'}.")
            files.setdefault(split_of(str(file.relative_to(folder).with_suffix(""))), []).append(file)
    if not files:
        raise UserError(f"the folder {folder} has no file that ends in {', '.join(TABLE_TYPES)}.")
    files.setdefault("train", files.get("", []))
    found = {split: files[split] for split in ("train", "validation", "test") if files.get(split)}
    others = [path.name for path in telling if path.suffix.lower() in OTHER_TYPES]
    if "train" not in found and others:
        raise UserError(
            f"{folder} has files for {' and '.join(found)}, none for train, and {shown(', '.join(others), 100)}, which is "
            "not read: save that as train.jsonl, or give one file instead of the folder."
        )
    for split, paths in found.items():
        types = Counter(path.suffix.lower() for path in paths)
        most = max(FILE_TYPES, key=lambda suffix: (types[suffix], suffix != ".json"))  # JSON may be about the set
        found[split] = [path for path in paths if path.suffix.lower() == most]
        if len(paths) > 1:
            names = ", ".join(path.relative_to(folder).as_posix() for path in found[split])
            say_once(f"files       {split}: {shown(names, 100)}", about=str(folder))
    return found
