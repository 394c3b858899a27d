"""A small world whose true reward is known: 25 animals, five attributes, answers of mixed quality. Nothing to download.

    prompt     Tell me about the owl: what it eats and how it moves.
    response    It eats mice. It can fly.

The demonstrations are written by people of unequal care, who state wrong values, leave things out, add what nobody asked
for, repeat themselves and pad; a model that imitates them hallucinates, and preference training has something to mend.

The true reward is the sum of three axes, those of Wu et al. 2023 (arXiv:2306.01693):

    relevance      −0.3 for each sentence that is repeated, not asked for, or no sentence of this world
    factuality     −0.5 for each sentence that states a wrong value
    completeness   the share of the asked attributes that are answered truly

so a perfect answer scores 1. Comparisons carry the noise of Bradley–Terry labels: P(a ≻ b) = σ(LABEL_SCALE · (gold_a − gold_b)).
Two labelers of this world agree with each other as often as those of InstructGPT did (73%), and each with the true order in 79%.

The three splits never share an (animal, set of asked attributes) pair.
"""
import random
import re
from functools import cache
from itertools import combinations, permutations

import numpy as np
import tiktoken

from data.schema import Comparison

ATTRIBUTES = {  # how a prompt asks for it, how an answer states it
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
WORLD = {animal: dict(zip(ATTRIBUTES, values)) for animal, *values in map(str.split, FACTS.strip().splitlines())}
VALUES = {a: sorted({facts[a] for facts in WORLD.values()}) for a in ATTRIBUTES}
OPENINGS = ["Tell me about the {}: {}.", "Describe the {}: {}.", "I want to know about the {}: {}."]
FILLERS = ["It is a nice animal.", "Many people like it.", "I hope this helps."]

LABEL_SCALE = 2.25
SLIPS = 0.1  # of the sentences that an annotator of spans reads, the share that is marked at random
SIZES = {"train": 20_000, "validation": 1_000, "test": 1_000}


def state(attribute, value):
    """The sentence that states a value: state("kind", "insect") = "It is an insect."."""
    return ATTRIBUTES[attribute][1].format(value).replace(" a a", " an a").replace(" a i", " an i")


SENTENCES = {state(a, v): (a, v) for a in ATTRIBUTES for v in VALUES[a]} | {filler: (None, None) for filler in FILLERS}


# ------------------------------------------------------------------------------------------------ the true reward

def parse_prompt(prompt):
    """The animal and the asked attributes of a prompt of this world; ValueError for any other text."""
    animal = re.search(r"the (\w+):", prompt)
    if not animal or animal[1] not in WORLD:
        raise ValueError(f"not a prompt of the animals world: {prompt!r}")
    return animal[1], [a for a, (question, _) in ATTRIBUTES.items() if question in prompt]


def sentences(text):
    """["It eats mice.", "It can fly."]; what follows the last full stop counts as a sentence too."""
    return [s.strip() for s in re.findall(r"[^.]*\.|[^.]+$", text) if s.strip()]


def axes(prompt, response):
    """{"relevance": ≤ 0, "factuality": ≤ 0, "completeness": 0 … 1}"""
    animal, asked = parse_prompt(prompt)
    irrelevant, false, answered = 0, 0, set()
    said = sentences(response)
    for i, sentence in enumerate(said):
        attribute, value = SENTENCES.get(sentence, (None, None))
        irrelevant += attribute not in asked or sentence in said[:i]
        if attribute and WORLD[animal][attribute] != value:
            false += 1
        elif attribute in asked:
            answered.add(attribute)
    return {"relevance": -0.3 * irrelevant, "factuality": -0.5 * false, "completeness": len(answered) / len(asked)}


def gold(prompt, response):
    """The true reward: the sum of the three axes, at most 1."""
    return sum(axes(prompt, response).values())


def grammatical(response):
    """(sentences that are sentences of this world, sentences)"""
    said = sentences(response)
    return sum(s in SENTENCES for s in said), len(said)


# ------------------------------------------------------------------------------------------------ the generator

@cache
def questions(split):
    """The (animal, asked attributes) pairs of a split: 70% train, 10% validation, 20% test."""
    pairs = [(animal, asked) for animal in WORLD for k in (2, 3) for asked in combinations(ATTRIBUTES, k)]
    random.Random(0).shuffle(pairs)
    a, b = int(0.7 * len(pairs)), int(0.8 * len(pairs))
    return {"train": pairs[:a], "validation": pairs[a:b], "test": pairs[b:]}[split]


def ask(animal, asked, opening):
    *most, last = [ATTRIBUTES[a][0] for a in asked]
    return opening.format(animal, ", ".join(most) + " and " + last)


def answer(animal, asked, rng):
    """One answer, written with a care that differs from writer to writer."""
    haste = rng.random()
    said = []
    for attribute in asked:
        if rng.random() < 0.3 * haste:
            continue  # left out
        wrong = rng.random() < 0.5 * haste
        value = rng.choice([v for v in VALUES[attribute] if v != WORLD[animal][attribute]]) if wrong else WORLD[animal][attribute]
        said.append(state(attribute, value))
    if rng.random() < 0.7 * haste:  # nobody asked for it
        attribute = rng.choice([a for a in ATTRIBUTES if a not in asked])
        said.insert(rng.randint(0, len(said)), state(attribute, WORLD[animal][attribute]))
    if rng.random() < 0.3 * haste and said:
        said.append(rng.choice(said))
    if rng.random() < 0.4 * haste or not said:
        said.insert(rng.randint(0, len(said)), rng.choice(FILLERS))
    return " " + " ".join(said)


def draw(split, seed):
    """An endless stream of (rng, prompt, animal, asked)."""
    rng = random.Random(f"{split} {seed}")
    while True:
        animal, asked = rng.choice(questions(split))
        asked = rng.sample(asked, len(asked))
        yield rng, ask(animal, asked, rng.choice(OPENINGS)), animal, asked


def demonstrations(split):
    return [(prompt, answer(animal, asked, rng))
            for (rng, prompt, animal, asked), _ in zip(draw(split, "demonstrations"), range(SIZES[split]))]


def comparisons(split, k=2, reward=gold):
    """(prompt, k responses, best first by noisy labels): Gumbel noise on the scaled reward makes every pair Bradley–Terry."""
    noise = np.random.default_rng(0).gumbel(size=(SIZES[split], k)).tolist()
    result = []
    for (rng, prompt, animal, asked), z in zip(draw(split, "comparisons"), noise):
        responses = [answer(animal, asked, rng) for _ in range(k)]
        label = {i: LABEL_SCALE * reward(prompt, r) + z[i] for i, r in enumerate(responses)}
        best_first = sorted(label, key=label.get, reverse=True)
        result.append(Comparison(prompt, [responses[i] for i in best_first], ranks=list(range(k))))
    return result


def completeness(split):
    """(prompt, four responses, the most complete first), by labels as noisy as those of `comparisons`."""
    return comparisons(split, 4, lambda prompt, response: axes(prompt, response)["completeness"])


def spans(split):
    """(prompt, response, [(start, end, category), …]), in characters of the response."""
    result = []
    for (rng, prompt, animal, asked), _ in zip(draw(split, "spans"), range(SIZES[split])):
        response = answer(animal, asked, rng)
        result.append((prompt, response, annotate(prompt, response, rng)))
    return result


def annotate(prompt, response, rng):
    """The spans of an annotator who gives a sentence one mark at most, and does not ask of what is beside the point whether it is true.

    (The annotators of arXiv:2306.01693 had the same rules.)
    """
    animal, asked = parse_prompt(prompt)
    marks, before = [], set()
    for match in re.finditer(r"\S[^.]*\.", response):
        attribute, value = SENTENCES.get(match[0], (None, None))
        category = ("Redundant" if match[0] in before else "Irrelevant" if attribute not in asked
                    else "Wrong-Grounding" if WORLD[animal][attribute] != value else None)
        if rng.random() < SLIPS:
            category = rng.choice([None, "Irrelevant", "Wrong-Grounding"])
        before.add(match[0])
        if category:
            marks.append((*match.span(), category))
    return marks


def prompts(split):
    """Every prompt of the split, once, in a fixed random order."""
    every = [ask(animal, asked, opening) for animal, pair in questions(split) for asked in permutations(pair) for opening in OPENINGS]
    random.Random(0).shuffle(every)
    return every


# ------------------------------------------------------------------------------------------------ the tokenizer

@cache
def tokenizer():
    """256 bytes and the world's words: "mice", " mice" and "." are one token each, any other text is spelled in bytes."""
    pattern = r" ?\p{L}+| ?[^\s\p{L}]+|\s+"
    text = [o.format("the", "and , .") for o in OPENINGS] + [q for q, _ in ATTRIBUTES.values()] + list(SENTENCES) + list(WORLD)
    words = {space + w for t in text for w in re.findall(r"[A-Za-z]+", t) for space in ("", " ")}
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {w.encode(): 256 + i for i, w in enumerate(sorted(w for w in words if len(w) > 1))}
    return tiktoken.Encoding("animals", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)})
