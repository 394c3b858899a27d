"""TL;DR and IMDb: small files of the published schemas, what is said of bad ones, and every stage of the recipes on them."""
import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import SHARED, feedback, make_model

import dpo
import engine.files
import evaluate
import reward
import sample
import sft
from common import models
from common.checkpoints import save_checkpoint
from common.models import load_model
from common.optim import make_optimizer
from common.options import RunConfig, parse
from common.prerequisites import run_dir
from common.run import Run
from common.scoring import scores_of_responses
from data import dataset, encode_groups, encode_pairs, encode_prompts, get_tokenizer, imdb, tldr
from data.imdb import MEMBER
from data.jsonl import Jsonl
from data.schema import Comparison
from sample import ranked

ROOT = Path(__file__).parents[1]
SMALL = ["--device=cpu", "--steps=2", "--batch_size=4", "--warmup=0", "--eval_n=2"]
SCRATCH = ["--init=scratch", "--n_layer=1", "--n_head=2", "--n_embd=16"]

needs_gpt2 = pytest.mark.skipif(not (SHARED / "tiktoken").is_dir(), reason="the GPT-2 encoding is not beside the checkout")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Nothing is fetched; the animals tokenizer, which spells foreign text in bytes, stands in for GPT-2's."""
    def refuse(url, *args, **kwargs):
        raise OSError("no route")
    monkeypatch.setattr(engine.files, "urlopen", refuse)
    for dataset_class in (tldr.TLDR, imdb.IMDB):
        monkeypatch.setattr(dataset_class, "tokenizer", lambda self: get_tokenizer("animals"))


def run(stage, *argv):
    return stage.train(parse(stage.Config, stage.RECIPES, list(argv)))


# ------------------------------------------------------------------------------------------------ tldr

def post(i):
    return {"id": f"t3_{i}", "subreddit": "tifu", "title": f"TIFU {i} times", "post": f"It was {i} o'clock.\nThen it was not."}


def compared(i, split="train", choice=1, **changes):
    summaries = [{"text": f" Model's {i}.", "policy": "sup2", "note": None}, {"text": f"Human's {i}", "policy": "ref", "note": "n"}]
    return {"info": post(i), "summaries": summaries, "choice": choice, "worker": "w", "batch": "batch3", "split": split,
            "extra": {"confidence": 8}} | changes


def lines(records):
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


@pytest.fixture
def tldr_files(tmp_path):
    """DATA_DIR with all files of TL;DR: batch3 has training comparisons, batch11 the others, the rest nothing."""
    (tmp_path / "tldr/comparisons").mkdir(parents=True)
    for name, n in (("train", 8), ("valid", 4), ("test", 3)):
        (tmp_path / f"tldr/{name}.jsonl").write_text(lines(post(i) | {"summary": f"{name} {i}"} for i in range(n)))
    for batch in tldr.BATCHES:
        (tmp_path / f"tldr/comparisons/{batch}.json").write_text("")
    (tmp_path / "tldr/comparisons/batch3.json").write_text(lines([compared(i, choice=i % 2) for i in range(8)] + [compared(8, "valid1")]))
    (tmp_path / "tldr/comparisons/batch11.json").write_text(lines([compared(9, "valid2"), compared(10, "train"), compared(11, "valid1")]))
    return tmp_path


def test_tldr_is_written_as_in_the_paper(tldr_files):
    data = dataset("tldr", str(tldr_files))
    text = "SUBREDDIT: r/tifu\n\nTITLE: TIFU 2 times\n\nPOST: It was 2 o'clock.\nThen it was not.\n\nTL;DR:"
    assert data.demonstrations("train")[2] == (text, " train 2")
    pairs = data.comparisons("train")
    assert pairs[2] == Comparison(text, [" Model's 2.", " Human's 2"], [0, 1])  # choice 0; one space
    assert pairs[3][1:] == ([" Human's 3", " Model's 3."], [0, 1])              # choice 1
    assert data.prompts("train") == [prompt for prompt, _ in data.demonstrations("train")]
    assert [len(data.demonstrations(split)) for split in ("train", "validation", "test")] == [8, 4, 3]
    with pytest.raises(SystemExit, match="--k=4: .*K is 2"):
        data.comparisons("train", 4)


def test_a_bad_record_of_the_test_split_stops_a_run_before_it_begins(tldr_files, tmp_path):
    for name, data in (("tldr", "tldr"), ("mine", str(tmp_path / "my_feedback.json"))):
        (tmp_path / "tldr/test.jsonl").write_text(lines([post(0) | {"summary": 3}]))
        (tmp_path / "my_feedback.json").write_text(json.dumps([feedback(question=f"{i}?") for i in range(11)] + [feedback(question=5)]))
        with pytest.raises(SystemExit, match="test.jsonl:1: 'summary' must be text|my_feedback.json: record 11: 'question'"):
            Run("sft", RunConfig(data=data, data_dir=str(tldr_files), out=str(tmp_path / f"out-{name}"), device="cpu"))
        assert not (tmp_path / f"out-{name}").exists()


def test_the_split_of_a_comparison_is_its_own_whatever_its_batch(tldr_files, capsys):
    data = dataset("tldr", str(tldr_files))

    def titles(split):
        return [prompt.split("TIFU ")[1].split()[0] for prompt, _, _ in data.comparisons(split)]
    assert titles("train") == [*"01234567", "10"] and titles("validation") == ["8", "11"] and titles("test") == ["9"]
    path = tldr_files / "tldr/comparisons/batch22.json"
    path.write_text(lines([compared(0, summaries=[{"text": " "}, {"text": " b"}])]))
    assert len(dataset("tldr", str(tldr_files)).comparisons("train")) == 9
    assert "tldr: left out 1 comparisons of the train split with an empty summary" in capsys.readouterr().out


BAD = [
    ({"choice": 2}, "'choice' must be 0 or 1, .*found 2"), ({"choice": "1"}, "'choice' .*found '1'"), ({"choice": 1.0}, "'choice'"),
    ({"choice": None}, "'choice'"), ({"choice": True}, "'choice'"),
    ({"split": "valid3"}, "unknown split 'valid3'; there are train, valid1, valid2"),
    ({"split": ["train"]}, "'split' must be text, found list"), ({"info": [1]}, "'info' must be an object, found list"),
    ({"info": None}, "'info' must be an object, found NoneType"),
    ({"info": {"title": "t", "subreddit": "s"}}, "'post' must be text, it is missing"),
    ({"info": post(0) | {"title": 3}}, "'title' must be text, found int"), ({"summaries": {}}, "'summaries' must be a list, found dict"),
    ({"summaries": [{"text": "a"}]}, "'summaries' must be two objects"), ({"summaries": ["a", "b"]}, "'summaries' must be two"),
    ({"summaries": [{"text": "a"}, {"text": None}]}, "'text' must be text, found NoneType")]


@pytest.mark.parametrize("change, message", [*BAD, ("{", "not JSON"), ("7", "expected an object")])
def test_a_bad_comparison_is_named(tldr_files, change, message):
    bad = change if isinstance(change, str) else compared(1, **change)
    (tldr_files / "tldr/comparisons/batch4.json").write_text(lines([compared(0), bad]))
    with pytest.raises(SystemExit, match="batch4.json:2: " + message) as error:
        dataset("tldr", str(tldr_files)).comparisons("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"summary": 1}, {"post": None}, {"subreddit": ["a"]}])
def test_a_bad_post_is_named(tldr_files, change):
    (tldr_files / "tldr/valid.jsonl").write_text(lines([post(0) | {"summary": "s"}, post(1) | {"summary": "s"} | change]))
    with pytest.raises(SystemExit, match=f"valid.jsonl:2: '{[*change][0]}' must be text, found") as error:
        dataset("tldr", str(tldr_files)).prompts("validation")
    assert "\n" not in str(error.value)


def test_tldr_is_fetched_from_where_it_is_published_if_missing(tldr_files):
    base = "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
    for name, folder in (("test.jsonl", "datasets/tldr_3_filtered"), ("comparisons/batch20.json", "dataset")):
        (tldr_files / "tldr" / name).unlink()
        with pytest.raises(SystemExit, match=f"tldr/{name} is missing and {base}/{folder}/{name} cannot be fetched"):
            data = dataset("tldr", str(tldr_files))
            data.comparisons("train") if "batch" in name else data.demonstrations("test")


def test_sft_and_dpo_on_tldr(tldr_files, monkeypatch):
    monkeypatch.chdir(tldr_files)
    run(sft, "tldr", f"--data_dir={tldr_files}", *SMALL, *SCRATCH, "--max_len=64")
    run(dpo, "tldr", f"--data_dir={tldr_files}", *SMALL, "--max_len=64")
    assert len(Path("out/dpo-tldr/log.jsonl").read_text().splitlines()) == 2
    assert json.load(open("out/dpo-tldr/eval.json"))[1]["checkpoint"] == "out/dpo-tldr"


# ------------------------------------------------------------------------------------------------ imdb

GOOD, BAD_WORDS, OTHERS = ("loved superb great".split(), "awful dull hated".split(), "the film was with its plot and a scene".split())


def review(rng, words):
    return "This film " + " ".join(rng.choice(words if rng.random() < 0.4 else OTHERS) for _ in range(20)) + "."


def archive(folder, members):
    """A tar.gz of (name, text) where the IMDb archive is looked for."""
    (folder / "imdb").mkdir(exist_ok=True)
    with tarfile.open(folder / "imdb/aclImdb_v1.tar.gz", "w:gz") as tar:
        for name, text in members:
            content = text if isinstance(text, bytes) else text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def some_reviews(train=12, test=20):
    rng = random.Random(0)
    return [(f"aclImdb/{split}/{label}/{i}_{9 if label == 'pos' else 2}.txt", review(rng, GOOD if label == "pos" else BAD_WORDS))
            for split, n in (("train", train), ("test", test)) for label in ("pos", "neg") for i in range(n)]


@pytest.fixture
def imdb_files(tmp_path, monkeypatch):
    monkeypatch.setattr(imdb, "SHA256", None)
    archive(tmp_path, some_reviews())
    return tmp_path


@pytest.mark.parametrize("name", ["animals", pytest.param("gpt2", marks=needs_gpt2)])
def test_imdb_prefixes_and_splits(imdb_files, name, monkeypatch):
    tokenizer, published = get_tokenizer(name), dict(some_reviews())
    monkeypatch.setattr(imdb.IMDB, "tokenizer", lambda self: tokenizer)
    data = dataset("imdb", str(imdb_files))
    by_split = {split: data.demonstrations(split) for split in ("train", "validation", "test")}
    assert {split: len(examples) for split, examples in by_split.items()} == {"train": 24, "validation": 4, "test": 36}
    assert sorted(p + r for p, r in by_split["train"]) == sorted(text for name, text in published.items() if "/train/" in name)
    held_out = by_split["validation"] + by_split["test"]
    assert sorted(p + r for p, r in held_out) == sorted(text for name, text in published.items() if "/test/" in name)
    lengths = {len(ids) for split in by_split for ids in encode_prompts(tokenizer, data.prompts(split))}
    assert lengths == set(range(2, 9))
    again = dataset("imdb", str(imdb_files))
    assert all(again.demonstrations(split) == by_split[split] for split in by_split)


def test_short_reviews_and_characters_of_several_tokens_are_cut_somewhere(imdb_files):
    reviews = [("aclImdb/train/pos/0_9.txt", "𒀀𒀁𒀂 è bello."), ("aclImdb/train/neg/0_1.txt", "No."), ("aclImdb/test/pos/0_9.txt", "Yes"),
               ("aclImdb/test/neg/0_1.txt", "Read the book, forget the movie!")]
    archive(imdb_files, reviews)
    data = dataset("imdb", str(imdb_files))  # the first character is four tokens
    assert {p + r for split in ("train", "test") for p, r in data.demonstrations(split)} == {text for _, text in reviews}
    assert ("N", "o.") in data.demonstrations("train") or ("No", ".") in data.demonstrations("train")
    assert all("�" not in prompt for prompt in data.prompts("train"))


def test_imdb_comparisons_are_labels_after_one_prompt(imdb_files):
    data = dataset("imdb", str(imdb_files))
    pairs, published = data.comparisons("train"), dict(some_reviews())
    assert len(pairs) == 12 and all(prompt == "" and ranks == [0, 1] for prompt, _, ranks in pairs)
    for i, label in enumerate(("pos", "neg")):
        texts = [text for name, text in published.items() if f"train/{label}" in name]
        assert sorted(pair.responses[i] for pair in pairs) == sorted(texts)
    with pytest.raises(SystemExit, match="--k=8: .*K is 2"):
        data.comparisons("train", 8)


def test_only_reviews_are_read_and_nothing_is_written(imdb_files):
    evil = [("../../x", "out"), ("/etc/x", "out"), ("aclImdb/../aclImdb/train/pos/7_9.txt", "out"), ("aclImdb/train/unsup/7_0.txt", "out"),
            ("aclImdb/train/pos/../../../7_9.txt", "out"), ("aclImdb/README", "out")]
    archive(imdb_files, evil + some_reviews())
    with tarfile.open(imdb_files / "link.tar", "w") as tar:  # a link in the place of a review
        link = tarfile.TarInfo("aclImdb/train/pos/99_9.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        for name, text in some_reviews():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    before = sorted(imdb_files.rglob("*"))
    texts = [text for text, _ in dataset("imdb", str(imdb_files)).reviews("train")]
    assert len(texts) == 24 and "out" not in texts and not any(MEMBER.fullmatch(name) for name, _ in evil)
    (imdb_files / "link.tar").replace(imdb_files / "imdb/aclImdb_v1.tar.gz")
    with pytest.raises(SystemExit, match="aclImdb_v1.tar.gz: cannot be read"):  # nor is it gzipped
        dataset("imdb", str(imdb_files)).reviews("train")
    assert sorted(imdb_files.rglob("*")) == [p for p in before if p.name != "link.tar"]


@pytest.mark.parametrize("members, message", [
    ([("aclImdb/test/neg/3_1.txt", b"\xff\xfe")], "aclImdb_v1.tar.gz: aclImdb/test/neg/3_1.txt: cannot be read .*utf-8"),
    ([("aclImdb/train/pos/3_9.txt", " \n")], "aclImdb_v1.tar.gz: aclImdb/train/pos/3_9.txt: an empty review"),
    (None, "aclImdb_v1.tar.gz: holds no review aclImdb/train/pos/ID_RATING.txt")])
def test_a_bad_archive_is_named(imdb_files, members, message):
    archive(imdb_files, [("x", "y")] if members is None else some_reviews() + members)
    with pytest.raises(SystemExit, match=message) as error:
        dataset("imdb", str(imdb_files)).comparisons("train")
    assert "\n" not in str(error.value)


def test_an_archive_that_is_cut_short_foreign_or_missing(imdb_files, monkeypatch):
    path = imdb_files / "imdb/aclImdb_v1.tar.gz"
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"plain text", whole[:200] + b"\xff" * 400):
        path.write_bytes(content)  # tarfile takes some damage for the archive's end
        with pytest.raises(SystemExit, match="aclImdb_v1.tar.gz: (.*cannot be read|holds no review)") as error:
            dataset("imdb", str(imdb_files)).reviews("test")
        assert "\n" not in str(error.value)
    monkeypatch.setattr(imdb, "SHA256", "0" * 64)
    with pytest.raises(SystemExit, match="is not the published file .its sha256 differs"):
        dataset("imdb", str(imdb_files)).reviews("test")
    path.unlink()
    with pytest.raises(SystemExit, match="tar.gz is missing and https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz cannot"):
        dataset("imdb", str(imdb_files)).reviews("test")


def test_ranked_by_hand():
    """The best first; of four labels two are equal, so the record says who ties with whom."""
    assert ranked("p", [" a", " b", " d"], [0.5, 2.0, 1.0]) == {"prompt": "p", "responses": [" b", " d", " a"]}
    assert ranked("p", [" a", " b", " c", " d"], [0.5, 2.0, 9.0, 2.0]) == {
        "prompt": "p", "responses": [" c", " b", " d", " a"], "ranks": [0, 1, 1, 2]}


def test_the_sentiment_experiment_in_miniature(imdb_files, monkeypatch, capsys):
    """The commands at the head of data/imdb.py: SFT, reward model, pairs, DPO, the frontier."""
    monkeypatch.chdir(imdb_files)
    make = ["out/sft-imdb", "--rank=out/reward-imdb", "--n=25000", "--out=out/imdb-pairs.jsonl"]
    command = f"python sample.py {' '.join(make)}"
    assert f"    {command}\n" in imdb.__doc__
    with pytest.raises(SystemExit, match=f"out/imdb-pairs.jsonl: no such file.*; `{command}` makes it"):
        run(dpo, "imdb", *SMALL)
    run(sft, "imdb", f"--data_dir={imdb_files}", *SMALL, *SCRATCH, "--max_len=48")
    run(reward, "imdb", f"--data_dir={imdb_files}", *SMALL, "--max_len=24")
    with pytest.raises(SystemExit, match="--max_len=136: the context of out/sft-imdb is 48 tokens"):
        sample.main([*make, "--max_len=136"])
    with pytest.raises(SystemExit, match="out/sft-imdb: not a reward model"):
        sample.main([make[0], "--rank=out/sft-imdb", make[3]])
    assert not Path("out/imdb-pairs.jsonl").exists()
    sample.main([*make, "--n=5", "--max_len=24"])
    records = [json.loads(line) for line in open("out/imdb-pairs.jsonl")]
    assert {r["prompt"] for r in records} < set(dataset("imdb", str(imdb_files)).prompts("train"))
    assert [len(r["responses"]) for r in records] == [4] * 5
    run(dpo, "imdb", *SMALL, "--beta=0.05", "--max_len=24", "--out=out/dpo-imdb-beta0.05")
    capsys.readouterr()
    evaluate.main(["out/sft-imdb", "out/dpo-imdb-beta0.05", "--data=imdb", "--reward_model=out/reward-imdb", "--frontier", "--n=2",
                   "--samples=48"])
    out = capsys.readouterr().out
    assert "the most score that any policy can have" in out and "out/dpo-imdb-beta0.05" in out


def test_pairs_are_in_the_order_of_the_reward_of_what_dpo_reads(imdb_files, monkeypatch):
    """The chosen text, encoded and cut as dpo.py does it, scores above the rejected one."""
    monkeypatch.chdir(imdb_files)
    tokenizer = get_tokenizer("animals")
    for name, n_scalars in (("sft-imdb", 0), ("reward-imdb", 1)):
        (imdb_files / "out" / name).mkdir(parents=True)
        model = make_model(n_scalars, tokenizer.n_vocab, 48, n_layer=1, n_embd=16, n_scalars=n_scalars)
        save_checkpoint(f"out/{name}", 1, model, make_optimizer(model, 1e-3), sft.Config(), "animals")
    sample.main(["out/sft-imdb", "--rank=out/reward-imdb", "--out=deep/er/pairs.jsonl",
                 "--data=imdb", f"--data_dir={imdb_files}", "--n=8", "--max_len=16"])
    pairs = encode_pairs(tokenizer, dataset("deep/er/pairs.jsonl").comparisons("train"), 16, "")
    chosen, rejected = scores_of_responses(load_model("out/reward-imdb", require_policy=False)[0], pairs).view(-1, 2).unbind(1)
    assert len(pairs) > 10 and (chosen > rejected).all()


def test_a_completion_that_did_not_end_gets_no_eos():
    """Sampled SPARE tokens beyond max_len, it is cut to max_len, and the EOS that encode_groups adds is cut with it."""
    tokenizer = get_tokenizer("animals")
    mice, eos = tokenizer.encode(" mice")[0], tokenizer.eot_token

    class Policy:
        def generate(self, prompts, max_new_tokens, temperature, eos):
            assert temperature == 0.7
            return [[mice] * 3 + [eos] if i % 2 else [mice] * max_new_tokens for i in range(len(prompts))]
    examples = sample.complete(Policy(), tokenizer, ["It eats", "It"], 4, 16 + sample.SPARE, 16, 0.7, batch_size=1)
    assert [prompt for prompt, _ in examples] == ["It eats", "It"] and examples[0][1][1] == " mice mice mice"
    for prompt, responses in encode_groups(tokenizer, examples, 16):  # each text once
        assert [r.tolist() for r in responses] == [[mice] * (16 - len(prompt)), [mice] * 3 + [eos]]
    # If the model's context ends before max_len, a completion that did not end is left out.
    assert sample.complete(Policy(), tokenizer, ["It"], 4, 12, 16, 0.7) == [("It", [" mice mice mice"])]


def test_the_command_runs_from_any_folder(tmp_path):
    argv = [sys.executable, str(ROOT / "sample.py"), "--help"]
    out = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and "out/imdb-pairs.jsonl" in out.stdout, out.stderr


# ------------------------------------------------------------------------------------------------ Parquet and the hub

def shapes(i):
    """Four shapes in turn; a table gives every row all columns, and None where it has nothing."""
    return [{"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No idea."},
            {"messages": [{"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": "That too."}]},
            {"prompt": f"Only {i}"},
            {"prompt": f"Is it {i}?", "chosen": [{"role": "assistant", "content": "Yes."}], "rejected": [{"role": "assistant", "content": "No."}]}][i % 4]


def of_one_shape(which):
    return [shapes(4 * i + which) for i in range(40)]


def read_all(name):
    data = dataset(str(name))
    return [data.records(split) for split in ("train", "validation", "test")]


@pytest.fixture
def jsonl(tmp_path):
    def write(records):
        (tmp_path / "mine.jsonl").write_text(lines(records))
        return tmp_path / "mine.jsonl"
    return write


@pytest.mark.parametrize("which", range(4))
def test_a_parquet_file_is_read_as_lines_of_json(which, jsonl, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = of_one_shape(which)
    more = [record | {"id": 7, "score": None} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(more), tmp_path / "mine.parquet", row_group_size=7)
    assert read_all(tmp_path / "mine.parquet") == read_all(jsonl(records))
    assert run_dir("dpo", RunConfig(data=str(tmp_path / "mine.parquet"))) == "out/dpo-mine"


def test_bad_parquet_is_named(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "mine.parquet"

    def message():
        with pytest.raises(SystemExit) as error:
            read_all(path)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(path))
        return str(error.value)
    path.write_bytes(b"PAR1 no")
    assert ": not a Parquet file, or damaged (ArrowInvalid: " in message()
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": f"{i}", "completion": " a"} for i in range(50)] + [{"prompt": "b", "completion": ""}]), path)
    assert "mine.parquet:record 51: an empty response" in message()
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes(200) + whole[240:])
    assert ": not a Parquet file, or damaged (" in message()
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["prompt", "prompt"]), path)
    assert ": the column 'prompt' appears twice" in message()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert message() == f"{path} needs a package that is not installed: pip install pyarrow"


def test_a_parquet_file_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "mine.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit, match="mine.parquet needs a package that is not installed: pip install pyarrow$"):
        read_all(tmp_path / "mine.parquet")


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl", "saved to disk"])
def test_a_data_set_of_the_hub_is_read_as_lines_of_json(kind, which, jsonl, tmp_path, monkeypatch):
    """Whatever it holds: comparisons, conversations, prompts, comparisons of messages."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = of_one_shape(which)
    name, folder = f"hub:{tmp_path}/my-set", tmp_path / "my-set"
    if kind == "saved to disk":
        datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(folder)
        monkeypatch.setattr(datasets, "load_dataset", lambda path: datasets.load_from_disk(path))
    else:
        folder.mkdir()
        table = datasets.Dataset.from_list(records)
        if kind == "parquet":
            table.to_parquet(folder / "train-00000-of-00001.parquet")
        else:
            (folder / f"train.{kind}").write_text(json.dumps(records) if kind == "json" else lines(records))
    expected = read_all(jsonl(records))
    assert read_all(name) == read_all(name + ":train") == expected
    assert run_dir("dpo", RunConfig(data=name + ":train")) == "out/dpo-my-set"
    assert parse(dpo.Config, dpo.RECIPES, [f"--data={name}"]).recipe == "hh"  # the settings for real text


def test_which_split_of_the_hub_is_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def table(name):
        return datasets.Dataset.from_list([{"prompt": f"{name} {i}", "completion": " a"} for i in range(30)])
    offered = datasets.DatasetDict({"train_prefs": table("train"), "test_prefs": table("test")})
    monkeypatch.setattr(datasets, "load_dataset", lambda path: offered)
    assert read_all("hub:HuggingFaceH4/ultrafeedback_binarized:test_prefs")[0][0][0] == "test 2"
    for split in ("", ":nothing"):
        with pytest.raises(SystemExit, match="has no split '(train|nothing)', only train_prefs, test_prefs; name one as hub:a/b:SPLIT"):
            read_all("hub:a/b" + split)
    offered.pop("test_prefs")
    assert read_all("hub:a/b")[0][0][0] == "train 2"  # the only one
    offered["train"] = datasets.Dataset.from_list([{"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": ""}])
    with pytest.raises(SystemExit, match="^hub:a/b:record 2: an empty response$"):
        read_all("hub:a/b")


def test_a_data_set_of_the_hub_that_cannot_be_had(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")

    def refuse(path):
        raise ConnectionError("no route\nto the host")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(SystemExit, match="^--data=hub:a/b: cannot be loaded .ConnectionError: no route.$"):
        read_all("hub:a/b")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(SystemExit, match="datasets 3.6.0 is too old, since it may run code from the hub: pip install -U \"datasets>=4\"$"):
        read_all("hub:a/b")


def test_the_hub_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match='^--data=hub:a/b needs a package that is not installed: pip install "datasets>=4"$'):
        Run("sft", RunConfig(data="hub:a/b", out=str(tmp_path / "out"), device="cpu"))
    assert not (tmp_path / "out").exists()


def test_sft_and_dpo_on_a_data_set_and_a_model_of_the_hub(tmp_path, monkeypatch, capsys):
    """From a folder of the hub's files to a trained policy, which starts from GPT-2's vocabulary with some rows more."""
    datasets = pytest.importorskip("datasets")
    hub = pytest.importorskip("huggingface_hub")
    pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Jsonl, "tokenizer", lambda self: get_tokenizer("animals"))
    monkeypatch.setattr(models, "get_tokenizer", lambda name: get_tokenizer("animals"))
    (tmp_path / "my-set").mkdir()
    datasets.Dataset.from_list(of_one_shape(3)).to_parquet(tmp_path / "my-set" / "train-00000-of-00001.parquet")
    config = transformers.GPT2Config(vocab_size=50260, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "my-model", max_shard_size="1MB")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / "my-model"))
    settings = [f"--data=hub:{tmp_path}/my-set", "--max_len=64", *SMALL, "--eval_n=0"]  # no table: that tokenizer cannot decode GPT-2's ids
    run(sft, *settings, "--init=hub:me/my-model")
    run(dpo, *settings, "--init=out/sft-my-set")
    assert "hub:me/my-model: left out 3 rows of its vocabulary" in capsys.readouterr().out
    assert len(Path("out/dpo-my-set/log.jsonl").read_text().splitlines()) == 2
