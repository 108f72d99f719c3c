"""Docstrings of Python's standard library, read from the installed interpreter. No download, no files."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .labels.values import IGNORED, label_numbers
from .sampling.splits import grouped_split
from .texts.base import TextDataModule
from .texts.cache import cached_table, progress_bars
from .texts.tokens import Texts

KINDS = {
    "concurrency": "_threading_local asyncio concurrent contextvars multiprocessing queue sched signal subprocess "
    "threading",
    "data formats": "base64 binhex configparser csv dbm email html json mailbox mailcap mimetypes netrc pickle "
    "pickletools plistlib quopri shelve tomllib uu xdrlib xml",
    "data types": "_collections_abc _pydecimal _strptime bisect calendar collections copy dataclasses datetime decimal "
    "enum fractions functools graphlib heapq numbers operator random reprlib statistics types uuid weakref zoneinfo",
    "files": "_compression _pyio bz2 filecmp fileinput fnmatch genericpath glob gzip io linecache lzma ntpath os "
    "pathlib posixpath shutil stat tarfile tempfile zipapp zipfile",
    "language": "abc ast code codeop compileall contextlib copyreg dis importlib inspect modulefinder opcode pkgutil "
    "pyclbr pydoc runpy site symtable sysconfig tabnanny token tokenize typing zipimport",
    "networking": "asynchat asyncore cgi ftplib http imaplib ipaddress nntplib poplib selectors smtpd smtplib socket "
    "socketserver ssl telnetlib urllib webbrowser wsgiref xmlrpc",
    "testing": "bdb cProfile cgitb doctest logging pdb profile pstats rlcompleter timeit trace traceback tracemalloc "
    "unittest warnings",
}
MIN_WORDS = 4
TEST_SHARE, TEST_SEED = 0.2, 0  # there is no test split to be found: this one is the same in every run
LIBRARY = Path(sysconfig.get_path("stdlib"))


class Docstrings(TextDataModule):
    """Docstrings of modules, classes and functions of the standard library; the task is to tell what they are about.

    Contents: about 5,300 docstrings of four words and more, of 7 kinds of modules with 550 to 900 each: concurrency,
    data formats, data types, files, language, networking, testing. A docstring that occurs twice counts once, and
    not at all if it does so in two kinds. Python's version decides what there is; modules that distributions omit,
    such as tkinter, are not used.
    Splits: 20 % for the test, the same whatever the seed; `val_share` of the rest for validation. Docstrings of one
    file share their words, so each file is in one split as a whole: drawn one by one, most would be found by their
    neighbours' words.
    Licence: Python's own (PSF-2.0). Source: the interpreter that runs this.

    Args:
        **kwargs: Those of `TextDataModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.problem_type != "single_label_classification":
            raise ValueError(f"a docstring has one label: data.problem_type {self.problem_type!r} is not possible")

    @property
    def class_names(self) -> list[str]:
        return list(KINDS)

    def read_splits(self) -> dict[str, Texts]:
        """Parse the sources, once for an interpreter; afterwards they are in the cache."""
        table = cached_texts(read_kinds, ("text", "label", "file"), sys.version, KINDS, MIN_WORDS)
        labels = label_numbers(table["label"][:], self.class_names, lambda row: f"docstring {row}")
        files = table["file"][:]
        everything = Texts(table.select_columns("text"), labels)
        kept, test = grouped_split(labels, files, TEST_SHARE, TEST_SEED)
        train, val = grouped_split(labels[kept], [files[row] for row in kept], self.val_share, self.seed)
        rows = {"train": kept[train], "val": kept[val], "test": test}
        return {split: everything.part(chosen) for split, chosen in rows.items()}


class PackageDocstrings(TextDataModule):
    """Docstrings of all of the standard library and of installed packages: English about code, to pre-train on.

    Contents: docstrings of four words and more; one that occurs twice counts once. Those that `Docstrings` tests on
    are omitted. There are no labels. Splits: all are for training; `val_share` of them is held out.
    Licence: that of each package. Source: what is installed here.

    Args:
        packages: Names of packages, as they are imported.
        **kwargs: Those of `TextDataModule`.

    Raises:
        ModuleNotFoundError: A package is not installed.
    """

    def __init__(self, packages: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.packages = packages or []

    @property
    def class_names(self) -> list[str]:
        return []

    def read_splits(self) -> dict[str, Texts]:
        """Parse the sources, once as long as they are the same."""
        known = Docstrings(tokenizer=self.tokenizer_name).read_splits()["test"]
        tested = frozenset(known.text(index) for index in range(len(known)))
        sources = below(LIBRARY)
        for package in self.packages:
            found = importlib.util.find_spec(package)
            if found is None:
                raise ModuleNotFoundError(f"data.packages: {package} is not installed")
            roots = found.submodule_search_locations
            sources += [Path(str(found.origin))] if roots is None else [path for root in roots for path in below(root)]
        sources.sort()
        sizes = [(path.name, path.stat().st_size) for path in sources]
        read = functools.partial(read_unlabelled, sources, tested)
        table = cached_texts(read, ("text",), sys.version, sizes, sorted(tested), MIN_WORDS)
        return {"train": Texts(table, torch.full((len(table),), IGNORED))}


def below(root: str | Path) -> list[Path]:
    """Sources below a folder, without tests and without what is installed there."""
    skipped = {"test", "tests", "site-packages"}
    return [path for path in Path(root).rglob("*.py") if not skipped & set(path.relative_to(root).parts)]


def cached_texts(read: Callable[[], Iterator[dict[str, str]]], columns: Sequence[str], *facts: Any) -> Any:
    """Columns of text that a function reads, from the cache or read now."""
    import datasets  # slow to import: only where it is used

    key = hashlib.sha256(repr((columns, facts)).encode()).hexdigest()[:32]
    with progress_bars(False):
        return cached_table(key, datasets.Features({name: datasets.Value("string") for name in columns}), read)


def read_kinds() -> Iterator[dict[str, str]]:
    """Text, kind and file of each docstring of the modules that have a kind."""
    found: dict[str, list[tuple[str, str]]] = {}
    for kind, modules in KINDS.items():
        for module in modules.split():
            for source in [LIBRARY / f"{module}.py", *sorted((LIBRARY / module).rglob("*.py"))]:
                if source.is_file() and "test" not in source.relative_to(LIBRARY).parts:
                    for text in docstrings_of(source):
                        found.setdefault(text, []).append((kind, source.relative_to(LIBRARY).as_posix()))
    for text, places in found.items():
        if len({kind for kind, _ in places}) == 1:
            yield {"text": text, "label": places[0][0], "file": places[0][1]}


def read_unlabelled(sources: Iterable[Path], omitted: frozenset[str]) -> Iterator[dict[str, str]]:
    """Each docstring of the sources once."""
    seen = set(omitted)
    for source in sources:
        for text in docstrings_of(source):
            if text not in seen:
                seen.add(text)
                yield {"text": text}


def docstrings_of(source: Path) -> Iterator[str]:
    """Docstrings in a file, as far as it is Python that this interpreter reads."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "\\d" in somebody's strings
            tree = ast.parse(source.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text.split()) >= MIN_WORDS:
                yield text
