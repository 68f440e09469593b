"""Tokenizers that write the same text in other ids than the tiny one, and models that speak them."""

from __future__ import annotations

import itertools
import string
from functools import cache

from tiny import EOS, VOCAB, WINDOW, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rasd_integrations.drafters.model import ModelDrafter
from rasd_integrations.drafters.papers.translated import TranslatedDrafter, Translation
from rasd_integrations.drafters.papers.vocabulary import Vocabulary
from rasd_integrations.engine.target import TargetModel

PAIRS = [(a, b) for a, b in itertools.product(string.ascii_lowercase, repeat=2) if a < b]
_MARK = "\u2581"


def _fast(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
        **special,
    )


def shuffled() -> PreTrainedTokenizerFast:
    """Return one id a byte like the tiny tokenizer, each under another number."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    return _byte_level(["</s>", *alphabet], [])


def merged() -> PreTrainedTokenizerFast:
    """Return GPT-2's kind: every byte, and the pairs of letters in order."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    return _byte_level(["</s>", *alphabet, *map("".join, PAIRS)], PAIRS)


def _byte_level(tokens: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _fast(backend, eos_token="</s>")


def gemma() -> PreTrainedTokenizerFast:
    """Return Gemma's kind: sentencepiece with byte fallback."""
    return _sentencepiece([])


def llama() -> PreTrainedTokenizerFast:
    """Return Llama-2's kind: the same, with a space written before every text."""
    return _sentencepiece([normalizers.Prepend(_MARK)])


def _sentencepiece(before: list[normalizers.Normalizer]) -> PreTrainedTokenizerFast:
    merges = [*PAIRS, *((_MARK, a) for a in string.ascii_lowercase), (_MARK, _MARK)]
    tokens = ["<unk>", "</s>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), _MARK]
    tokens += list(map(chr, range(33, 127))) + ["".join(pair) for pair in merges]
    backend = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", _MARK)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {"shuffled": shuffled, "merged": merged, "gemma": gemma, "llama": llama}


def model_of(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> PreTrainedModel:
    """Return a random Llama with a row for each token, and some of padding."""
    eos = tokenizer.eos_token_id
    return tiny_llama(seed, vocab_size=len(tokenizer) + 5, eos_token_id=eos)


def plain_speaker(seed: int = 0) -> PreTrainedModel:
    """Return a random Llama of the tiny tokenizer that, greedy, says ASCII only."""
    model = tiny_llama(seed)
    ascii_ids = {i for token, i in tiny_tokenizer().get_vocab().items() if token in _VISIBLE}
    model.lm_head.weight[[i for i in range(VOCAB) if i not in ascii_ids]] = 0
    return model


_VISIBLE = frozenset(string.ascii_letters + string.digits + string.punctuation)


def renumbered(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the tiny tokenizer as a model of the shuffled one: the same distributions."""
    old, new = tiny_tokenizer().get_vocab(), shuffled().get_vocab()
    tokens = [token for token in new if token != "</s>"]
    twin = tiny_llama(vocab_size=len(new), eos_token_id=new["</s>"])
    source, place = [old[t] for t in tokens], [new[t] for t in tokens]
    kept = {k: v for k, v in model.state_dict().items() if "embed" not in k and "lm_head" not in k}
    twin.load_state_dict(kept, strict=False)
    for mine, theirs in (
        (twin.model.embed_tokens.weight, model.model.embed_tokens.weight),
        (twin.lm_head.weight, model.lm_head.weight),
    ):
        mine[place] = theirs[source]
        mine[new["</s>"]] = theirs[old["<|endoftext|>"]]
    return twin.requires_grad_(requires_grad=False)


def ids_of(text: str) -> list[int]:
    """Return the tiny tokenizer's ids."""
    return tiny_tokenizer().encode(text)


@cache
def vocabulary(kind: str, padding: int = 5) -> Vocabulary:
    tokenizer = tiny_tokenizer() if kind == "tiny" else KINDS[kind]()
    return Vocabulary(tokenizer, kind, len(tokenizer) + (padding if kind != "tiny" else 0))


def translated_drafter(kind="merged", model=None, confidence=0.0, cache=None):
    """Return a drafter with the tokenizer ``kind`` for the tiny tokenizer's model, and its model."""
    drafter = TargetModel(model or model_of(KINDS[kind](), seed=1))
    padding = drafter.vocab_size - len(KINDS[kind]())
    translation = Translation(
        vocabulary("tiny"),
        vocabulary(kind, padding),
        target_ends={EOS},
        drafter_ends=drafter.eos_ids,
    )
    options = {"confidence": confidence, "prefix_cache": cache}
    return TranslatedDrafter(
        translation,
        ModelDrafter(drafter, **options),
        ModelDrafter(drafter, allowed=translation.allowed, **options),
    )
