"""The tokenizer that is in a GGUF file: byte-level BPE, as GPT-2's."""

import json
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
)
from tokenizers import pre_tokenizers as splitting

from llama_config import Config

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
# Where words end before merging. Contractions, words with a leading space or mark,
# numbers of up to so many digits, marks, line ends and other space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = {"llama-bpe", "llama3", "llama-v3"}
KNOWN = {"smollm", "gpt-2", "qwen2", *LLAMA3}  # of tokenizer.ggml.pre


class TokenizerFields(NamedTuple):
    """A file's tokenizer."""

    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[tuple[str, str]]
    special: dict[str, str]  # bos, eos, unknown, padding: their texts
    add_bos: bool
    add_eos: bool

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "TokenizerFields":
        """From the file's fields; ValueError for a tokenizer that is not known."""
        prefix = "tokenizer.ggml."
        found = {
            name.removeprefix(prefix): value
            for name, value in fields.items()
            if name.startswith(prefix)
        }
        for name in ("model", "tokens", "merges", "pre"):
            if name == "merges" and found["model"] != "gpt2":
                raise ValueError(
                    f"{prefix}model must be 'gpt2' (byte-level BPE), got "
                    f"{found['model']!r}; load the model's Hugging Face folder"
                )
            if name not in found:
                raise ValueError(f"there is no {prefix}{name}")
        if found["pre"] not in KNOWN:
            known = ", ".join(sorted(KNOWN))
            raise ValueError(f"{prefix}pre must be one of {known}, got {found['pre']!r}")
        tokens = list(found["tokens"])
        kinds = list(found.get("token_type", [1] * len(tokens)))
        if len(kinds) != len(tokens):
            raise ValueError(
                f"{prefix}token_type has {len(kinds)} kinds of {len(tokens)} tokens"
            )
        return cls(
            found["pre"],
            tokens,
            kinds,
            [_pair(merge) for merge in found["merges"]],
            _special(found, tokens),
            bool(found.get("add_bos_token", found["pre"] in LLAMA3)),
            bool(found.get("add_eos_token", False)),
        )


def build_tokenizer(fields: TokenizerFields) -> Tokenizer:
    """The tokenizer whose numbers are the file's."""
    vocab = {token: number for number, token in enumerate(fields.tokens)}
    _check_merges(fields.merges, vocab)
    ignore = fields.pre in LLAMA3
    tokenizer = Tokenizer(models.BPE(vocab, fields.merges, ignore_merges=ignore))
    if fields.pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting.Sequence(_splits(fields.pre))
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        tokenizer.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, its in zip(fields.tokens, fields.kinds, strict=True)
                if its == kind
            ]
        )
    if fields.add_bos or fields.add_eos:
        tokenizer.post_processor = _ends(fields, vocab)
    return tokenizer


def tokenizer_config(
    fields: TokenizerFields, found: dict[str, Any], config: Config
) -> bytes:
    """A tokenizer_config.json for transformers, with the file's chat templates."""
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position,
    }
    for name, text in fields.special.items():
        settings[f"{names[name]}_token"] = text
    prefix = "tokenizer.chat_template"
    default = found.get(prefix)
    named = {
        name.removeprefix(f"{prefix}."): template
        for name, template in found.items()
        if name.startswith(f"{prefix}.")
    }
    if named:
        every = {"default": default, **named} if default else named
        settings["chat_template"] = [
            {"name": name, "template": template} for name, template in every.items()
        ]
    elif default:
        settings["chat_template"] = default
    return json.dumps(settings, indent=2, ensure_ascii=False).encode()


def _splits(pre: str) -> list[splitting.PreTokenizer]:
    if pre == "gpt-2":
        return [splitting.ByteLevel(add_prefix_space=False)]
    if pre == "smollm":
        digits = splitting.Digits(individual_digits=True)
        return [digits, splitting.ByteLevel(add_prefix_space=False)]
    words = Regex(WORDS % ("1" if pre == "qwen2" else "1,3"))
    return [
        splitting.Split(words, "isolated"),
        splitting.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


def _ends(fields: TokenizerFields, vocab: dict[str, int]) -> processors.PostProcessor:
    """Puts the first token before a text and the last behind it, where the file asks."""
    for name, wanted in (("bos", fields.add_bos), ("eos", fields.add_eos)):
        if wanted and name not in fields.special:
            raise ValueError(f"tokenizer.ggml.add_{name}_token is true without a token")
    first = [fields.special["bos"]] if fields.add_bos else []
    last = [fields.special["eos"]] if fields.add_eos else []
    second = [f"{x}:1" for x in (*first, "$B", *last)]
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *second],
        special_tokens=[(text, vocab[text]) for text in dict.fromkeys((*first, *last))],
    )


def _pair(merge: str) -> tuple[str, str]:
    first, space, second = merge.partition(" ")
    if not (first and space and second):
        raise ValueError(f"tokenizer.ggml.merges: {merge!r} is no pair")
    return first, second


def _check_merges(merges: list[tuple[str, str]], vocab: dict[str, int]) -> None:
    for first, second in merges:
        if not {first, second, first + second} <= vocab.keys():
            raise ValueError(
                f"tokenizer.ggml.merges: {first!r} and {second!r} are not all in tokens"
            )


def _special(found: dict[str, Any], tokens: list[str]) -> dict[str, str]:
    special = {}
    for name in ("bos", "eos", "unknown", "padding"):
        number = found.get(f"{name}_token_id")
        if number is None:
            continue
        if number >= len(tokens):
            raise ValueError(f"tokenizer.ggml.{name}_token_id {number} is no token")
        special[name] = tokens[number]
    return special
