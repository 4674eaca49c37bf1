"""`xeray completion`: a shell's completion script, made from the parsers themselves."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from serve_app.cli.examples import listed_commands

SHELLS = ("bash", "zsh", "fish")
_HOW = {
    "bash": 'eval "$(xeray completion bash)"    # in ~/.bashrc',
    "zsh": 'eval "$(xeray completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": "xeray completion fish > ~/.config/fish/completions/xeray.fish",
}


@dataclass(frozen=True, slots=True)
class Option:
    """An option: its spellings, the values it takes (none: a switch, or any value), its help."""

    flags: tuple[str, ...]
    choices: tuple[str, ...] = ()
    takes_value: bool = False
    help: str = ""


@dataclass(slots=True)
class Node:
    """A command and what may follow it; `path` are the words that lead here, `xeray` left out."""

    path: tuple[str, ...]
    help: str = ""
    options: list[Option] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    commands: dict[str, Node] = field(default_factory=dict)

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        yield self
        for node in self.commands.values():
            yield from node.walk()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `xeray completion`."""
    parser.add_argument("shell", choices=SHELLS, help="whose script to print")
    parser.add_argument("--json", action="store_true", help="print what may follow what instead")
    lines = [f"  {shell:<5} {how}" for shell, how in _HOW.items()]
    parser.epilog = "\n".join(["use it:", *lines])
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the script."""
    tree = command_tree()
    if options.json:
        table = {" ".join(("xeray", *node.path)): _words(node) for node in tree.walk()}
        print(json.dumps(table, indent=2))
        return 0
    print({"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[options.shell](tree))
    return 0


def command_tree() -> Node:
    """Every command of `xeray` with its options, read from the parsers."""
    from serve_app.cli.main import COMMANDS, build_parser

    root = read_parser(build_parser())
    for name, command in COMMANDS.items():
        node = read_parser(build_parser(name)).commands[name]
        node.help = command.help
        root.commands[name] = node
    return root


def read_parser(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Node:
    """A parser and its subparsers as nodes; what is hidden from the help is left out."""
    node = Node(path, parser.description or "")
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.help == argparse.SUPPRESS:
            continue
        if action.option_strings:
            node.options.append(
                Option(
                    tuple(action.option_strings),
                    tuple(map(str, action.choices or ())),
                    action.nargs != 0,
                    (action.help or "").replace("%(default)s", str(action.default)),
                )
            )
        else:
            node.words += map(str, action.choices or ())
    for name, below, text in listed_commands(parser):
        node.commands[name] = read_parser(below, (*path, name))
        node.commands[name].help = text
    return node


def _words(node: Node) -> list[str]:
    flags = [flag for option in node.options for flag in option.flags]
    return [*node.commands, *node.words, *flags]


def _bash_cases(tree: Node) -> tuple[list[str], list[str], list[str]]:
    """What may follow each command, the choices of each option, and who takes a value."""
    follow, values, takes = [], [], []
    for node in tree.walk():
        path = " ".join(node.path)
        words = " ".join(_words(node))
        follow.append(f"    {shlex.quote(path)}) words={shlex.quote(words)} ;;")
        for option in node.options:
            if not option.takes_value:
                continue
            for flag in option.flags:
                key = shlex.quote(f"{path}|{flag}")
                takes.append(f"    {key}) return 0 ;;")
                if option.choices:
                    offered = shlex.quote(" ".join(option.choices))
                    values.append(f"    {key}) choices={offered} ;;")
    return follow, values, takes


def bash_script(tree: Node) -> str:
    """Bash's function: it follows the words to a command, then offers what may follow there."""
    follow, values, takes = _bash_cases(tree)
    known = [shlex.quote(" ".join(node.path)) for node in tree.walk() if node.path]
    return "\n".join(
        [
            "# bash completion of xeray",
            "_xeray_takes_value() {",
            '  case "$1|$2" in',
            *takes,
            "  esac",
            "  return 1",
            "}",
            "_xeray() {",
            '  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
            '  local path="" words="" choices="" word next index',
            "  for ((index = 1; index < COMP_CWORD; index++)); do",
            '    word="${COMP_WORDS[index]}"',
            '    next="${path:+$path }$word"',
            '    case "$next" in',
            f'      {" | ".join(known)}) path="$next" ;;',
            "    esac",
            "  done",
            '  case "$path|$before" in',
            *values,
            "  esac",
            '  if [[ -n "$choices" ]]; then',
            '    mapfile -t COMPREPLY < <(compgen -W "$choices" -- "$current")',
            "    return",
            "  fi",
            '  if _xeray_takes_value "$path" "$before"; then',
            '    mapfile -t COMPREPLY < <(compgen -f -- "$current")',
            "    return",
            "  fi",
            '  case "$path" in',
            *follow,
            "  esac",
            '  mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")',
            '  if [[ ${#COMPREPLY[@]} -eq 0 && "$current" != -* ]]; then',
            '    mapfile -t COMPREPLY < <(compgen -f -- "$current")',
            "  fi",
            "}",
            "complete -o filenames -F _xeray xeray",
        ]
    )


def zsh_script(tree: Node) -> str:
    """Zsh runs bash's function through its own bashcompinit, whose arrays it understands."""
    script = bash_script(tree).replace("# bash completion", "# zsh completion", 1)
    # zsh has no mapfile; its arrays split on words anyway.
    lines = []
    for line in script.splitlines():
        if "mapfile -t COMPREPLY < <(" in line:
            head, _, command = line.partition("mapfile -t COMPREPLY < <(")
            line = f'{head}COMPREPLY=(${{(f)"$({command[:-1]})"}})'
        lines.append(line)
    return "\n".join(["autoload -U +X bashcompinit && bashcompinit", *lines])


def fish_script(tree: Node) -> str:
    """Fish's rules: one per option and command, each under the condition of its path."""
    lines = ["# fish completion of xeray", "complete -c xeray -f"]
    for node in tree.walk():
        where = _fish_condition(node)
        for name, below in node.commands.items():
            lines.append(f"complete -c xeray {where} -a {name} -d {shlex.quote(below.help)}")
        for word in node.words:
            lines.append(f"complete -c xeray {where} -a {shlex.quote(word)}")
        if not node.commands and not node.words:
            lines.append(f"complete -c xeray {where} -F")
        for option in node.options:
            names = [
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                for flag in option.flags
            ]
            rule = f"complete -c xeray {where} {' '.join(names)}"
            if option.choices:
                rule += f" -x -a {shlex.quote(' '.join(option.choices))}"
            elif option.takes_value:
                rule += " -r -F"
            lines.append(f"{rule} -d {shlex.quote(option.help)}" if option.help else rule)
    return "\n".join(lines)


def _fish_condition(node: Node) -> str:
    seen = [f"__fish_seen_subcommand_from {word}" for word in node.path]
    if node.commands:
        seen.append(f"not __fish_seen_subcommand_from {' '.join(node.commands)}")
    return f"-n {shlex.quote('; and '.join(seen))}" if seen else ""
