"""`mistral pull`: a model from the Hugging Face Hub; its directory goes to stdout."""

from typing import Annotated

import typer

from mistralcli.cli import console


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL[@REVISION]", help="A Hub id such as OWNER/NAME.")],
    token: Annotated[
        str | None,
        typer.Option("--token", help="A token of the Hub (default: HF_TOKEN, else that of `hf auth login`)."),
    ] = None,
) -> None:
    """Download a model from the Hugging Face Hub and print where it is.

    One copy of the weights is taken, into the Hub's shared cache. What is here already is only checked.
    """
    from mistralcli.hub_errors import hub_endpoint

    hub_endpoint()  # with some bad addresses huggingface_hub cannot even be imported
    from mistralcli import hub

    with console.progress(f"pulling {model}") as update:
        directory = hub.pull(model, token=token, on_progress=update)
    console.write_out(f"{directory}\n")
