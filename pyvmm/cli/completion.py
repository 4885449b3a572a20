"""Print the code that makes a shell complete pyvmm's commands, options, machines and images.

Examples:
  pyvmm completion bash >>~/.bashrc
  pyvmm completion zsh >~/.zfunc/_pyvmm
  pyvmm completion fish >~/.config/fish/completions/pyvmm.fish

The directory for zsh is one of $fpath, before compinit in ~/.zshrc. For the present shell only, use
eval "$(pyvmm completion bash)", the same with zsh, or pyvmm completion fish | source.

Exit status: 0, 2 no such shell.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument(
        "shell", choices=("bash", "zsh", "fish"), help="the shell to print code for"
    )


def run(args: argparse.Namespace) -> int:
    """Print the code."""
    from argcomplete.shell_integration import shellcode

    print(shellcode(["pyvmm"], shell=args.shell).strip())
    return 0
