"""The program `mistral`, also `mistral-cli` and `python -m mistralcli`."""

import os
import signal
import sys


def main() -> None:
    """Run the command line; Ctrl-C during start-up ends the process as it does later."""
    try:
        from mistralcli.cli.app import main as run_app
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    else:
        sys.exit(run_app())


if __name__ == "__main__":
    main()
