"""`hint` completes errors about stored files, once, and touches no other error."""

from pathlib import Path

import pytest

from megatron_sfr.storage.integrity import StoredFileError, check_size, hint


def test_the_innermost_hint_completes_the_error_once(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"^\S+gone is missing; run: inner$") as caught,
        hint("run: outer"),
        hint("run: inner"),
    ):
        check_size(tmp_path / "gone", 3)
    assert type(caught.value) is ValueError
    assert isinstance(caught.value.__cause__, StoredFileError)


def test_other_errors_pass_unchanged_and_a_hint_can_be_entered_again() -> None:
    again = hint("run: again")
    for error in (ValueError("of the user"), KeyError("of ours")):
        with pytest.raises(type(error)) as caught, again:
            raise error
        assert caught.value is error
    with pytest.raises(ValueError, match=r"^damaged; run: again$"), again:
        raise StoredFileError("damaged")
    with again:
        pass
