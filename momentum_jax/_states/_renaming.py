"""Maps the paths of params in an old state to their paths in a new one."""

from collections.abc import Callable, Mapping

from momentum_jax._states._places import Place

# From the path of a param in the old state to its path in the new one.
Rename = Mapping[str, str] | Callable[[str], str]


class Renaming:
    """A function from old paths to new ones, as the argument `rename` of `transplant` gives it."""

    def __init__(self, rename: Rename | None) -> None:
        if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
            raise TypeError(
                f"rename={rename!r} must be a dict of prefixes of paths, such as "
                "{\"['enc']\": \"['encoder']\"}, or a function of a path."
            )
        self.rename = rename
        self.unused = dict.fromkeys(rename) if isinstance(rename, Mapping) else {}

    def __call__(self, path: str) -> str:
        """Returns the new path, by the longest prefix that fits."""
        if self.rename is None:
            return path
        if callable(self.rename):
            return _check_text(self.rename(path))
        prefixes = [prefix for prefix in self.rename if _starts_with(path, prefix)]
        if not prefixes:
            return path
        longest = max(prefixes, key=len)
        self.unused.pop(longest, None)
        return _check_text(self.rename[longest]) + path[len(longest) :]

    def check(self, old: list[Place]) -> None:
        """Raises a ValueError if a prefix fits no path, or two arrays of a state get one path."""
        if self.unused:
            paths = dict.fromkeys(place.held.path for place in old if place.is_per_param)
            raise ValueError(
                f"rename has {', '.join(map(repr, self.unused))}, but no path of a param in the "
                "old state starts with it. Give a prefix of one of these paths: "
                f"{', '.join(paths) or 'none'}."
            )
        if self.rename is None:
            return
        first_by_path: dict[str, Place] = {}
        for place in old:
            if not place.is_per_param:
                continue
            first = first_by_path.setdefault(place.param_path, place)
            if first.held.path != place.held.path:
                raise ValueError(
                    f"rename gives two arrays the path {place.param_path}: {first.held.path} and "
                    f"{place.held.path} of {place.label}. Give each a path of its own."
                )


def _check_text(path):
    if not isinstance(path, str):
        raise TypeError(f"rename must return paths as text, but returned {path!r}.")
    return path


def _starts_with(path, prefix):
    return isinstance(prefix, str) and (
        path == prefix or (path.startswith(prefix) and path[len(prefix)] in "[.")
    )
