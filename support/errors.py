"""Errors that a user can put right, and how a script ends on them."""

import os
import sys
from collections.abc import Callable

from support import screen


class UserError(Exception):
    """Something the user can put right. The scripts print it as one line, `error: …`, and exit with status 2."""

    def __init__(self, sentence: str):
        super().__init__(screen.one_line(sentence))


class StartAgain(UserError):
    """Something that the script gets round by itself: `run_script` runs it again, with further `arguments`.

    Nothing else gives back what a failed start of vLLM holds of the GPU.
    """

    def __init__(self, reason: str, how: str, arguments: list[str]):
        super().__init__(f"{reason}: give {' '.join(arguments)}.")
        self.sentence, self.arguments = f"{reason}: starting again {how}.", arguments


def fail(message: str) -> None:
    """Raises UserError(message): what the scripts put in the place of argparse's `parser.error`."""
    raise UserError(message)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main`; a UserError becomes one line on stderr and status 2, Ctrl-C status 130.

    Where a library's exception is behind a UserError, the last lines of the log follow under it.
    """
    try:
        for argument in sys.argv[1:]:
            if argument != argument.encode(errors="replace").decode():  # it could not be written into recipe.yaml
                raise UserError(f"{argument} is not in UTF-8: rename the file or set the terminal to UTF-8.")
        main()
        screen.output().flush()
    except BrokenPipeError:  # `… | head`: whoever read has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), screen.output().fileno())
        sys.exit(141)
    except UserError as error:
        if isinstance(error, StartAgain) and screen.processes() == 1:  # torchrun starts all or none
            screen.note(screen.one_line(error.sentence))
            screen.stop()
            os.execv(sys.executable, [*sys.orig_argv, *error.arguments])
        screen.fail(str(error), show_log=error.__cause__ is not None)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
