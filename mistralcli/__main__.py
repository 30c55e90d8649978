"""The program `mistral`, also `mistral-cli` and `python -m mistralcli`."""

import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C just ends the process, but where `console.on_interrupt` says something else.

    A KeyboardInterrupt at any place would not do: torch, while it is imported, can swallow one.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a shell's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mistralcli.cli.app import main as run_app

    sys.exit(run_app())


if __name__ == "__main__":
    main()
