"""No error is caught in silence: it is raised, reported or explained."""

import ast
import io
import pathlib
import tokenize

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ("vla_jax", "train")


def comment_lines(text):
    """Lines with a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT}


def is_silent(node):
    """Whether an error ends here: a handler that neither raises nor uses it, or a suppression."""
    if isinstance(node, ast.ExceptHandler):
        parts = [part for statement in node.body for part in ast.walk(statement)]
        is_used = any(isinstance(part, ast.Name) and part.id == node.name for part in parts)
        return not is_used and not any(isinstance(part, ast.Raise) for part in parts)
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        ignores = any(option.arg == "ignore_errors" for option in node.keywords)
        return name == "suppress" or ignores
    return False


def silent(text):
    """Lines of the silent handlers and suppressions without a comment in or just below them."""
    commented = comment_lines(text)
    return [
        node.lineno
        for node in ast.walk(ast.parse(text))
        if is_silent(node) and not commented & set(range(node.lineno, node.end_lineno + 2))
    ]


def test_an_error_that_ends_here_has_its_reason_in_a_comment():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in silent(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_silent_errors_are_found():
    text = """
try:
    read()
except OSError:
    value = None
try:
    read()
except OSError:  # absent in earlier versions
    value = None
try:
    read()
except OSError as error:
    warn(error)
try:
    read()
except OSError:
    raise
with contextlib.suppress(OSError):
    read()
with contextlib.suppress(OSError):  # tried again
    read()

delete(folder, ignore_errors=True)
"""
    assert sorted(silent(text)) == [4, 18, 23]
