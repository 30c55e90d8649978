"""The model that comes with the package, so that there is one to run before any was pulled."""

from pathlib import Path

DEMO = "demo"
"""Its name, where no other model has it."""


def demo_directory() -> Path:
    """The checkpoint in the installed package; with it is `golden.json`, which `mistral doctor` replays."""
    return Path(__file__).parent / "demo_model"
