"""Splits text into sentences and sub-sentences, and finds the token in which a segment ends."""
import codecs
import re
from bisect import bisect_left

MIN_WORDS = 5  # in a sub-sentence

LINE = re.compile(r"\S[^\n]*")
# . ! or ?, then perhaps closing quotes or brackets, then a space and no lowercase letter
SENTENCE_END = re.compile(r"(\S*[.!?][\"'”’)\]]*)\s+(?=[^\sa-z])")
# initials ("J. Smith"), titles and the like, whose period does not end a sentence
ABBREVIATION = re.compile(r"[\"'“(\[]*([A-Z]|Mr|Mrs|Ms|Dr|St|Jr|Sr|No|vs)\.")


def sentences(text):
    """Returns the sentences of a text as [(start, end), …] in characters.

    A sentence ends at the end of a line, or at . ! ? if a space follows and then no lowercase letter, but not
    after an initial or a title. Every character except whitespace lies in exactly one sentence, and no
    sentence begins or ends with whitespace.
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
    """Returns the sub-sentences of a text as [(start, end), …] in characters, as in arXiv:2306.01693's code.

    Sentences are split after , ; ! ? such that every sub-sentence has at least MIN_WORDS words, unless its
    sentence is shorter. A first one that is too short is joined to the next, a later one to the one before.
    The last one has more than MIN_WORDS words.
    """
    spans = []
    for start, end in sentences(text):
        words = [(start + m.start(), start + m.end()) for m in re.finditer(r"\S+", text[start:end])]
        first_words = [0]  # the index of each sub-sentence's first word
        for i in range(1, len(words) - MIN_WORDS):
            last_character = text[words[i - 1][1] - 1]
            if last_character not in ",;!?":
                continue
            if i - first_words[-1] >= MIN_WORDS:
                first_words.append(i)
            elif len(first_words) > 1:
                first_words[-1] = i
        last_words = [i - 1 for i in first_words[1:]] + [len(words) - 1]
        for first, last in zip(first_words, last_words):
            first_start, _ = words[first]
            _, last_end = words[last]
            spans.append((first_start, last_end))
    return spans


def decode_with_ends(tokenizer, tokens):
    """Decodes tokens. Returns the text and, for each token, how many characters are complete after it.

    A token may end in the middle of a character, which a later token completes.
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
    """Returns the index of the token that completes the character before `end`. See decode_with_ends."""
    return bisect_left(ends, end)
