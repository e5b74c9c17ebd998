"""Penn Treebank tokens as coco-caption sees them: Stanford's PTBTokenizer 3.4.1, lower-cased, without Java.

Scores only compare when captions are cut into words in the same way. The rules below were found by asking the Java
tool. At each place of a caption the rule that reads furthest wins (what it looks ahead at counts), and the first of
those that read equally far.

Not covered: a caption is tokenized by itself, whereas the Java tool peeks at the next line after "plan B."; a letter
that entered Unicode after 2012 is kept here and lost there; "n't" after a letter beyond English ("naïvewon't") and a
capitalized abbreviation without a blank behind it ("Inc.o'clock", "Corp.A)") are cut in other places there.
"""

import functools
import html
from collections.abc import Callable
from typing import NamedTuple

import regex

# coco-caption drops these tokens. Lower-casing comes first there, so the brackets -LRB-, -RRB-, -LCB-, -RCB- that its
# list also names are never dropped: "(left)" stays three tokens, "-lrb- left -rrb-".
DROPPED = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())

# --- what words are made of ----------------------------------------------------------------------------------------

_MARKS = (
    r"\u00AD\u02C2-\u02C5\u02D2-\u02DF\u02E5-\u02EB\u02ED\u02EF-\u036F\u0483-\u0487\u0591-\u05BD\u05BF\u05C1\u05C2"
    r"\u05C4\u05C5\u05C7\u0615-\u061A\u064B-\u065E\u0670\u06D6-\u06DC\u06DF-\u06E4\u06E7\u06E8\u06EA-\u06ED\u0711"
    r"\u0730-\u074A\u07A6-\u07B0\u07EB-\u07F3\u0900-\u0903\u093C\u093E-\u094E\u0951-\u0955\u0962\u0963\u0981-\u0983"
    r"\u09BC\u09BE-\u09CD\u09D7\u09E2\u09E3\u0A01-\u0A03\u0A3C-\u0A4F\u0A81-\u0A83\u0ABC\u0ABE-\u0ACF\u0B82"
    r"\u0BBE-\u0BCD\u0C01-\u0C03\u0C3E-\u0C56\u0D3E-\u0D48\u0E31\u0E34-\u0E3A\u0E47-\u0E4E\u0EB1\u0EB4-\u0EBC"
    r"\u0EC8-\u0ECD")
_SYMBOLS = (  # kept, one character a token; what is neither here nor in a rule is dropped: control codes, emoji
    r"!-~\u0080\u00A1-\u00BF\u00D7\u00F7\u037E\u0387\u0589\u05BE\u05C0\u05C3\u05C6\u05F3\u05F4\u0600-\u0603"
    r"\u0606-\u060A\u060C\u0614\u061B\u061E\u061F\u066A\u066D\u06D4\u0700-\u070D\u07F6-\u07F8\u0964\u0965\u0E3F\u0E4F"
    r"\u1FBD\u2013-\u2023\u2026\u2030-\u203B\u203E-\u2042\u2044\u2070\u2074-\u207E\u2080-\u208E\u20A0\u20A4\u20AC"
    r"\u2100-\u214F\u2153-\u215E\u2190-\u2BFF\u3001\u3002\u3012\u30FB\uFF01-\uFF0F\uFF1A-\uFF20\uFF3B-\uFF40"
    r"\uFF5B-\uFF65\uFFE0\uFFE1\uFFE5\uFFE6")
_LETTER = rf"(?:[\p{{L}}{_MARKS}]|&[aeiouAEIOU](?:acute|grave|uml);)"
_DIGIT = r"\p{Nd}"
_ALNUM = rf"(?:{_LETTER}|{_DIGIT})"
_BLANK = r"[ \u00A0]"
_HYPHEN = r"[-_\u058A\u2010\u2011]"
_APOSTROPHE = r"(?:['\u0092\u2019]|&apos;)"
_TICK = r"(?:['`\u0091\u0092\u2018\u2019\u201B]|&apos;)"
_CLITIC = rf"{_APOSTROPHE}(?:[msd]|re|ve|ll)"
_ELISION = rf"(?:[dlo]{_TICK}(?={_ALNUM}{{2}}))?"
_WORD = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"  # one word: "end.the"
_HYPHENATED = rf"{_ELISION}{_ALNUM}+(?:{_HYPHEN}{_ELISION}{_ALNUM}+)*"  # 3-year-old, d'Artagnan
_COMPOUND = r"[a-z0-9][a-z0-9.,\u00AD]*(?:-(?:(?:[a-z]\.){2,}|[a-z0-9\u00AD]+))+"  # 1.5-litre, U.S.-based
_ALTERNATIVE = r"[a-z0-9]+(?:-[a-z]+){0,2}"
_INITIALS = "(?-i:[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+)"  # R&B
_NUMBER = rf"[-+]?(?:{_DIGIT}*(?:[.:,\u00AD\u066B\u066C]{_DIGIT}+)+|{_DIGIT}+)"
_UP_TO_FOUR = rf"{_DIGIT}{{1,4}}"
_PHONE = rf"""(?x:
    (?: \(\d{{2,3}}\){_BLANK}? | (?:\+\+?)? (?:\d{{2,4}}[-\ \u00A0])? \d{{2,4}}[-\ \u00A0] )  # (650), +1 650-
    \d{{3,4}}[-\ \u00A0]?\d{{3,5}}
  | (?: (?:\+\+?)?\d{{2,4}}\. )? \d{{2,4}}\.\d{{3,4}}\.\d{{3,5}} )"""
_NET = r'[^\s"<>|()]'  # inside an address
_NET_END = r'[^\s"<>|(){}.!?,-]'  # at its end
_TAG = "[a-z_:][a-z0-9_:.-]*"
_TAG_VALUE = r"""(?:"[^"\n]*"|'[^'\n]*')"""

_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co col
    colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov hon inc
    ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont
    mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc pres prof pte pty pvt rd rep rev rt sen sep sept
    seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo"""
_NAMES = "ark az del ill la mass miss ore pa tex wash"  # abbreviations where capitalized: "Pa.", not "pa."
_BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"  # "no. 5", but "he said no."
_FILES = """
    bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png ppt ps py sql
    tar txt wav x xml zip"""
_JOINED = [("can", "not"), ("gon", "na"), ("wan", "na"), ("got", "ta"), ("gim", "me"), ("lem", "me")]
_OPENERS = """
    a about according additionally after an as at but earlier he her here however if in it last many more now once one
    other our she since so some such that the their then there these they this we what when while yet you"""


def _one_of(words: str) -> str:
    return "(?:" + "|".join(sorted(words.split(), key=len, reverse=True)) + ")"


# --- the rules -----------------------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    pattern: regex.Pattern  # what follows group "t", if there is one, is only looked at
    text: str | Callable[[str], str] | None  # what stands for the token; "": it is dropped; None: itself


def _rule(pattern: str, text=None, exact_case: bool = False) -> _Rule:
    return _Rule(regex.compile(pattern, regex.VERSION1 | (0 if exact_case else regex.IGNORECASE)), text)


def _straight(token: str) -> str:
    return regex.sub(_APOSTROPHE, "'", token)


def _hard(token: str) -> str:  # so that a token holds no plain blank
    return token.replace(" ", "\u00A0")


def _face(token: str) -> str:
    return token.replace("(", "-LRB-").replace(")", "-RRB-")


def _spelled(token: str) -> str:
    return "".join(_SPELLED.get(character, character) for character in token)


_SPELLED = {
    "(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-",
    "«": "``", "\u0093": "``", "\u201C": "``", "»": "''", "\u0094": "''", "\u201D": "''",
    "\u0091": "`", "\u2018": "`", "\u201B": "`", "\u2039": "`", "\u0092": "'", "\u2019": "'", "\u203A": "'",
    "€": "$", "¤": "$", "₠": "$", "\u0080": "$", "£": "#", "¢": "cents",
    "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3",
}

_RULES = (
    # words that are two
    *(_rule(f"(?<t>{first}){second}") for first, second in _JOINED),
    _rule("(?<t>'t)(?:is|was)"),
    _rule(rf"(?<t>{_WORD}){_CLITIC}"),
    _rule(rf"(?<t>{_LETTER}{_ALNUM}*?)n{_TICK}t"),
    _rule(rf"[A-HJ-XZn]{_TICK}{_LETTER}{{2,}}", exact_case=True),  # D'Arcy, N'Djamena
    _rule(rf"(?<t>{_CLITIC})[^A-Za-z]", _straight),
    # words
    _rule(_WORD),
    _rule(_HYPHENATED),
    _rule(rf"(?<t>{_COMPOUND})[^A-Za-z0-9]"),
    _rule(_INITIALS, html.unescape),
    _rule(rf"(?<t>(?:{_WORD}|{_HYPHENATED}|{_COMPOUND}|{_INITIALS})\.)[,;:\u3001]", html.unescape),
    _rule(rf"{_ALTERNATIVE}(?:\\?/{_ALTERNATIVE}){{1,2}}"),  # his/her
    _rule(r"c\+\+|[cf]#"),
    # words with an apostrophe
    _rule(rf"{_APOSTROPHE}(?:n{_APOSTROPHE}?|em|till?|cause)"),
    _rule(rf"(?:[ldj]|ol|somethin|dunkin){_APOSTROPHE}"),
    _rule(f"c{_APOSTROPHE}est"),
    _rule("n?e'er|o'er|c'mon|ev'ry|nat'l"),
    _rule(rf"{_LETTER}+[aeiouyAEIOUY]{_TICK}[aeiouA-Z]{_LETTER}*", exact_case=True),  # ma'am, Hawai'i
    _rule(rf"(?<t>y{_APOSTROPHE})[a-z]"),
    _rule(rf"{_APOSTROPHE}[2-9]0s"),
    _rule(rf"(?<t>{_APOSTROPHE}[0-9]{{2}})\s"),
    _rule(r"(?<t>')[a-z]\S", ""),  # an opening quote
    _rule(_CLITIC, _straight),
    _rule(rf"n{_TICK}t", _straight),
    # on the net
    _rule(rf"https?://{_NET}+{_NET_END}"),
    _rule(rf"(?:www\.(?:[^\s\"<>|(){{}}.!?,]+\.)+[a-z]{{2,4}}|(?:[^\s\"`'|!(){{}}$,-_]+\.)+(?i:com|net|org|edu))"
          rf"(?:/{_NET}+{_NET_END})?(?![A-Za-z])", exact_case=True),
    _rule(rf"(?:<|&lt;)?[a-z0-9]{_NET}*@[^\s\"<>|()\u00A0.]+(?:\.[^\s\"<>|()\u00A0.]+)*(?:>|&gt;)?"),
    _rule("@[a-z_][a-z_0-9]*"),
    _rule(rf"#{_LETTER}+"),
    # numbers
    _rule(_NUMBER),
    _rule(rf"(?:{_UP_TO_FOUR}[- \u00A0])?{_UP_TO_FOUR}(?:\\?/|\u2044){_UP_TO_FOUR}", _hard),
    _rule(rf"{_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}}"),
    _rule(_PHONE, lambda token: _hard(_spelled(token))),
    _rule(r"[A-Z]*\$", exact_case=True),
    # abbreviations
    _rule(rf"(?:ph\.d|{_one_of(_ABBREVIATIONS)}|[a-z](?:\.[a-z])*)\."),
    _rule(rf"(?-i:(?=[A-Z])){_one_of(_NAMES)}\."),
    _rule(rf"(?<t>{_one_of(_BEFORE_NUMBERS)}\.){_BLANK}?{_DIGIT}"),
    _rule(rf"(?<t>[a-z])\.\s+(?-i:(?=[A-Z]))(?:{_one_of(_OPENERS)}|m[rs]\.)\s"),
    _rule(rf"(?<t>{_ALNUM}+(?:\.{_ALNUM}+)*\.{_one_of(_FILES)})[\s.,!?]"),
    # faces, tags, entities, signs
    _rule(r"(?<t>[<>]?[:;=][-o*']?[)(\[\]DPdpO@{|\\])[^A-Za-z0-9]", _face, exact_case=True),
    _rule(r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)", _face),
    _rule(rf"<[!?][a-z-][^>\n]*>|</?{_TAG}(?: +{_TAG}(?: *= *{_TAG_VALUE})?)* */?>", _hard),
    _rule("&(?:amp|lt|gt);", html.unescape),
    _rule("&(?:nbsp|quot|apos|mdash|ndash);", ""),
    _rule("&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"),
    _rule(r"[?!]+|\*+|_+|@+|#+|-{5,}|<<|>>"),
    _rule(r"-{1,4}|\.{3,5}|\.(?: \.){2,4}|[\u0096\u0097\u2013-\u2015\u2026]|''|[\"']", ""),
    _rule("[`«»\u0091-\u0094\u2018\u2019\u201B-\u201D\u2039\u203A]{1,2}", _spelled),
    _rule(rf"[{_SYMBOLS}]", _spelled),
)

_TWO_WORDS = frozenset("".join(parts) for parts in _JOINED)
# A stretch whose tokens do not depend on what comes after it, and so are remembered: it holds nothing that may begin a
# number, a tag or a face with blanks inside, and a period only at the caption's end.
_APART = regex.compile(rf"[^\s\u00A0{_DIGIT}<(+.]+(?=[ \n])|[^\s\u00A0{_DIGIT}<(+]+(?=\s*$)")


@functools.lru_cache(1 << 20)  # the end of a run reads all training captions four times
def tokenize(caption: str) -> str:
    """The caption as lower-case tokens joined by single spaces, punctuation dropped."""
    plain = caption.removesuffix(" .")
    if _is_plain(plain.replace(" ", "")):  # most captions: worth it, as scoring in training waits for this function
        words = plain.lower().split()
        if _TWO_WORDS.isdisjoint(words):
            return " ".join(words)
    text, place, tokens = caption + "\n", 0, []
    while place < len(caption):
        if apart := _APART.match(text, place):
            tokens += _tokens_apart(apart[0])
            place = apart.end() + 1
        else:
            token, place = _next(text, place)
            tokens.append(token)
    return " ".join(token for token in tokens if token and token not in DROPPED)


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isalpha()


@functools.lru_cache(maxsize=1 << 16)
def _tokens_apart(stretch: str) -> tuple[str, ...]:
    if _is_plain(stretch) and stretch.lower() not in _TWO_WORDS:
        return (stretch.lower(),)
    text, place, tokens = stretch + "\n", 0, []
    while place < len(stretch):
        token, place = _next(text, place)
        tokens.append(token)
    return tuple(tokens)


def _next(text: str, place: int) -> tuple[str, int]:
    """The token at a place ("" for a blank, an emoji, a control character) and the place after it."""
    match, rule = _longest(text, place)
    if match is None:
        return "", place + 1
    group = "t" if "t" in rule.pattern.groupindex else 0
    token = match[group]
    if rule.text is not None:
        token = rule.text(token) if callable(rule.text) else rule.text
    return token.replace("\u00AD", "").lower(), match.end(group)


def _longest(text: str, place: int) -> tuple[regex.Match | None, _Rule | None]:
    best = rule = None
    for candidate in () if text[place].isspace() else _RULES:
        match = candidate.pattern.match(text, place)
        if match and (best is None or match.end() > best.end()):
            best, rule = match, candidate
    return best, rule
