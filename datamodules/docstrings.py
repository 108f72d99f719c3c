"""Docstrings of Python's standard library, read from the installed interpreter. No download, no files."""

from __future__ import annotations

import ast
import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .splits import stratified_split
from .text import TextDataModule, Texts, cached_table, label_numbers, progress_bars

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


class Docstrings(TextDataModule):
    """Docstrings of modules, classes and functions of the standard library; what is to be found is what they are about.

    Contents: about 5,300 docstrings of four words and more, of 7 kinds of modules with 550 to 900 each: concurrency,
    data formats, data types, files, language, networking, testing. A docstring that occurs twice counts once, and
    not at all if it does so in two kinds. Python's version decides what there is; modules that distributions leave
    out, such as tkinter, are not used.
    Splits: 20 % for the test, stratified, the same whatever the seed; `val_share` of the rest for validation.
    Licence: Python's own (PSF-2.0). Source: the interpreter that runs this.

    Args:
        **kwargs: Those of `TextDataModule`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.problem_type != "single_label_classification":
            raise ValueError(f"a docstring has one kind; data.problem_type {self.problem_type!r} does not fit")

    @property
    def class_names(self) -> list[str]:
        """The kinds of modules."""
        return list(KINDS)

    def read_splits(self) -> dict[str, Texts]:
        """Parse the sources, once for an interpreter; afterwards they are in the cache."""
        import datasets  # slow to import: only where it is used

        key = hashlib.sha256(f"{sys.version} {KINDS} {MIN_WORDS}".encode()).hexdigest()[:32]
        text = datasets.Value("string")
        with progress_bars(False):
            table = cached_table(key, datasets.Features({"text": text, "label": text}), read_docstrings)
        labels = label_numbers(table["label"][:], self.class_names, lambda row: f"docstring {row}")
        everything = Texts(table.remove_columns("label"), labels)
        train, test = (everything.part(rows) for rows in stratified_split(labels, TEST_SHARE, TEST_SEED))
        return {"train": train, "test": test}


def read_docstrings() -> Iterator[dict[str, str]]:
    """Text and kind of each docstring."""
    kinds: dict[str, set[str]] = {}
    for kind, modules in KINDS.items():
        for module in modules.split():
            for text in docstrings_of(module):
                kinds.setdefault(text, set()).add(kind)
    for text, found in kinds.items():
        if len(found) == 1 and len(text.split()) >= MIN_WORDS:
            yield {"text": text, "label": found.pop()}


def docstrings_of(module: str) -> Iterator[str]:
    """Docstrings in the sources of a module or package, as far as this Python has it."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [library / f"{module}.py", *sorted((library / module).rglob("*.py"))]
    for source in sources:
        if not source.is_file() or "test" in source.parts:
            continue
        for node in ast.walk(ast.parse(source.read_bytes())):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            if documented and (text := ast.get_docstring(node)):  # type: ignore[arg-type]
                yield text
