"""Which options that are added to a chain each of its stages takes."""

import multiprocessing
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kd_lightning.cli.functions import parse_function
from kd_lightning.errors import UserError

Words = list[str]
_SOME_CLASSES = 2
"""Number of classes with which options are checked, before the data are known."""


def options_of_stages(commands: Sequence[Sequence[str]], added: Sequence[str]) -> list[Words]:
    """Return, for each command, the added options that it takes.

    An option is for every ``fit`` that takes it, or, if none does, for every ``export`` and ``report`` that takes it.
    Commands are parsed in another process, which imports torch and their classes.

    Args:
        commands: Words of the commands, ``fit``, ``export`` or ``report`` first.
        added: Words of the options.

    Raises:
        UserError: If no command takes an option; the message says why the first one refuses it.
    """
    options = list(_options(added))
    if not options:
        return [[] for _ in commands]
    taken = _in_another_process(_taken, [list(words) for words in commands], options)
    return [[word for option in mine for word in option] for mine in taken]


def _options(words: Sequence[str]) -> Iterator[Words]:
    """Yield the words of each option: its flag, and the values that follow."""
    option: Words = []
    for word in words:
        if re.match(r"--?[A-Za-z]", word) and option:
            yield option
            option = []
        option.append(word)
    if option:
        yield option


def _taken(commands: list[Words], options: list[Words]) -> list[list[Words]]:
    fits = [number for number, words in enumerate(commands) if words[0] == "fit"]
    others = [number for number in range(len(commands)) if number not in fits]
    stages = _Stages(commands)
    for number in fits:
        if stages.refusal(number, options) is None:  # most take all, and to parse takes a second
            stages.taken[number] = list(options)
        else:
            stages.add_taken(number, options)
    left = [option for option in options if not stages.is_taken(option)]
    for number in others:
        stages.add_taken(number, left)
    for option in left:
        if not stages.is_taken(option):
            found = stages.refusals[" ".join(option)]
            reason = next((error for error in found if "nearest" in str(error)), found[0])
            raise UserError(f"No stage takes {' '.join(option)}: {reason}") from reason
    return stages.taken


class _Stages:
    """The options that each command was found to take, and why others were refused."""

    def __init__(self, commands: list[Words]) -> None:
        self.commands = commands
        self.taken: list[list[Words]] = [[] for _ in commands]
        self.refusals: dict[str, list[UserError]] = {}
        self._parse_fit = _fit_parser()

    def refusal(self, number: int, options: list[Words]) -> UserError | None:
        """Return why a command does not take some options, ``None`` if it does."""
        words = [*self.commands[number], *(word for option in options for word in option)]
        try:
            self._parse_fit(words) if words[0] == "fit" else parse_function(words[0], words[1:])
        except UserError as error:
            return error
        return None

    def add_taken(self, number: int, options: list[Words]) -> None:
        """Add those of some options that a command takes."""
        for option in options:
            error = self.refusal(number, [*self.taken[number], option])
            if error is None:
                self.taken[number].append(option)
            else:
                self.refusals.setdefault(" ".join(option), []).append(error)

    def is_taken(self, option: Words) -> bool:
        """Return whether a command takes an option."""
        return any(option in taken for taken in self.taken)


class _ParserIsBuilt(Exception):  # noqa: N818 - not an error
    """Ends LightningCLI's constructor once it has a parser."""


def _fit_parser() -> Callable[[Words], None]:
    from kd_lightning.cli.arguments import expand_arguments
    from kd_lightning.cli.lightning_cli import CommandLine
    from kd_lightning.cli.network_arguments import write_networks
    from kd_lightning.cli.parse_errors import explain_parse_errors

    class Parser(CommandLine):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _ParserIsBuilt(parser, self.parsers)

    try:
        Parser()
    except _ParserIsBuilt as built:
        parser, parsers = built.args

    def parse(words: Words) -> None:
        if "--trust" in words:
            raise UserError("fit takes no --trust.")
        expanded = write_networks(list(expand_arguments(words)), lambda: _SOME_CLASSES)
        with explain_parse_errors(parsers):
            parser.parse_args(expanded)

    return parse


def _in_another_process(function: Callable[..., Any], *arguments: Any) -> Any:
    forks = "fork" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if forks else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        result = UserError("The options could not be checked; run a stage by itself to see why.")
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        sender.send(function(*arguments))
    except UserError as error:
        sender.send(UserError(str(error)))
