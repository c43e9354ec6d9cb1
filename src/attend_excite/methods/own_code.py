"""The code that an object of a user's module is made of: its own, and what that uses."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType

# Who uses these may use anything in the module.
_DYNAMIC = {"globals", "vars", "locals", "eval", "exec", "__import__", "importlib"}
_INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class _Statement:
    """One statement at the top of a module.

    Attributes:
        node: as parsed.
        text: its lines, decorators included.
        binds: the names that it gives a value.
        uses: all names in it.
        defines: whether giving those names a value is all that it does.
    """

    node: ast.stmt
    text: str
    binds: frozenset[str]
    uses: frozenset[str]
    defines: bool


def digest(module: ModuleType, attribute: str) -> str | None:
    """16 hex digits of the code of an object and of all of the user's own code that it uses.

    What else stands in the module doesn't count, nor where in the module the code stands. Followed are names
    at the top of a module, and imports from the user's own modules: of the same package, or in the same
    folder. Of a module that is imported as a whole all counts. Libraries don't.

    Args:
        module: imported.
        attribute: the object's name in it.

    Returns:
        None: the module is no file.
    """
    if getattr(module, "__file__", None) is None:
        return None
    pieces: dict[tuple[str, int], str] = {}
    seen: set[tuple[str, str | None]] = set()
    todo: list[tuple[ModuleType, str | None]] = [(module, attribute)]
    while todo:
        where, wanted = todo.pop()
        if (where.__name__, wanted) in seen:
            continue
        seen.add((where.__name__, wanted))
        for number, statement in enumerate(_statements(where)):
            if not _concerns(statement, wanted):
                continue
            todo += [
                (other, what) for other, what in _imported(where, statement, wanted) if _is_own(other, module)
            ]
            if (where.__name__, number) in pieces:
                continue
            pieces[where.__name__, number] = statement.text
            todo += (
                [(where, None)] if statement.uses & _DYNAMIC else [(where, used) for used in statement.uses]
            )
    code = "\n".join(f"{key[0]}\n{pieces[key]}" for key in sorted(pieces))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _concerns(statement: _Statement, name: str | None) -> bool:
    """Whether a statement has a say in what a name stands for; None: in anything."""
    if name is None or name in statement.binds or "*" in statement.binds:
        return True
    return name in statement.uses and not statement.defines


def _statements(module: ModuleType) -> list[_Statement]:
    path = Path(str(module.__file__))
    try:
        source = path.read_text(encoding="utf-8")
        body = ast.parse(source).body
    except (OSError, ValueError, SyntaxError):  # compiled: all of it, and nothing can be told apart
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        return [_Statement(ast.Pass(), content, frozenset("*"), frozenset(), defines=False)]
    lines = source.splitlines()
    return [_statement(node, lines) for node in body if not _is_main(node)]


def _statement(node: ast.stmt, lines: list[str]) -> _Statement:
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
    text = "\n".join(line.rstrip() for line in lines[first - 1 : node.end_lineno])
    names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
    binds = {each.id for each in names if not isinstance(each.ctx, ast.Load)}
    defines = False
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        binds, defines = {node.name}, True
    elif isinstance(node, ast.Import | ast.ImportFrom):
        binds, defines = {each.asname or each.name.partition(".")[0] for each in node.names}, True
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        # `Faded.share = 1` changes what Faded is.
        parts = [each for target in targets for each in ast.walk(target)]
        defines = not any(isinstance(each, ast.Attribute | ast.Subscript) for each in parts)
    else:
        # Within an `if` or a `try` may be definitions, imports too.
        for each in ast.walk(node):
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                binds.add(each.name)
            elif isinstance(each, ast.Import | ast.ImportFrom):
                binds |= {part.asname or part.name.partition(".")[0] for part in each.names}
    return _Statement(node, text, frozenset(binds), frozenset(each.id for each in names), defines)


def _imported(
    module: ModuleType, statement: _Statement, wanted: str | None
) -> Iterator[tuple[ModuleType, str | None]]:
    """The modules that a statement imports, each with the name that is used of it; None: all of it."""
    for node in ast.walk(statement.node):
        if isinstance(node, ast.Import):
            sources = [(each.name, None, each.asname or each.name.partition(".")[0]) for each in node.names]
        elif isinstance(node, ast.ImportFrom):
            told = f"{'.' * node.level}{node.module or ''}"
            source = resolve_name(told, module.__package__ or "") if node.level else told
            sources = [(source, each.name, each.asname or each.name) for each in node.names]
        else:
            continue
        for source, name, bound in sources:
            if wanted not in (None, bound) and "*" not in (name, bound):
                continue
            submodule = sys.modules.get(f"{source}.{name}")
            if submodule is not None:
                yield submodule, None
            elif source in sys.modules:
                yield sys.modules[source], wanted if name == "*" else name


def _is_own(other: ModuleType, module: ModuleType) -> bool:
    """Whether a module is of the same hand as another: of its package, or in a folder with it."""
    if getattr(other, "__file__", None) is None:
        return False
    package = module.__name__.partition(".")[0]
    if other.__name__.partition(".")[0] == package:
        return True
    home = Path(str(sys.modules[package].__file__ or module.__file__)).absolute().parent
    if hasattr(sys.modules[package], "__path__"):
        home = home.parent
    path = Path(str(other.__file__)).absolute()
    return home in path.parents and not _INSTALLED & set(path.parts)


def _is_main(node: ast.stmt) -> bool:
    """Whether it is `if __name__ == "__main__":`, which is left out where the module is imported."""
    return isinstance(node, ast.If) and ast.unparse(node.test).replace("'", '"') == '__name__ == "__main__"'
