"""A small world with a known true reward: 25 animals, five attributes, and answers of mixed quality.

    prompt     Tell me about the owl: what it eats and how it moves.
    response    It eats mice. It can fly.

The demonstrations imitate writers of unequal care: they state wrong values, leave things out, add facts that
nobody asked for, repeat themselves and add filler. A model trained on them hallucinates, so preference
training has something to improve.

The true reward is the sum of three axes, as in Wu et al. 2023 (arXiv:2306.01693):

    relevance      −0.3 for each sentence that is a repetition, was not asked for, or is unknown in this world
    factuality     −0.5 for each sentence that states a wrong value
    completeness   the fraction of the asked attributes that are answered correctly

A perfect answer scores 1, which is `max_gold`. The labels of comparisons are noisy and follow Bradley–Terry:

    P(a ≻ b) = σ(LABEL_SCALE · (gold(a) − gold(b)))

Two such labelers agree with each other on 73% of the pairs, like those of InstructGPT (arXiv:2203.02155), and
each agrees with the true order on 79%.

No (animal, set of asked attributes) pair occurs in more than one split. Nothing needs to be downloaded.
"""
import math
import random
import re
from functools import cache
from itertools import combinations, permutations

import numpy as np
import tiktoken

from data.schema import Comparison

ATTRIBUTES = {  # how a prompt asks for the attribute, and how an answer states it
    "kind": ("what it is", "It is a {}."),
    "food": ("what it eats", "It eats {}."),
    "home": ("where it lives", "It lives in the {}."),
    "cover": ("what covers it", "It has {}."),
    "movement": ("how it moves", "It can {}."),
}
FACTS = """
    owl       bird       mice     forest     feathers  fly
    eagle     bird       fish     mountains  feathers  fly
    penguin   bird       fish     sea        feathers  swim
    duck      bird       seeds    pond       feathers  swim
    sparrow   bird       seeds    meadow     feathers  fly
    fox       mammal     mice     forest     fur       run
    bear      mammal     fruit    forest     fur       climb
    horse     mammal     grass    meadow     fur       run
    rabbit    mammal     grass    meadow     fur       jump
    bat       mammal     insects  cave       fur       fly
    mole      mammal     insects  meadow     fur       dig
    otter     mammal     fish     river      fur       swim
    whale     mammal     fish     sea        skin      swim
    camel     mammal     leaves   desert     fur       run
    squirrel  mammal     seeds    forest     fur       climb
    monkey    mammal     fruit    forest     fur       climb
    frog      amphibian  insects  pond       skin      jump
    newt      amphibian  insects  pond       skin      crawl
    snake     reptile    mice     desert     scales    crawl
    lizard    reptile    insects  desert     scales    climb
    tortoise  reptile    leaves   desert     armor     crawl
    shark     fish       fish     sea        skin      swim
    salmon    fish       insects  river      scales    swim
    ant       insect     seeds    forest     armor     crawl
    bee       insect     nectar   meadow     fur       fly
"""
OPENINGS = ["Tell me about the {}: {}.", "Describe the {}: {}.", "I want to know about the {}: {}."]
FILLERS = ["It is a nice animal.", "Many people like it.", "I hope this helps."]

max_gold = 1.0      # the reward of a perfect answer
LABEL_SCALE = 2.25  # a larger scale means less noise
SLIPS = 0.1         # the fraction of sentences that an annotator of spans marks at random
SIZES = {"train": 20_000, "validation": 1_000, "test": 1_000}


def state(attribute, value):
    """Returns the sentence that states a value: state("kind", "insect") is "It is an insect."."""
    sentence = ATTRIBUTES[attribute][1].format(value)
    return sentence.replace(" a a", " an a").replace(" a i", " an i")


WORLD = {}      # animal -> {attribute: true value}
for line in FACTS.strip().splitlines():
    animal, *values = line.split()
    WORLD[animal] = dict(zip(ATTRIBUTES, values))

VALUES = {}     # attribute -> all values it can take
SENTENCES = {}  # every sentence of this world -> the (attribute, value) it states
for attribute in ATTRIBUTES:
    VALUES[attribute] = sorted({facts[attribute] for facts in WORLD.values()})
    for value in VALUES[attribute]:
        SENTENCES[state(attribute, value)] = (attribute, value)
for filler in FILLERS:
    SENTENCES[filler] = (None, None)


# -------------------------------------------------------------------------------------------- the true reward

def parse_prompt(prompt):
    """Returns the animal and the list of asked attributes. Raises ValueError for any other text."""
    animal = re.search(r"the (\w+):", prompt)
    if not animal or animal[1] not in WORLD:
        raise ValueError(f"not a prompt of the animals world: {prompt!r}")
    return animal[1], [attribute for attribute, (question, _) in ATTRIBUTES.items() if question in prompt]


def sentences(text):
    """Splits a text after each period. Text after the last period counts as a sentence too."""
    return [s.strip() for s in re.findall(r"[^.]*\.|[^.]+$", text) if s.strip()]


def axes(prompt, response):
    """Scores a response on each axis: {"relevance": ≤ 0, "factuality": ≤ 0, "completeness": 0 … 1}."""
    animal, asked = parse_prompt(prompt)
    n_irrelevant = 0
    n_false = 0
    answered = set()
    earlier = set()
    for sentence in sentences(response):
        attribute, value = SENTENCES.get(sentence, (None, None))
        if attribute not in asked or sentence in earlier:
            n_irrelevant += 1
        if attribute and WORLD[animal][attribute] != value:
            n_false += 1
        elif attribute in asked:
            answered.add(attribute)
        earlier.add(sentence)
    return {
        "relevance": -0.3 * n_irrelevant,
        "factuality": -0.5 * n_false,
        "completeness": len(answered) / len(asked),
    }


def gold(prompt, response):
    """Returns the true reward: the sum of the three axes, at most 1."""
    return sum(axes(prompt, response).values())


def cluster(prompt):
    """Returns the question: prompts that ask for the same in other words or another order share it."""
    animal, asked = parse_prompt(prompt)
    return animal, tuple(asked)


def grammatical(response):
    """Returns how many sentences of the response belong to this world, and how many sentences it has."""
    stated = sentences(response)
    grammatical_ones = [sentence for sentence in stated if sentence in SENTENCES]
    return len(grammatical_ones), len(stated)


# -------------------------------------------------------------------------------------------- the generator

@cache
def questions(split):
    """Returns the (animal, asked attributes) pairs of a split: 70% train, 10% validation, 20% test."""
    pairs = []
    for animal in WORLD:
        for n_asked in (2, 3):
            for asked in combinations(ATTRIBUTES, n_asked):
                pairs.append((animal, asked))
    random.Random(0).shuffle(pairs)
    train_end = int(0.7 * len(pairs))
    validation_end = int(0.8 * len(pairs))
    by_split = {
        "train": pairs[:train_end],
        "validation": pairs[train_end:validation_end],
        "test": pairs[validation_end:],
    }
    return by_split[split]


def ask(animal, asked, opening):
    """Returns the prompt that begins with this opening and asks for these attributes, in this order."""
    *most, last = [ATTRIBUTES[attribute][0] for attribute in asked]
    return opening.format(animal, ", ".join(most) + " and " + last)


def answer(animal, asked, rng):
    """Writes one answer. How many mistakes it makes depends on the writer's haste, drawn from 0 to 1."""
    haste = rng.random()
    stated = []
    for attribute in asked:
        if rng.random() < 0.3 * haste:  # leave it out
            continue
        value = WORLD[animal][attribute]
        if rng.random() < 0.5 * haste:  # get it wrong
            value = rng.choice([other for other in VALUES[attribute] if other != value])
        stated.append(state(attribute, value))
    if rng.random() < 0.7 * haste:  # add a true fact that nobody asked for
        attribute = rng.choice([a for a in ATTRIBUTES if a not in asked])
        position = rng.randint(0, len(stated))
        stated.insert(position, state(attribute, WORLD[animal][attribute]))
    if rng.random() < 0.3 * haste and stated:  # repeat a sentence
        stated.append(rng.choice(stated))
    if rng.random() < 0.4 * haste or not stated:  # add filler
        position = rng.randint(0, len(stated))
        stated.insert(position, rng.choice(FILLERS))
    return " " + " ".join(stated)


def draw(split, seed):
    """Yields SIZES[split] random questions as (rng, prompt, animal, asked). Draw answers from this rng."""
    rng = random.Random(f"{split} {seed}")
    for _ in range(SIZES[split]):
        animal, asked = rng.choice(questions(split))
        asked = rng.sample(asked, len(asked))  # in random order
        prompt = ask(animal, asked, rng.choice(OPENINGS))
        yield rng, prompt, animal, asked


def demonstrations(split):
    """Returns [(prompt, response), …]."""
    examples = []
    for rng, prompt, animal, asked in draw(split, "demonstrations"):
        examples.append((prompt, answer(animal, asked, rng)))
    return examples


def comparisons(split, k=2, reward=gold):
    """Returns [Comparison, …] of k responses each, sorted from best to worst by a noisy labeler.

    The labeler sorts by scaled reward plus Gumbel noise, so every pair of responses follows Bradley–Terry.
    """
    gumbel = np.random.default_rng(0).gumbel(size=(SIZES[split], k)).tolist()
    result = []
    for (rng, prompt, animal, asked), noise in zip(draw(split, "comparisons"), gumbel):
        responses = [answer(animal, asked, rng) for _ in range(k)]
        labels = [LABEL_SCALE * reward(prompt, response) + z for response, z in zip(responses, noise)]
        best_first = sorted(range(k), key=lambda i: labels[i], reverse=True)
        result.append(Comparison(prompt, [responses[i] for i in best_first], ranks=list(range(k))))
    return result


def label(prompt, response, rng):
    """The reward as a noisy labeler sees it. Sorted by it, every pair of responses follows Bradley–Terry."""
    gumbel = -math.log(rng.expovariate(1))
    return LABEL_SCALE * gold(prompt, response) + gumbel


def completeness(split):
    """Returns comparisons of four responses by completeness alone, with the same label noise."""
    return comparisons(split, 4, lambda prompt, response: axes(prompt, response)["completeness"])


def spans(split):
    """Returns [(prompt, response, [(start, end, category), …]), …], in characters of the response."""
    result = []
    for rng, prompt, animal, asked in draw(split, "spans"):
        response = answer(animal, asked, rng)
        result.append((prompt, response, annotate(prompt, response, rng)))
    return result


def annotate(prompt, response, rng):
    """Marks the errors of a response, as [(start, end, category), …] in characters.

    The rules are those of arXiv:2306.01693: a sentence gets at most one mark, and irrelevant sentences are
    not checked for truth. A slip, with probability SLIPS, puts a random mark or none.
    """
    animal, asked = parse_prompt(prompt)
    marks = []
    earlier = set()
    for match in re.finditer(r"\S[^.]*\.", response):
        sentence = match[0]
        attribute, value = SENTENCES.get(sentence, (None, None))
        if sentence in earlier:
            category = "Redundant"
        elif attribute not in asked:
            category = "Irrelevant"
        elif WORLD[animal][attribute] != value:
            category = "Wrong-Grounding"
        else:
            category = None
        if rng.random() < SLIPS:
            category = rng.choice([None, "Irrelevant", "Wrong-Grounding"])
        if category:
            marks.append((match.start(), match.end(), category))
        earlier.add(sentence)
    return marks


def prompts(split):
    """Returns every prompt of the split once, in a fixed random order."""
    result = []
    for animal, attributes in questions(split):
        for asked in permutations(attributes):
            for opening in OPENINGS:
                result.append(ask(animal, asked, opening))
    random.Random(0).shuffle(result)
    return result


# -------------------------------------------------------------------------------------------- the tokenizer

@cache
def tokenizer():
    """Returns a tiktoken.Encoding of 256 bytes and this world's words.

    "mice", " mice" and "." are one token each. Any other text is encoded byte by byte.
    """
    texts = [opening.format("the", "and , .") for opening in OPENINGS]
    texts += [question for question, _ in ATTRIBUTES.values()]
    texts += [*SENTENCES, *WORLD]
    words = set()
    for word in re.findall(r"[A-Za-z]+", " ".join(texts)):
        words.add(" " + word)
        if len(word) > 1:  # a single letter is one of the bytes
            words.add(word)
    ranks = {bytes([i]): i for i in range(256)}
    for word in sorted(words):
        ranks[word.encode()] = len(ranks)
    return tiktoken.Encoding("animals", pat_str=r" ?\p{L}+| ?[^\s\p{L}]+|\s+", mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})
