"""IMDb reviews (Maas et al. 2011) and the controlled sentiment experiment of the DPO paper (arXiv:2305.18290 §6.1 and C.1).

DATA_DIR/imdb/aclImdb_v1.tar.gz is fetched where it is missing and read as it is: nothing is unpacked, and of its members only
aclImdb/{train,test}/{pos,neg}/ID_RATING.txt are read, 25,000 and 25,000. A tenth of the test reviews, drawn once, is for validation.

    prompt     the first 2 to 8 tokens of a review          response    the rest of it

The true reward is the score of a sentiment model that reward.py trains on the labels. Its comparisons are a positive and a negative
review after one and the same prompt, the empty one: then P(a is the positive one of a, b) = σ(log-odds(a) − log-odds(b)), so that
Bradley–Terry's r is the log-odds that a classifier of single texts has, up to one constant for all texts, and reads prefix and
response as what they are together, the beginning of a review. (The paper's classifier was a RoBERTa, its reward a probability.)

The paper's frontier (Figure 2, left) is

    python sft.py imdb
    python reward.py imdb
    python sample.py out/sft-imdb --pairs=out/imdb-pairs.jsonl --reward_model=out/reward-imdb
    for beta in 0.05 0.1 1 5; do python dpo.py imdb --beta=$beta --out=out/dpo-imdb-beta$beta; done
    for kl in 3 6 9 12; do python ppo.py imdb --kl_target=$kl --out=out/ppo-imdb-kl$kl; done
    python evaluate.py out/sft-imdb out/dpo-imdb-beta* out/ppo-imdb-kl* --data=imdb --reward_model=out/reward-imdb --frontier --plot=f.png

A text that is longer than max_len, the same in all stages, loses its end and its EOS with it; a completion that did not end is sampled
beyond max_len, so that no stage takes the place where sampling stopped for an end.
"""
import os
import random
import re
import tarfile
import zlib
from functools import cache

from data.schema import Comparison
from data.tokenizers import encode, get_tokenizer
from engine.files import fetch

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
MEMBER = re.compile(r"aclImdb/(train|test)/(pos|neg)/(\d+)_\d+\.txt")
PREFIX = (2, 8)  # tokens of a prompt, both included


class IMDB:
    def __init__(self, data_dir):
        self.data_dir = data_dir
        self.read, self.demonstrations = cache(self.read), cache(self.demonstrations)

    def tokenizer(self):
        return get_tokenizer("gpt2")

    def read(self):
        """{"train": [(text, is it positive), …], "test": …}, in one shuffled order."""
        path = where = fetch(os.path.join(self.data_dir, "imdb", "aclImdb_v1.tar.gz"), URL, SHA256)
        found = {(split, label): {} for split in ("train", "test") for label in ("pos", "neg")}
        try:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    match = MEMBER.fullmatch(member.name)
                    if match and member.isfile():
                        where = f"{path}: {member.name}"
                        found[match[1], match[2]][int(match[3])] = text = archive.extractfile(member).read().decode("utf-8")
                        if not text.strip():
                            raise SystemExit(f"{where}: an empty review")
        except (OSError, EOFError, zlib.error, tarfile.TarError, UnicodeDecodeError) as error:
            raise SystemExit(f"{where}: cannot be read ({error})")
        for (split, label), texts in found.items():
            if not texts:
                raise SystemExit(f"{path}: holds no review aclImdb/{split}/{label}/ID_RATING.txt")
        reviews = {split: [(texts[i], label == "pos") for (s, label), texts in found.items() if s == split for i in sorted(texts)]
                   for split in ("train", "test")}
        for split in reviews:
            random.Random(split).shuffle(reviews[split])
        return reviews

    def reviews(self, split):
        """[(text, is it positive), …]"""
        if split == "train":
            return self.read()["train"]
        reviews = self.read()["test"]
        tenth = len(reviews) // 10
        return reviews[:tenth] if split == "validation" else reviews[tenth:]

    def demonstrations(self, split):
        """(prefix, the rest of the review); prefixes of PREFIX tokens, and one less than all of a review that is as short."""
        texts, rng, examples = [text for text, _ in self.reviews(split)], random.Random(f"prefixes of {split}"), []
        for text, ids in zip(texts, encode(self.tokenizer(), [text[:200] for text in texts])):
            n = min(rng.randint(*PREFIX), len(ids) - 1)
            prefix = self.tokenizer().decode_bytes(ids[:n].tolist()).decode("utf-8", "ignore")  # a token may end inside a character
            examples.append((prefix, text[len(prefix):]))
        return examples

    def prompts(self, split):
        return [prefix for prefix, _ in self.demonstrations(split)]

    def comparisons(self, split, k=2):
        """An empty prompt, a positive review and a negative one: each review once."""
        if k != 2:
            raise SystemExit(f"--k={k}: the comparisons of imdb are pairs of a positive and a negative review, K is 2")
        positive, negative = ([text for text, good in self.reviews(split) if good == label] for label in (True, False))
        return [Comparison("", [p, n], ranks=[0, 1]) for p, n in zip(positive, negative)]
