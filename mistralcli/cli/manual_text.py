"""What the manual says beside the help of the commands."""

from collections.abc import Mapping

DESCRIPTION = (
    "`mistral` runs Mistral models on your own machine: it pulls a model from the Hugging Face Hub, makes a 4-bit or "
    "8-bit build of it, answers prompts in shell pipes, and chats in the terminal. It is also called `mistral-cli`.",
    "Data goes to standard output, and all that is said about it to standard error. In a pipe nothing but the data is "
    "written; on a terminal, control characters in it are shown as escapes.",
)

SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Options": {
        "--version": "Print the version and exit.",
        "--install-completion": "Let the shell that this is called from (bash, zsh or fish) complete commands, flags, "
        "models and files after this name of the program; it begins with the next shell.",
        "--show-completion": "Print what that would install.",
        "--help": "Print a help; after a command, that command's.",
    },
    "Exit status": {
        "0": "Done.",
        "1": "Failure.",
        "2": "Wrong usage.",
        "3": "There is no such model here.",
        "4": "The Hub wants a token, or an agreement to a model's terms.",
        "5": "The network failed.",
        "6": "The disk failed, or is full.",
        "7": "There is not enough memory.",
        "8": "The prompt does not fit into the context.",
        "9": "A file is not what it should be.",
        "10": "Quality: a build or an answer is not as good as was asked.",
        "130, 141": "Ended by Ctrl-C, or since nobody reads the output any more.",
    },
    "Environment": {
        "MISTRAL_CLI_MODEL": "The model when none is named.",
        "MISTRAL_CLI_NAME": "The default of the flag `--name` of `run` and `chat`, for the names that `mistral config` "
        "lists: `MISTRAL_CLI_TOP_P=0.9`.",
        "MISTRAL_CLI_KERNELS": "`reference` computes without kernels of our own: slowly.",
        "HF_TOKEN": "The token for the Hub.",
        "HF_HOME, HF_HUB_CACHE": "Where pulled models are kept.",
        "HF_ENDPOINT, HF_HUB_OFFLINE": "Another Hub, or none.",
        "OMP_NUM_THREADS": "Threads of the CPU, where `--threads` says nothing.",
        "VISUAL, EDITOR": "The editor of `chat`.",
        "NO_COLOR": "When it is not empty: no colours.",
    },
    "Files": {
        "$XDG_CONFIG_HOME/mistral/config.toml": "The user's defaults and aliases (`mistral config`, `mistral alias`).",
        ".mistral.toml": "A project's, in the working directory or above it.",
        "$XDG_DATA_HOME/mistral/models": "Builds.",
        "$XDG_DATA_HOME/mistral/sessions": "Chats, and what of their caches is worth keeping.",
        "$XDG_STATE_HOME/mistral": "When models were used, and what was typed in chats.",
    },
}
