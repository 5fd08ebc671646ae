"""The tables of wrappers in docstrings."""

import inspect
import re


def rows(function):
    """What stands in each row of the docstring, by the wrapper that it names."""
    # Python 3.13 takes the indentation off a docstring, and older ones do not.
    text = f"{inspect.getdoc(function)}\n"
    found = re.findall(r"^- `([\w.]+)`:((?:.+\n)(?:  .+\n)*)", text, re.M)
    return {name: " ".join(text.split()) for name, text in found}
