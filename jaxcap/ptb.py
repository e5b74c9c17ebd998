"""Penn Treebank tokens as coco-caption sees them (a first draft: the rules of plain captions only)."""

import re

DROPPED = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())
_TOKEN = re.compile(r"[a-z]+(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|[a-z0-9]+(?:-[a-z0-9]+)*|\S")


def tokenize(caption: str) -> str:
    """The caption in lower case as tokens joined by single spaces, punctuation dropped."""
    return " ".join(token for token in _TOKEN.findall(caption.lower()) if token not in DROPPED)
