"""A tokenizer's entries in a GGUF file, from a tokenizer.json.

llama.cpp has the rules that split text into words in its code and chooses them by name
(`tokenizer.ggml.pre`). A tokenizer can be written only if its rules are listed here.

Special tokens are not read by `gguf.SpecialVocab`: it takes ids from config.json that the tokenizer
does not have, and guesses from templates whether BOS and EOS are added; here a text is tokenized.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType
from transformers import AutoTokenizer

from bonsai_fast.checkpoints.saved_model import SavedModel
from bonsai_fast.export.gguf.write import Fields, array, flag, number, text

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
# the rules of a pre-tokenizer, as `_rules` lists them -> llama.cpp's name for them
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("gpt2",): "gpt-2",
    ("digits", "gpt2"): "smollm",
    (rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",): "llama-bpe",
    (rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}",): "qwen2",
    (
        rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "tekken",
}
WHAT_TO_DO = "give the dense model's GGUF with --gguf-parent: its tokenizer is then copied"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def tokenizer_fields(model: SavedModel) -> Fields:
    """The entries for a model directory's tokenizer.

    Raises:
        ValueError: there is none, or llama.cpp has no tokenizer with its rules.
    """
    path = model.directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{model.directory} holds no tokenizer.json; {WHAT_TO_DO}")
    data = json.loads(path.read_text(encoding="utf-8"))
    kind = data["model"]["type"]
    if kind != "BPE":
        raise ValueError(f"{path} holds a {kind} model, only BPE is exported to GGUF; {WHAT_TO_DO}")
    size = int(model.config.vocab_size)
    if data["model"].get("byte_fallback"):
        fields = _sentencepiece(data, size)
    else:
        fields = _byte_level(data, size, path)
    return fields | _special(model.directory, fields["tokenizer.ggml.tokens"].value)


def _byte_level(data: dict[str, Any], size: int, path: Path) -> Fields:
    rules = tuple(_rules(data["pre_tokenizer"], path))
    if rules not in PRE_TOKENIZERS:
        raise ValueError(
            f"{path}: llama.cpp has no name for a pre-tokenizer like {list(rules)}; {WHAT_TO_DO}"
        )
    # llama.cpp needs at least one; this one never applies, no text is split into such parts
    merges = [_merge(merge) for merge in data["model"]["merges"]] or ["[none] [none]"]
    tokens, types = _vocabulary(data, size, TokenType.NORMAL)
    return {
        "tokenizer.ggml.model": text("gpt2"),
        "tokenizer.ggml.pre": text(PRE_TOKENIZERS[rules]),
        **_token_fields(tokens, types),
        "tokenizer.ggml.merges": array(merges, GGUFValueType.STRING),
        "tokenizer.ggml.add_space_prefix": flag(False),
    }


def _sentencepiece(data: dict[str, Any], size: int) -> Fields:
    """A BPE from SentencePiece: llama.cpp merges by score, which is minus the merge's rank."""
    tokens, types = _vocabulary(data, size, TokenType.NORMAL)
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(data["model"]["merges"]):
        ranks.setdefault(_merge(merge).replace(" ", "", 1), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    for token, identifier in data["model"]["vocab"].items():
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[identifier] = TokenType.BYTE
    return {
        "tokenizer.ggml.model": text("llama"),
        "tokenizer.ggml.pre": text("default"),
        **_token_fields(tokens, types),
        "tokenizer.ggml.scores": array(scores, GGUFValueType.FLOAT32),
        "tokenizer.ggml.add_space_prefix": flag(_prefixes_space(data)),
    }


def _vocabulary(
    data: dict[str, Any], size: int, default: TokenType
) -> tuple[list[str], list[TokenType]]:
    """A token for every row of the embeddings; rows that the tokenizer lacks get unused ones."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [TokenType.UNUSED] * size
    known = {identifier: (token, default) for token, identifier in data["model"]["vocab"].items()}
    for added in data.get("added_tokens", ()):
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        known[added["id"]] = (added["content"], kind)
    if known and max(known) >= size:
        raise ValueError(
            f"expected token ids below {size}, the number of embeddings; the tokenizer has token "
            f"{max(known)}"
        )
    for identifier, (token, kind) in known.items():
        tokens[identifier], types[identifier] = token, kind
    return tokens, types


def _token_fields(tokens: list[str], types: list[TokenType]) -> Fields:
    return {
        "tokenizer.ggml.tokens": array(tokens, GGUFValueType.STRING),
        "tokenizer.ggml.token_type": array([int(kind) for kind in types], GGUFValueType.INT32),
    }


def _special(directory: Path, tokens: list[str]) -> Fields:
    """Ids of the special tokens, whether BOS and EOS are added to a text, and the chat template.

    Only tokens in tokenizer.json count: transformers may add some that the model never saw.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    fields: Fields = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        identifier = getattr(tokenizer, f"{name}_token_id")
        token = getattr(tokenizer, f"{name}_token")
        if token in tokens and tokens[identifier] == token:
            fields[f"tokenizer.ggml.{key}_token_id"] = number(identifier)
    ids = tokenizer("a").input_ids
    for name, position in (("bos", 0), ("eos", -1)):
        identifier = getattr(tokenizer, f"{name}_token_id")
        added = identifier is not None and bool(ids) and ids[position] == identifier
        fields[f"tokenizer.ggml.add_{name}_token"] = flag(added)
    template = tokenizer.chat_template
    if isinstance(template, str) and template:
        fields["tokenizer.chat_template"] = text(template)
    return fields


def _merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _rules(pre_tokenizer: dict[str, Any] | None, path: Path) -> Iterator[str]:
    """The steps of a pre-tokenizer: "gpt2", "digits", or the regular expression of a split."""
    kind = (pre_tokenizer or {}).get("type")
    if kind == "Sequence":
        assert pre_tokenizer is not None
        for step in pre_tokenizer["pretokenizers"]:
            yield from _rules(step, path)
    elif kind == "ByteLevel":
        assert pre_tokenizer is not None
        if pre_tokenizer.get("add_prefix_space"):
            yield "prefix space"
        if pre_tokenizer.get("use_regex", True):
            yield "gpt2"
    elif kind == "Digits":
        assert pre_tokenizer is not None
        yield "digits" if pre_tokenizer.get("individual_digits") else "numbers"
    elif kind == "Split":
        assert pre_tokenizer is not None
        pattern = pre_tokenizer["pattern"]
        yield pattern.get("Regex") or pattern.get("String") or "nothing"
    else:
        yield str(kind)


def _prefixes_space(data: dict[str, Any]) -> bool:
    """Whether the normalizer or the pre-tokenizer adds a space before a text."""
    steps = [data.get("normalizer") or {}, data.get("pre_tokenizer") or {}]
    steps += steps[0].get("normalizers", [])
    return any(
        (step.get("type") == "Prepend" and step.get("prepend") == SPACE)
        or (step.get("type") == "Metaspace" and step.get("prepend_scheme") in ("always", "first"))
        for step in steps
    )
