"""A trained model as a Hugging Face checkpoint: what `mistral quantize` and transformers read.

    export(model, TOKENIZER, DIRECTORY)      called by training.train when it is done

writes the weights in bf16 in two shards (so that the committed files stay small), config.json,
generation_config.json, and the tokenizer twice: as tokenizer.model, which `mistral` reads, and as tokenizer.json with
Mistral's v3 chat template, which transformers reads. Both give the same ids.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import save_file

from training.model import Demo

N_SHARDS = 2
SPACE = "▁"
TEMPERATURE = 0.7
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant messages must take turns, the user first') }}
    {%- elif message['role'] == 'user' %}
        {{- '[INST]' + (system if loop.last else '') + message['content'] + '[/INST]' }}
    {%- else %}
        {{- message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
"""Mistral's v3 format. Spaces come from the tokenizer, which begins every text with one."""


def export(model: Demo, tokenizer: Path, directory: Path) -> None:
    """Write the model with its tokenizer (a SentencePiece file) into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(model, directory)
    write_json(directory / "config.json", model.config.hugging_face())
    write_json(directory / "generation_config.json", generation_config())
    write_tokenizer(tokenizer, directory)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_weights(model: Demo, directory: Path) -> None:
    """The weights in bf16, in N_SHARDS files of the names in order, and their index."""
    state = {
        f"model.{name}": weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_halves(state), 1):
        file = f"model-{number:05}-of-{N_SHARDS:05}.safetensors"
        save_file({name: state[name] for name in names}, directory / file, {"format": "pt"})
        (directory / file).chmod(0o644)  # save_file lets only the owner read, and the files go into a package
        weight_map |= dict.fromkeys(names, file)
    size = sum(weight.nbytes for weight in state.values())
    write_json(
        directory / "model.safetensors.index.json",
        {"metadata": {"total_size": size}, "weight_map": weight_map},
    )


def _halves(state: dict[str, torch.Tensor]) -> list[list[str]]:
    """The names in order, in N_SHARDS lists of about the same number of bytes."""
    total, so_far = sum(weight.nbytes for weight in state.values()), 0
    parts: list[list[str]] = [[] for _ in range(N_SHARDS)]
    for name in sorted(state):
        parts[so_far * N_SHARDS // total].append(name)
        so_far += state[name].nbytes
    return parts


def generation_config() -> dict[str, Any]:
    return {"bos_token_id": 1, "eos_token_id": 2, "do_sample": True, "temperature": TEMPERATURE}


def write_tokenizer(tokenizer: Path, directory: Path) -> None:
    """tokenizer.model as it is; tokenizer.json and tokenizer_config.json made from it."""
    shutil.copyfile(tokenizer, directory / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    compact = json.dumps(tokenizer_json(processor), ensure_ascii=False, separators=(",", ":"))
    (directory / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(directory / "tokenizer_config.json", config)


def tokenizer_json(processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    """The SentencePiece BPE model in the format of the `tokenizers` library."""
    n_pieces = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(n_pieces)]
    special = [i for i in range(n_pieces) if processor.is_control(i) or processor.is_unknown(i)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(i, pieces[i]) for i in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _begins_with("<s>", processor.bos_id()),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(pair) for pair in merges(processor, pieces)],
        },
    }


def merges(processor: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> Iterator[tuple[str, str]]:
    """Every pair of pieces that joins to a piece, the pieces that SentencePiece joins first at the front."""
    ids = {piece: i for i, piece in enumerate(pieces) if not processor.is_byte(i)}
    for piece in sorted(ids, key=lambda piece: (-processor.get_score(ids[piece]), ids[piece])):
        splits = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
        known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
        yield from sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _added_token(token_id: int, piece: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": piece, **flags, "special": True}


def _begins_with(piece: str, token_id: int) -> dict[str, Any]:
    """A post-processor that puts one special token before a text."""
    special, text = {"SpecialToken": {"id": piece, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text, other],
        "special_tokens": {piece: {"id": piece, "ids": [token_id], "tokens": [piece]}},
    }
