"""Fields of dataclasses are explained in one way: by a string under the field, not by a comment beside it."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_sfr"
MARKS = ("# noqa", "# type:")


def comments_beside_fields(text: str) -> Iterator[int]:
    """The lines of fields of dataclasses, NamedTuples and TypedDicts that end with a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {
        token.start[0] for token in tokens if token.type == tokenize.COMMENT and not token.string.startswith(MARKS)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            about = " ".join(map(ast.unparse, [*node.decorator_list, *node.bases]))
            if any(kind in about for kind in ("dataclass", "NamedTuple", "TypedDict")):
                fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
                yield from (field.lineno for field in fields if (field.end_lineno or field.lineno) in comments)


def test_no_field_is_explained_by_a_comment() -> None:
    found = [f"{path}:{line}" for path in PACKAGE.rglob("*.py") for line in comments_beside_fields(path.read_text())]
    assert found == []


def test_a_comment_beside_a_field_is_found() -> None:
    text = (
        "@dataclass\nclass A:\n    x: int  # in steps\n    y: int  # noqa: E501\n\n\nclass B:\n    z: int  # no field\n"
    )
    assert list(comments_beside_fields(text)) == [3]
