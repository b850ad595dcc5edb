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
    parse_fit = _fit_parser()
    refusals: dict[int, list[UserError]] = {}

    def takes(number: int, chosen: list[Words], new: int | None = None) -> bool:
        words = [*commands[number], *(word for option in chosen for word in option)]
        try:
            parse_fit(words) if words[0] == "fit" else parse_function(words[0], words[1:])
        except UserError as error:
            if new is not None:
                refusals.setdefault(new, []).append(error)
            return False
        return True

    def add_taken(number: int, wanted: list[tuple[int, Words]]) -> None:
        for place, option in wanted:
            taken[number] += [option] if takes(number, [*taken[number], option], place) else []

    taken: list[list[Words]] = [[] for _ in commands]
    for number in fits:
        if takes(number, options):  # most take all, and to parse takes a second
            taken[number] = list(options)
        else:
            add_taken(number, list(enumerate(options)))
    left = [(place, option) for place, option in enumerate(options) if not any(option in taken[fit] for fit in fits)]
    for number in others:
        add_taken(number, left)
    for place, option in left:
        if not any(option in taken[number] for number in others):
            found = refusals[place]
            reason = next((error for error in found if "nearest" in str(error)), found[0])
            raise UserError(f"No stage takes {' '.join(option)}: {reason}") from reason
    return taken


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
