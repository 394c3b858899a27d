"""IMDb reviews (Maas et al. 2011) and the DPO paper's sentiment experiment (arXiv:2305.18290 §6.1 and C.1).

Looks for DATA_DIR/imdb/aclImdb_v1.tar.gz and downloads it if it is missing. The archive is read without being
unpacked, and only its members aclImdb/{train,test}/{pos,neg}/ID_RATING.txt are read, 25,000 of each
split. A fixed random tenth of the test reviews becomes the validation split.

    prompt     the first 2 to 8 tokens of a review
    response   the rest of the review

The true reward is the score of a sentiment model, which reward.py trains on the labels of the reviews. It
compares a positive with a negative review, both as responses to the empty prompt. Bradley–Terry then fits
P(a is the positive one of a and b) = σ(r(a) − r(b)), which holds if r is the log-odds that a text is
positive, up to a constant. So the reward model is a sentiment classifier. Because it was trained with empty
prompts, it reads a prefix and a response as one text, the beginning of a review. (The paper's reward is the
probability that a RoBERTa classifier gives.)

These commands draw the paper's frontier (Figure 2, left):

    python sft.py imdb
    python reward.py imdb
    python sample.py out/sft-imdb --rank=out/reward-imdb --n=25000 --out=out/imdb-pairs.jsonl
    for beta in 0.05 0.1 1 5; do python dpo.py imdb --beta=$beta --out=out/dpo-imdb-beta$beta; done
    for kl in 3 6 9 12; do python ppo.py imdb --kl_target=$kl --out=out/ppo-imdb-kl$kl; done
    python evaluate.py out/sft-imdb out/dpo-imdb-beta* out/ppo-imdb-kl* --data=imdb \\
        --reward_model=out/reward-imdb --frontier --plot=f.png

The curve ends below 2.4 nats (docs/measuring.md says why), left of all four runs of PPO. Their gaps stay empty,
with a bound beside them.

All stages use the same max_len. A longer text loses its end, and with it the EOS. sample.py samples a little
beyond max_len, so a completion that has not ended by then loses its EOS too, and no stage mistakes the place
where sampling stopped for the end of a review.
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
PREFIX = (2, 8)  # smallest and largest number of tokens in a prompt


class IMDB:
    def __init__(self, data_dir):
        self.data_dir = data_dir
        self.read = cache(self.read)
        self.demonstrations = cache(self.demonstrations)

    def tokenizer(self):
        return get_tokenizer("gpt2")

    def read(self):
        """Returns {"train": [(text, is_positive), …], "test": […]}, each in a fixed random order."""
        path = fetch(os.path.join(self.data_dir, "imdb", "aclImdb_v1.tar.gz"), URL, SHA256)
        # (split, label) -> {ID: text}
        texts = {("train", "pos"): {}, ("train", "neg"): {}, ("test", "pos"): {}, ("test", "neg"): {}}
        where = path
        try:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    match = MEMBER.fullmatch(member.name)
                    if not match or not member.isfile():
                        continue
                    where = f"{path}: {member.name}"
                    text = archive.extractfile(member).read().decode("utf-8")
                    if not text.strip():
                        raise SystemExit(f"{where}: an empty review")
                    split, label, review_id = match.groups()
                    texts[split, label][int(review_id)] = text
        except (OSError, EOFError, zlib.error, tarfile.TarError, UnicodeDecodeError) as error:
            raise SystemExit(f"{where}: cannot be read ({error})")

        reviews = {"train": [], "test": []}
        for (split, label), texts_by_id in texts.items():
            if not texts_by_id:
                raise SystemExit(f"{path}: holds no review aclImdb/{split}/{label}/ID_RATING.txt")
            for review_id in sorted(texts_by_id):
                reviews[split].append((texts_by_id[review_id], label == "pos"))
        for split in reviews:
            random.Random(split).shuffle(reviews[split])
        return reviews

    def reviews(self, split):
        """Returns [(text, is_positive), …]."""
        if split == "train":
            return self.read()["train"]
        held_out = self.read()["test"]
        tenth = len(held_out) // 10
        if split == "validation":
            return held_out[:tenth]
        return held_out[tenth:]

    def demonstrations(self, split):
        """Returns [(prefix, rest of the review), …].

        The length of a prefix is drawn from PREFIX, but the rest keeps at least one token.
        """
        rng = random.Random(f"prefixes of {split}")
        tokenizer = self.tokenizer()
        texts = [text for text, _ in self.reviews(split)]
        beginnings = encode(tokenizer, [text[:200] for text in texts])  # long enough for every prefix
        examples = []
        for text, ids in zip(texts, beginnings):
            n = min(rng.randint(*PREFIX), len(ids) - 1)
            # A token may end inside a character; the prefix ends before that character.
            prefix = tokenizer.decode_bytes(ids[:n].tolist()).decode("utf-8", "ignore")
            examples.append((prefix, text[len(prefix):]))
        return examples

    def prompts(self, split):
        return [prefix for prefix, _ in self.demonstrations(split)]

    def comparisons(self, split, k=2):
        """Pairs positive with negative reviews, as responses to the empty prompt. Uses no review twice."""
        if k != 2:
            raise SystemExit(f"--k={k}: imdb compares a positive with a negative review, K is 2")
        reviews = self.reviews(split)
        positive = [text for text, is_positive in reviews if is_positive]
        negative = [text for text, is_positive in reviews if not is_positive]
        return [Comparison("", list(pair), ranks=[0, 1]) for pair in zip(positive, negative)]
