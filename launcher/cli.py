"""The `nextpt` command line: the list of its commands."""

from __future__ import annotations

import sys
from pathlib import Path

# The checkout before installed packages: Hugging Face has a package `kernels` too, and ours must
# be imported.
ROOT = Path(__file__).resolve().parent.parent
if (ROOT / "pyproject.toml").is_file():
    sys.path.insert(0, str(ROOT))

import typer  # noqa: E402 (after sys.path)

from launcher.commands import (  # noqa: E402 (after sys.path)
    ablate,
    checkpoint,
    compress,
    config,
    coordinate_check,
    demo,
    doctor,
    evaluate,
    exchange,
    generate,
    inspect,
    kernels,
    memorization,
    plan,
    prep,
    report,
    scaling,
    slurm,
    tokenizer,
    train,
    tune,
)
from nextpt.base.encoding import ensure_utf8  # noqa: E402 (after sys.path)
from nextpt.base.errors import print_warnings_to_users  # noqa: E402 (after sys.path)

# In the order of the help text.
COMMANDS = (
    demo,
    prep,
    tokenizer,
    config,
    plan,
    coordinate_check,
    tune,
    train,
    slurm,
    checkpoint,
    report,
    evaluate,
    ablate,
    scaling,
    memorization,
    generate,
    inspect,
    compress,
    exchange,
    kernels,
    doctor,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Pretrain decoder-only language models: prepare data, train, evaluate, generate.",
)
for command in COMMANDS:
    command.register(app)


def main() -> None:
    """Run the command line; the entry point `nextpt`."""
    ensure_utf8()
    *words, last = sys.argv[1:] or [""]
    if last != "--help" or not print_help(words):
        print_warnings_to_users()
        app()


def print_help(words: list[str]) -> bool:
    """Print the help text of a command without parsing any option.

    Typer's parser imports pydantic, which takes longer than everything else in a help text.

    Args:
        words: Names of a group and its command, as on the command line; empty for `nextpt`.

    Returns:
        Whether there is such a command; otherwise nothing was printed.
    """
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="nextpt")
    for word in words:
        commands = getattr(command, "commands", {})
        if word not in commands:
            return False
        command = commands[word]
        context = typer.Context(command, info_name=word, parent=context)
    if text := command.get_help(context):
        print(text)
    return True


if __name__ == "__main__":
    main()
