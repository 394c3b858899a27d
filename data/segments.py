"""Cutting text into sentences and sub-sentences, and finding the token in which a segment ends."""
import codecs
import re
from bisect import bisect_left

MIN_WORDS = 5  # of a sub-sentence

# A line; and in it a sentence's end: . ! ? with what closes after it, before a space that no small letter follows.
LINE = re.compile(r"\S[^\n]*")
SENTENCE_END = re.compile(r"(\S*[.!?][\"'”’)\]]*)\s+(?=[^\sa-z])")
ABBREVIATION = re.compile(r"[\"'“(\[]*([A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|No|vs)\.")  # "J." in "J. Smith", and titles


def sentences(text):
    """[(start, end), …] in characters. Every character that is not a space lies in one sentence; none begins or ends with a space.

    A sentence ends at the end of a line, or at . ! ? where a space and no small letter follow, but not after an initial
    or a title.
    """
    spans = []
    for line in LINE.finditer(text):
        start = line.start()
        for stop in SENTENCE_END.finditer(line[0]):
            if not ABBREVIATION.fullmatch(stop[1]):
                spans.append((start, line.start() + stop.end(1)))
                start = line.start() + stop.end()
        rest = text[start:line.end()].rstrip()
        if rest:
            spans.append((start, start + len(rest)))
    return spans


def segments(text):
    """[(start, end), …] in characters: sentences cut after , ; ! ? into sub-sentences, as in the code of arXiv:2306.01693.

    No sub-sentence is shorter than MIN_WORDS words unless its sentence is: a short first one is joined to the next, a
    short later one to the one before it, and the last one has more than MIN_WORDS.
    """
    spans = []
    for start, end in sentences(text):
        words = [(start + m.start(), start + m.end()) for m in re.finditer(r"\S+", text[start:end])]
        first_words = [0]  # of each sub-sentence
        for i in range(1, len(words) - MIN_WORDS):
            last_character = text[words[i - 1][1] - 1]
            if last_character not in ",;!?":
                continue
            if i - first_words[-1] >= MIN_WORDS:
                first_words.append(i)
            elif len(first_words) > 1:
                first_words[-1] = i
        for a, b in zip(first_words, [*first_words[1:], len(words)]):
            spans.append((words[a][0], words[b - 1][1]))
    return spans


def decode_with_ends(tokenizer, tokens):
    """The text of some tokens, and for each token the number of characters that are complete where it ends.

    A token may end inside a character; the next one completes it.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    ends = []
    for token in tokens:
        text += decoder.decode(tokenizer.decode_single_token_bytes(token))
        ends.append(len(text))
    text += decoder.decode(b"", final=True)
    if ends:
        ends[-1] = len(text)
    return text, ends


def last_token(ends, end):
    """The token that completes the character before `end`. ends: from decode_with_ends."""
    return bisect_left(ends, end)
