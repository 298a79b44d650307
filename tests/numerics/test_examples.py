"""The examples of the documentation run as they stand."""

import re

import pytest

PAGE = "docs/how-to/monte-carlo-arithmetic.md"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", range(3))
def test_example_of_the_documentation_runs(root, number):
    blocks = re.findall(r"```python\n(.*?)```", (root / PAGE).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    exec(compile(blocks[number], f"{PAGE}, example {number + 1}", "exec"), {})
