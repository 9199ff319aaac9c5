"""The command line: `rlhf-ray`, also `python -m launch`.

Exit codes: 0 done; 1 the run failed; 2 the input is wrong; 130 interrupted, after saving.

The commands are in `launch.commands`. Nothing heavy is imported before one is known, so `--help`
answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from launch.commands import COMMANDS
from launch.commands.train import RunFailed
from launch.exit_codes import FAILED, INTERRUPTED, WRONG_INPUT
from rlhf_ray import __version__
from rlhf_ray.errors import ConfigError, Interrupted, UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: the words after the program's name; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        arguments = parse(words)
        return int(arguments.handler(arguments))
    except SystemExit as finished:  # argparse has printed help or the version
        return int(finished.code or 0)
    except (KeyboardInterrupt, Interrupted) as interruption:
        _complain(str(interruption) or "interrupted", debug)
        return INTERRUPTED
    except UserError as error:
        mistakes = error.mistakes if isinstance(error, ConfigError) else (str(error),)
        _complain(_listed(mistakes), debug)
        return WRONG_INPUT
    except RunFailed as failure:
        _complain(f"{_said(failure.__cause__)}\n  the whole traceback: {failure.log}", debug)
        return FAILED
    except Exception as error:
        _complain(f"{_said(error)}\n  --debug shows the traceback", debug)
        return FAILED


def _complain(text: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"rlhf-ray: {text}", file=sys.stderr)


def _listed(mistakes: Sequence[str]) -> str:
    if len(mistakes) == 1:
        return mistakes[0]
    return "\n".join([f"{len(mistakes)} mistakes", *(f"  - {mistake}" for mistake in mistakes)])


def _said(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, with its `handler`; overrides and options may stand in any order.

    Raises:
        UserError: no such command or option.
    """
    parser, commands = _parsers()
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in commands:
        raise UserError(
            f"no command {command} (there are {', '.join(commands)}){_nearest(command, commands)}"
        )
    arguments, left = parser.parse_known_args(words)
    if command is None:
        parser.error("which command?")
    unknown = [word.partition("=")[0] for word in left if word.startswith("-")]
    if unknown:
        options = re.findall(r"--[\w-]+", commands[command].format_help())
        raise UserError(f"{command} has no option {unknown[0]}{_nearest(unknown[0], options)}")
    if "overrides" in arguments:
        arguments.overrides = [*arguments.overrides, *left]
    elif left:
        raise UserError(f"{command}: what is {' '.join(left)} for? see rlhf-ray {command} --help")
    return arguments


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and those of its commands by name."""
    parser = _Parser(prog="rlhf-ray", description="RLHF for language models on Ray.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rlhf-ray {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    group = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands: dict[str, _Parser] = {}

    def add(name: str, handler: Callable[[argparse.Namespace], int], about: str) -> _Parser:
        command: _Parser = group.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
        command.set_defaults(handler=handler)
        commands[name] = command
        return command

    for module in COMMANDS:
        module.add(add)
    return parser, commands


if __name__ == "__main__":
    sys.exit(main())
