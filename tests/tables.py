"""The tables of wrappers in docstrings."""

import re


def rows(function):
    """What stands in each row of the docstring, by the wrapper that it names."""
    found = re.findall(r"^    - `([\w.]+)`:((?:.+\n)(?:      .+\n)*)", function.__doc__, re.M)
    return {name: " ".join(text.split()) for name, text in found}
