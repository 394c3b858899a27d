"""docs/equations.md: every quoted line stands in the function that its row names; every stage has a row."""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "equations.md"
ROWS = re.findall(r"\[`([\w/.]+)`\]\(\.\./([\w/.]+)\) `(\w+)`: `([^`]+)`", PAGE.read_text(encoding="utf-8"))


def normalized(code):
    """Without line breaks and indentation, so that a statement may be wrapped."""
    return " ".join(code.split())


def functions(file, name):
    """The source of each function of that name in a file."""
    source = (ROOT / file).read_text(encoding="utf-8")
    nodes = ast.walk(ast.parse(source))
    return [ast.get_source_segment(source, node) for node in nodes
            if isinstance(node, ast.FunctionDef) and node.name == name]


IDS = [f"{row[0]}:{row[2]}:{i}" for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("file, link, function, line", ROWS, ids=IDS)
def test_the_quoted_line_stands_in_its_function(file, link, function, line):
    assert link == file, f"docs/equations.md links {file} to {link}"
    sources = functions(file, function)
    assert sources, f"{file} has no function {function}: docs/equations.md names it"
    assert any(normalized(line) in normalized(source) for source in sources), \
        f"`{line}` is no longer in {function} of {file}: let docs/equations.md quote what replaced it"


def test_every_row_quotes_a_line_and_every_stage_has_a_row():
    table = re.findall(r"^\|.*\|$", PAGE.read_text(encoding="utf-8"), re.M)[2:]
    assert len(table) == len(ROWS) >= 45
    assert all(len(re.split(r"(?<!\\)\|", row)) == 6 for row in table)
    stages = {"sft.py", "reward.py", "ppo.py", "dpo.py", "simpo.py", "finegrained.py"}
    assert stages <= {file for file, *_ in ROWS}
