"""Compile a tree to .pyc files that are the same on every build; run by the environment's own Python.

compileall is no use here: it stores times, and object identities that differ from run to run. These files name the
source's hash and are not checked against it at run time (PEP 552, unchecked); marshal format 2 knows no identities.

    python compile_pyc.py PREFIX FINAL    (FINAL: where tracebacks shall say that the sources are)
"""

import importlib.util
import marshal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

UNCHECKED = (1).to_bytes(4, "little")
"""The second word of such a .pyc: by hash, not to be checked."""


def compile_one(source: Path, shown: str) -> None:
    """Write the .pyc of one source; files that are no Python of this version (test data, templates) are left alone."""
    text = source.read_bytes()
    try:
        code = compile(text, shown, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        return
    target = Path(importlib.util.cache_from_source(source))
    target.parent.mkdir(exist_ok=True)
    header = importlib.util.MAGIC_NUMBER + UNCHECKED + importlib.util.source_hash(text)
    target.write_bytes(header + marshal.dumps(code, 2))


def main(prefix: Path, final: Path) -> None:
    """Compile every source below prefix."""
    sources = sorted((prefix / "lib").glob("python3.*/**/*.py"))
    shown = [str(final / source.relative_to(prefix)) for source in sources]
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(compile_one, sources, shown, chunksize=64):
            pass


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
