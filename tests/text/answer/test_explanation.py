"""What an explained answer shows: the table of terminals and the page of notebooks, of texts that are hostile."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from rasd_integrations.stats import DecodingStats, DrafterStats, Quote
from rasd_integrations.text.answer.explanation import explained
from rasd_integrations.types import StepRecord, TextDelta, ToolCallDelta

EVIL = '</div><script>alert("1")</script><img src=x onerror=alert(2)>\x1b[31m\u202e\ud800'


class Read(HTMLParser):
    """What a browser would see: tags with their attributes, and the text in each kind of tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] * (tag != "br")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1], data))


def answer_of(*steps, quotes=(), **stats):
    """Return the explanation of steps, each (sources, pieces of text, drafted, reason)."""
    records, deltas = [], []
    for sources, pieces, drafted, reason in steps:
        ids = tuple(range(len(pieces)))
        records.append(StepRecord(ids, sources, drafted, reason))
        deltas += [TextDelta(piece, (0,)) for piece in pieces]
    drafters: dict[str, DrafterStats] = {}
    for record in records:
        for name, drafted in record.drafted.items():
            of = drafters.setdefault(name, DrafterStats())
            of.drafted += drafted
            of.accepted += record.sources.count(name)
    own = DecodingStats(drafters=drafters, quotes=tuple(quotes), **stats)
    deltas[-1] = TextDelta(deltas[-1].text, (0,), "stop", own)
    return explained("".join(delta.text for delta in deltas), deltas, records)


PLAIN = ((), ("a",), {}, "no drafter")


@pytest.fixture
def hostile():
    """Return an answer in which every text that another wrote is hostile."""
    quote = Quote(1, 1 + len(EVIL), EVIL, EVIL, 3, {EVIL: EVIL})
    steps = [((EVIL,), ("<", EVIL + "b"), {EVIL: 2}, None), ((), ("c",), {}, EVIL)]
    return answer_of(*steps, quotes=[quote], faults=(EVIL,))


def test_texts_of_others_stay_text_on_the_page(hostile):
    """Answer, chunk, metadata, drafter, reason and fault bring no tag, and can be written to a file."""
    read = Read(hostile._repr_html_())
    assert read.open == []
    assert {tag for tag, _ in read.tags} <= {
        "div", "style", "span", "a", "sup", "table", "tr", "th", "td", "b", "ul", "ol", "li", "br",
    }  # fmt: skip
    names = {name for _, attributes in read.tags for name in attributes}
    assert names <= {"class", "style", "title", "href", "id"}
    assert all(re.fullmatch(r"#rasd-[0-9a-f]{8}-1", a["href"]) for t, a in read.tags if t == "a")
    shown = "".join(text for tag, text in read.texts if tag == "span")
    assert shown == hostile.text.replace("\ud800", "\ufffd")
    assert hostile._repr_html_().isascii()


def test_texts_of_others_do_not_reach_a_terminal(hostile):
    """Printable ASCII of at most 100 columns, without escape sequences."""
    for line in str(hostile).splitlines():
        assert len(line) <= 100
        assert all(" " <= c <= "~" for c in line)
    assert repr(hostile) == str(hostile)


def test_the_style_is_the_only_one_and_loads_nothing(hostile):
    """No script, no address but those on the page."""
    html = hostile._repr_html_()
    (style,) = [text for tag, text in Read(html).texts if tag == "style"]
    assert "url(" not in style
    assert "@import" not in style
    assert "://" not in html


def test_quotes_are_linked_to_their_chunks():
    """The link holds the quoted words, whatever tokens and steps they are in, and leads to chunk and source."""
    text = ["It is ", "one two", " three", " four five six", " seven."]
    one, two = (
        Quote(6, 19, "one two three", "n1", 5, {"source": "a.txt"}),
        Quote(20, 33, "four five six", "n2"),
    )
    steps = [
        (("suffix",), text[:2], {"suffix": 3}, None),
        (("answers",), text[2:4], {"answers": 1}, None),
        ((), text[4:], {}, "why"),
    ]
    html = answer_of(*steps, quotes=[one, two])._repr_html_()
    linked = re.findall(r'<a class="rasd-quote" href="#([^"]*)">(.*?)<sup>(\d)</sup></a>', html)
    words = [(re.sub("<[^>]*>", "", inner), number) for _, inner, number in linked]
    assert words == [("one two three", "1"), ("four five six", "2")]
    items = [re.search(f'<li id="{link}">(.*?)</li>', html)[1] for link, _, _ in linked]
    assert "chunk n1, at character 5. source: a.txt" in items[0]
    assert "chunk n2, at character 0" in items[1]


def test_text_is_coloured_by_its_source():
    """Each drafter has a colour of its own, also unknown ones; the target's tokens have none."""
    names = ["suffix", "answers", "one", "two"]
    answer = answer_of(*[((name,), (name, "target"), {name: 1}, None) for name in names])
    spans = re.findall(
        r'<span class="[^"]*" style="([^"]*)" title="step \d: (\w+)', answer._repr_html_()
    )
    colours = {name: style for style, name in spans}
    assert len(set(colours.values())) == len(names) + 1
    assert colours["target"] == ""


def test_steps_in_a_row_without_a_draft_share_a_line():
    """Their reason is told once, with their tokens and text; a forced text is named."""
    steps = [
        PLAIN,
        PLAIN,
        (("grammar",), ("x", "y"), {"grammar": 1}, "no drafter"),
        (("s",), ("p", "q"), {"s": 4, "t": 2}, None),
    ]
    lines = [" ".join(line.split()) for line in str(answer_of(*steps)).splitlines()]
    assert lines[1:4] == [
        "1-2 2 no drafter 'aa'",
        "3 2 grammar 1/1; no drafter 'xy'",
        "4 2 s 1/4 t 0/2 'pq'",
    ]
    assert "s 4 1 25% 17%" in lines
    assert "the target itself 67%" in lines
    assert "3 without a draft: no drafter" in lines


def test_thoughts_and_calls_are_no_text():
    """They are shown, and positions of quotes do not count them."""
    deltas = [
        TextDelta("", (1,), reasoning="Hm. "),
        TextDelta("said", (2,)),
        TextDelta("", (3,), tool_calls=(ToolCallDelta(0, "c", "add", "{}"),)),
        TextDelta("", (4,), "tool_calls", DecodingStats(quotes=(Quote(0, 4, "said", "n"),))),
    ]
    answer = explained("said", deltas, [StepRecord((1, 2, 3, 4), ("s", "s"))])
    assert [(t.text, t.reasoning, t.call) for t in answer.tokens] == [
        ("", "Hm. ", ""), ("said", "", ""), ("", "", "add{}"), ("", "", ""),
    ]  # fmt: skip
    assert ">said</span><sup>1</sup></a>" in answer._repr_html_()
    assert "'Hm. saidadd{}'" in str(answer)


def test_tokens_behind_a_stop_string_have_no_text():
    """They were committed and count, but nobody reads them."""
    last = TextDelta("a", (1,), "stop", DecodingStats())
    answer = explained("a", [TextDelta(""), last], [StepRecord((1, 2, 3), ("s", "s"))])
    assert [(t.token_id, t.source, t.text) for t in answer.tokens] == [
        (1, "s", "a"), (2, "s", ""), (3, "target", ""),
    ]  # fmt: skip
