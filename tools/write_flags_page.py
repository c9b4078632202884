"""Writes docs/flags.md and the stored copy of the parser of all options: python tools/write_flags_page.py"""

from pathlib import Path

from megatron_sfr.config.flags.flag_table import page
from megatron_sfr.config.flags.option_parser import STORED, stored_text
from megatron_sfr.runtime import backend

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"

if __name__ == "__main__":
    backend.prepare(["--sfr-backend", "cpu"])
    from megatron_sfr.config.settings import flag_parser

    PAGE.write_text(page(), encoding="utf-8")
    STORED.write_text(stored_text(flag_parser()), encoding="utf-8")
