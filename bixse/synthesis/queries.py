"""Queries cut out of documents: the inverse cloze task, Lee et al. 2019, arXiv 1906.00300.

A sentence of a document stands for the question that the document answers. The paper draws any
sentence; ours prefers the first ones, which say what the document is about, and undoes what would
make the task trivial or unlike a question: the document's own name, signatures, markup, doctest.
A sentence that gives an order ("Return the number of ...") is asked half of the time ("how do I get
the number of ...").

A query depends on its document and the seed alone, so that the draw is the same whatever the order
of the corpus and the number of workers.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterator

from bixse.records import UNSPACED, Document, Query, Rejection, text_hash
from bixse.synthesis.settings import Cloze

# What is said of a document stands at its head: no more is looked at, whatever its length.
_HEAD_CHARACTERS = 20_000
_HEAD_SENTENCES = 8

_BULLET = re.compile(r"^(?:[*+•-]|\d+[.)])\s+")
_CALL = re.compile(r"^[\w.]+\s?\([^()]*(?:\([^()]*\)[^()]*)*\)\s*(?:->|--|:|—)?\s*")
_RESULT = re.compile(r"^[^.]{0,60}?\s--\s+")
_END = re.compile(r"(?<=[.!?\u061f\u06d4])\s+(?=[\"'(`*]?([^\W_]))|(?<=[\u0964\u3002\uff01\uff1f])")
_ASIDE = re.compile(
    r"(?i)(?:changed|new|added|deprecated|removed)\b.{0,12}\b(?:version|since)\b|see\b|note\b|"
    r"for example|e\.g\.|example|usage|warning|deprecated|copyright"
)
_MARKUP = (
    (re.compile(r":\w+(?::\w+)?:(?=`)"), ""),
    (re.compile(r"\(\*note [^)]*\)|\[\d+\]|https?://\S+|<[^<>\s]+@[^<>\s]+>"), " "),
    (re.compile(r"[`\"“”]+|\*{1,2}(?=\w)|(?<=\w)\*{1,2}(?=\W|$)"), ""),
    (re.compile(r"(?<=\w)\(\)"), ""),
    (re.compile(r"\s+"), " "),
)
# Of a script that puts no space between words two characters are about a word.
_WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\s{UNSPACED}]+")
_TRUE_IF = re.compile(r"(?i)returns? true (?:if|iff|when)\b")
_ORDER = re.compile(r"([A-Za-z]+)\s+(?=\w)")
_VERBS = """
    add allow append apply arrange attach build calculate call cancel change check clear
    close compare compute configure connect construct convert copy count create decode
    define delete determine disable discard display divide download emit enable encode
    ensure enter escape evaluate execute exit expand extend extract fetch fill filter find
    flush force format generate get give group handle import inform insert inspect install
    invoke issue iterate join keep kill launch limit list load locate lock look lower make
    map mark match merge modify move normalize obtain open pack parse pass pause perform pop
    prepare prevent print process produce provide push put query quote raise read receive
    record reduce register release reload remove rename repeat replace report request reset
    resolve restore resume retrieve return reverse rotate round run save schedule search
    select send serialize set show shut shuffle shutdown sleep sort split start stop store
    strip submit suspend swap switch take terminate test trace transform translate truncate
    turn uncompress unpack unregister update use validate verify wait wake walk wrap write
    yield
"""
_ORDERS = frozenset(_VERBS.split())
_ASKED_AS = {"return": "get"}


def draw_order(doc_id: str, seed: int) -> int:
    """The place of a document in the draw: a sample of n is the n smallest, ties by `doc_id`."""
    return int.from_bytes(_digest(doc_id, seed)[:8], "big")


def cloze(document: Document, settings: Cloze) -> Query | Rejection:
    """The query that one document gives, or why it gives none. Never raises."""
    chances = _digest(document.doc_id, settings.seed)
    found = list(sentences(document, settings.min_words))
    if not found:
        return Rejection(
            reason=f"no sentence of {settings.min_words} or more words",
            response=document.text[:200],
            doc_id=document.doc_id,
        )
    sentence = found[_harmonic(len(found), _fraction(chances[8:16]))]
    text = _asked(sentence) if chances[16] % 2 else sentence
    return Query(
        query_id=f"cloze:{document.doc_id}",
        text=_first_words(text, settings.max_words),
        origin="synthetic",
        seed_doc_id=document.doc_id,
    )


def _first_words(text: str, count: int) -> str:
    found = list(_WORD.finditer(text))
    return text if len(found) <= count else text[: found[count - 1].end()]


def sentences(document: Document, min_words: int) -> Iterator[str]:
    """The first sentences of a document that can stand alone, cleaned, in order, each once."""
    seen = {text_hash(document.title)}
    for paragraph in _paragraphs(document.text[:_HEAD_CHARACTERS]):
        for raw in _apart(paragraph):
            sentence = _without_name(_plain(raw), document.doc_id)
            if _stands(sentence, min_words) and (key := text_hash(sentence)) not in seen:
                seen.add(key)
                yield sentence
                if len(seen) > _HEAD_SENTENCES:
                    return


def _apart(paragraph: str) -> Iterator[str]:
    """Its sentences. After a full stop a small letter goes on; a script may have none."""
    start = 0
    for end in _END.finditer(paragraph):
        if not (end[1] or "").islower():
            yield paragraph[start : end.start()]
            start = end.end()
    yield paragraph[start:]


def _paragraphs(text: str) -> Iterator[str]:
    """Running text: without doctest and indented blocks, a bullet a paragraph, calls taken off."""
    lines: list[str] = []
    for line in [*text.splitlines(), ""]:
        prompt = line.lstrip().startswith(">>>")
        bullet = _BULLET.match(line)
        if not line.strip() or prompt or bullet:
            # An indented block is code or a table; so is what follows a prompt, to the blank line.
            if any(not kept.startswith("   ") for kept in lines) and ">>>" not in lines[0]:
                yield _without_call(" ".join(" ".join(lines).split()))
            lines = []
        if prompt:
            lines = [line]
        elif line.strip():
            lines.append(line[bullet.end() :] if bullet else line)


def _without_call(paragraph: str) -> str:
    """`S.append(value) -- append value to the end` without its first part."""
    call = _CALL.match(paragraph)
    if call is None:
        return paragraph
    return _RESULT.sub("", paragraph[call.end() :], count=1)


def _plain(sentence: str) -> str:
    for pattern, replacement in _MARKUP:
        sentence = pattern.sub(replacement, sentence)
    return sentence.strip(" \t.,:;!-—()[]{}'\u0964\u3002\uff01")


def _without_name(sentence: str, doc_id: str) -> str:
    """The sentence without the name it is filed under, where that is a name and not a word."""
    own = doc_id.partition(":")[2] or doc_id
    if not any(c.isalpha() for c in own):
        return sentence  # A number counts other things too.
    last = own.rpartition(".")[2]
    names = {own} if "." in own else set()
    if re.search(r"[_\d]|[a-z][A-Z]", last):
        names.add(last)
    if not names:
        return sentence
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    sentence = re.sub(rf"(?<![\w.])(?:{alternatives})(?!\w)", "it", sentence)
    return re.sub(r"^it\s+(?=\w)", "", sentence)


def _stands(sentence: str, min_words: int) -> bool:
    """Whether it reads as a sentence of words, and as more than an aside or a line of grammar."""
    words = sum(1 for word in _WORD.findall(sentence) if any(c.isalpha() for c in word))
    letters = sum(1 for c in sentence if _is_letter(c) or c.isspace() or not c.isprintable())
    return (
        words >= min_words
        and letters >= 0.8 * len(sentence)
        and "::=" not in sentence
        and _ASIDE.match(sentence) is None
    )


def _is_letter(character: str) -> bool:
    """Vowel signs, as of Hindi and Thai, are marks beside a letter."""
    return character.isalpha() or unicodedata.category(character).startswith("M")


def _asked(sentence: str) -> str:
    """An order as a question; anything else as it is."""
    if true_if := _TRUE_IF.match(sentence):
        return f"how do I check whether{sentence[true_if.end() :]}"
    order = _ORDER.match(sentence)
    if order is None:
        return sentence
    verb = _verb(order[1].lower())
    return f"how do I {verb} {sentence[order.end() :]}" if verb else sentence


def _verb(word: str) -> str | None:
    """The verb that an order starts with, in its first person: `Returns` asks how to get."""
    for base in (word, word.removesuffix("s"), word.removesuffix("es")):
        if base in _ORDERS:
            return _ASKED_AS.get(base, base)
    return None


def _harmonic(count: int, chance: float) -> int:
    """One of `count` places, the i-th (from 0) with weight 1 / (1 + i)."""
    total = sum(1 / (1 + place) for place in range(count))
    for place in range(count):
        chance -= 1 / (1 + place) / total
        if chance < 0:
            return place
    return count - 1


def _fraction(digest: bytes) -> float:
    return int.from_bytes(digest, "big") / float(2 ** (8 * len(digest)))


def _digest(doc_id: str, seed: int) -> bytes:
    key = f"{seed}:{doc_id}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(key, digest_size=17).digest()
