"""README.md's table from equation to line, and its list of files: each line still says it. Run as a script, this file puts the numbers right."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LINK = re.compile(r"\[`([\w/.]+):(\d+)`\]\(([\w/.]+)#L(\d+)\) `([^`]+)`")  # [`dpo.py:97`](dpo.py#L97) `code`
TABLE = re.search(r"^## From equation to line\n(.*?)^## ", README.read_text(encoding="utf-8"), re.M | re.S)[1]
ROWS = LINK.findall(TABLE)


def places(file, code):
    """The numbers of the lines that contain `code`."""
    return [n for n, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1) if code in line.strip()]


def renumber(text):
    """`text` with the number of the line where the code of each row stands now, if it stands on one line alone."""
    def right(row):
        file, code, found = row[1], row[5], places(row[1], row[5])
        return f"[`{file}:{found[0]}`]({file}#L{found[0]}) `{code}`" if len(found) == 1 else row[0]
    return LINK.sub(right, text)


def recount(text):
    """`text` with the lines that the files of each row of the list have now; of a folder, of the .py files in it."""
    def right(row):
        paths = [ROOT / path for path in re.findall(r"\]\(([\w/.]+)\)", row[1])]
        files = [file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])]
        return f"{row[1]} | {sum(len(file.read_text(encoding='utf-8').splitlines()) for file in files):,} | "
    return re.sub(r"^(\| \[`.*\)) \| [\d,]+ \| ", right, text, flags=re.M)


@pytest.mark.parametrize("file, number, target, anchor, code", ROWS, ids=[":".join(row[:2]) for row in ROWS])
def test_the_line_says_it(file, number, target, anchor, code):
    assert (target, anchor) == (file, number), f"README.md links {file}:{number} to {target}#L{anchor}"
    found = places(file, code)
    assert len(found) < 2, f"`{code}` stands on lines {found} of {file}: README.md has to quote more of its line"
    assert found, f"no line of {file} says `{code}` any more: README.md has to quote what now says the equation"
    assert found == [int(number)], f"README.md says {file}:{number}, it is [`{file}:{found[0]}`]({file}#L{found[0]}) (python tests/test_equations.py)"


def test_every_row_has_a_line_and_every_stage_a_row():
    rows = re.findall(r"^\|.*\|$", TABLE, re.M)[2:]
    assert rows and all(len(LINK.findall(row)) == 1 and len(re.split(r"(?<!\\)\|", row)) == 6 for row in rows)
    stages = {path.name for path in ROOT.glob("*.py") if re.search(r"^RECIPES = ", path.read_text(encoding="utf-8"), re.M)}
    assert len(stages) == 6 and stages <= {file for file, *_ in ROWS}


def test_wrong_numbers_are_put_right():
    assert renumber(re.sub(r"(?<=\.py:)\d+(?=`\])|(?<=#L)\d+(?=\) `)", "1", TABLE)) == renumber(TABLE)


def test_the_list_of_files_counts_their_lines():
    text = README.read_text(encoding="utf-8")
    assert text.count("`](") > 60 and recount(text) == text, "python tests/test_equations.py counts them anew"


if __name__ == "__main__":
    README.write_text(recount(renumber(README.read_text(encoding="utf-8"))), encoding="utf-8")
