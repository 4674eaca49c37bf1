"""Examples of every command, shown below its help; a test parses each of them."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Iterator

EXAMPLES: dict[str, tuple[str, ...]] = {
    "serve": (
        "xeray serve",
        "xeray serve arc --port 9000 --set engine.max_num_seqs=8",
        "xeray serve --model ~/models/DeepSeek-R1-Distill-Qwen-7B-Q4_0.gguf",
    ),
    "chat": (
        "xeray chat",
        "xeray chat 'What is the capital of France?' --temperature 0 --stats",
        "xeray chat --url http://ws1:8000 < questions.txt",
    ),
    "config validate": ("xeray config validate configs/arc.yaml",),
    "config schema": ("xeray config schema > schema.json",),
    "config show": ("xeray config show local --set engine.max_num_seqs=8",),
    "config list": ("xeray config list",),
    "config env": ("xeray config env --json",),
    "plan": (
        "xeray plan --model deepseek-r1-distill-qwen-7b --device xpu --memory 16GiB",
        "xeray plan --devices",
        "xeray plan --model ~/models/qwen2.5-7b --on a770 --write my.yaml",
    ),
    "rollout start": ("xeray rollout start new.yaml --steps 5,25,50 --step-s 300",),
    "rollout status": ("xeray rollout status --json",),
    "rollout promote": ("xeray rollout promote",),
    "rollout rollback": ("xeray rollout rollback --app xeray",),
    "keys new": ("xeray keys new alice --scope inference --file keys.yaml",),
    "keys check": ("xeray keys check keys.yaml",),
    "doctor": ("xeray doctor --quick", "xeray doctor --bundle support.tar.gz"),
    "doctor explain": (
        "xeray doctor explain CL_INVALID_MEM_OBJECT",
        "xeray doctor explain guides",
    ),
    "exporter": ("xeray exporter --host 0.0.0.0 --port 9410",),
    "monitor": ("xeray monitor --target ws1:8000 --inventory inventory.yaml",),
    "cluster up": ("xeray cluster up -i inventory.yaml", "xeray cluster up ws2 ws3"),
    "cluster down": ("xeray cluster down ws2 --drain 60",),
    "cluster status": ("xeray cluster status --json",),
    "cluster add": ("xeray cluster add 192.0.2.7 --name ws4 --user ray",),
    "cluster remove": ("xeray cluster remove ws4 --drain 120",),
    "cluster exec": ("xeray cluster exec --on ws2 -- xeray doctor --quick",),
    "cluster render": ("xeray cluster render systemd -o units",),
    "cluster probe": ("xeray cluster probe",),
    "energy": ("xeray energy", "sudo xeray energy --limit power --levels 1 0.8 0.6 --apply"),
    "profile": ("xeray profile --steps 50 --streams 4 --output trace.json",),
    "completion": ("xeray completion bash",),
    "selftest": ("xeray selftest --device xpu --output report",),
    "bench": ("xeray bench", "xeray bench serve --help"),
    "bench all": ("xeray bench all",),
    "bench engine": ("xeray bench engine",),
    "bench serve": ("xeray bench serve --url http://127.0.0.1:8000 --concurrency 1 8",),
    "bench decode": ("xeray bench decode",),
    "bench overhead": ("xeray bench overhead",),
    "bench preprocess": ("xeray bench preprocess",),
    "bench peers": ("xeray bench peers",),
    "bench compare": ("xeray bench compare --devices cpu xpu",),
    "bench speculative": ("xeray bench speculative --workload copy extract",),
    "bench overload": ("xeray bench overload --factor 2 --duration 60",),
    "bench soak": ("xeray bench soak --minutes 60",),
    "bench isa": ("xeray bench isa",),
    "bench baseline record": ("xeray bench baseline record",),
    "bench baseline check": ("xeray bench baseline check",),
    "quantize": ("xeray quantize ~/models/qwen2.5-7b --output ~/models/qwen2.5-7b-int4",),
    "eval": ("xeray eval ~/models/qwen2.5-7b-int4 --against ~/models/qwen2.5-7b",),
}
"""Path of a command → what one types, the plainest first."""


class HelpFormatter(argparse.HelpFormatter):
    """Keeps lines that begin with a space as they are; fills the paragraphs between them."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for is_kept, group in itertools.groupby(text.splitlines(), _is_kept):
            if is_kept:
                lines += group
            else:
                lines += textwrap.wrap(" ".join(group), width)
        return textwrap.indent("\n".join(lines), indent)


def _is_kept(line: str) -> bool:
    return not line or line.startswith(" ")


def add_examples(parser: argparse.ArgumentParser, path: str) -> None:
    """Put the examples of `path` and of the commands below it under their help."""
    parser.formatter_class = HelpFormatter
    examples = EXAMPLES.get(path, ())
    if examples:
        shown = "\n".join(f"  {example}" for example in examples)
        title = "example:" if len(examples) == 1 else "examples:"
        before = f"{parser.epilog}\n\n" if parser.epilog else ""
        parser.epilog = f"{before}{title}\n{shown}"
    for name, below, text in listed_commands(parser):
        below.description = below.description or f"{text}."
        add_examples(below, f"{path} {name}")


def listed_commands(
    parser: argparse.ArgumentParser,
) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    """Yield name, parser and help of each command below `parser` that its help lists."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for choice in action._choices_actions:
                yield choice.dest, action.choices[choice.dest], choice.help or ""
