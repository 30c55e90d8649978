"""Tokenizer files for tests: Mistral's own, from mistral-common's wheel, and small ones made here."""

import json
import shutil
from pathlib import Path
from typing import Any

import mistral_common
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""A template that takes messages as they are."""

TRIMMING = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'system' %}\n"
    "        {{- raise_exception('no system prompts here') }}\n"
    "    {% endif %}\n"
    "    {{- '### ' + message['role'] + '\\n' + message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}### assistant\n{% endif %}"
)
"""A template with control tokens by variable, which trims messages and refuses a system prompt."""

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "user assistant system ### im_start im_end INST hello world 0123456789",
    "Größe, naïve, 東京 and 😀 are not ASCII.  Two  spaces,\n\nnew lines\tand tabs.",
] * 4


def official_file(name: str) -> Path:
    """One of the tokenizer files in mistral-common's wheel, such as tekken_240718.json."""
    (found,) = Path(mistral_common.__file__).parent.rglob(name)
    return found


def mistral_directory(directory: Path, source: str | Path, name: str) -> Path:
    """A directory with one of Mistral's tokenizer files in it, called `name`."""
    directory.mkdir(parents=True)
    shutil.copy(source if isinstance(source, Path) else official_file(source), directory / name)
    return directory


def write_config(directory: Path, **values: Any) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return directory


def byte_level_directory(directory: Path, template: str | None = CHATML) -> Path:
    """GPT-2's kind of tokenizer. `<|im_start|>` is an added token that nobody called special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", AddedToken("<|im_end|>", rstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<|im_start|>", normalized=False), "<think>", "assistant", "    "])
    return _save(tokenizer, directory, template, bos_token="<|endoftext|>", eos_token="<|im_end|>")


def sentencepiece_directory(
    directory: Path, template: str | None = TRIMMING, *, metaspace: bool = False
) -> Path:
    """SentencePiece as `tokenizers` writes it: the older way with a normalizer, or with a Metaspace."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    replace = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence(
        [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS[:1] * 4 + CORPUS[1:2] * 4, trainer)
    # The trainer marks the byte tokens as special; they are ordinary pieces.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _save(tokenizer, directory, template, bos_token="<s>", eos_token={"content": "</s>"})


def _save(tokenizer: Tokenizer, directory: Path, template: str | None, **config: Any) -> Path:
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return write_config(directory, **config, **({"chat_template": template} if template else {}))
