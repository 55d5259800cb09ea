"""The console script `bonsai-fast`: `bonsai-fast prune ...` is `python -m bonsai_fast.prune ...`.

It is not part of the package, because importing the package imports torch and transformers: help
and mistakes in the name of a command are answered at once, before that.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version

NAME = "bonsai-fast"
COMMANDS = {
    "prune": "Make a model smaller: remove attention heads, channels, experts or single weights.",
    "compare": "Prune a model by several methods and tabulate what each costs and loses.",
    "recover": "Make a pruned model better, with its parent as the teacher.",
    "surgery": "Cut a checkpoint down to the units of a saved mask, without loading the model.",
    "export": "Convert a pruned model for llama.cpp, vLLM or plain transformers.",
    "report": "Write the HTML page of a run again.",
    "latency": "Time models side by side: prompt processing, decoding, memory.",
}
INSTALL = "--install-completion"
LINES = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
HELP = f"""Usage: {NAME} COMMAND [ARGUMENT ...] [OPTION ...]

Prune large language models with forward passes only.

Commands
{LINES}

Options
  --help                Show this page. {NAME} COMMAND --help shows the options of a command.
  --version             Show the version.
  {INSTALL}  Complete commands and options with the Tab key (bash, zsh, fish).
"""


def main(words: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    Args:
        words: of the command line, without its name; those of the process if None.
    """
    words = sys.argv[1:] if words is None else words
    first = words[0] if words else "--help"
    if first in COMMANDS:
        try:
            return int(import_module(f"bonsai_fast.{first}.__main__").main(words[1:]))
        except KeyboardInterrupt:  # while it was being imported
            return 130
    if first == INSTALL:
        return install_completion(words)
    if first in ("--help", "-h"):
        print(HELP, end="")
    elif first == "--version":
        print(version(NAME))
    else:
        near = get_close_matches(first, [*COMMANDS, INSTALL, "--help", "--version"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        print(f"error: unknown command {first}: {hint}", file=sys.stderr)
        return 2
    return 0


def install_completion(words: list[str]) -> int:
    """Install shell completion for all commands; `--shell` and `--output` say which and where."""
    from cyclopts import App, CycloptsError
    from cyclopts.completion.detect import ShellDetectionError

    app = App(name=NAME, version_flags=())
    for name in COMMANDS:
        app.command(import_module(f"bonsai_fast.{name}.__main__").COMMAND.app(list_all=True))
    app.register_install_completion_command(INSTALL)
    try:
        app(words, exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, ShellDetectionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
