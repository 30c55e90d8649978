"""The program `mistral`, also `mistral-cli` and `python -m mistralcli`."""

import os
import signal
import sys


def main() -> None:
    """Run the command line. Ctrl-C just ends the process, but where `console.on_interrupt` says something else.

    A KeyboardInterrupt at any place would not do: torch, while it is imported, can swallow one.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a shell's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # torch's threads then sleep while they wait for one another. Spinning, two of them on two cores that other work
    # also wanted decoded the demo at 1.6 tokens/s, and asleep at 22.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Triton 3.9 warns that it is unset, and 3.10 would not fuse a product and a sum.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from mistralcli.cli.app import main as run_app

    sys.exit(run_app())


if __name__ == "__main__":
    main()
