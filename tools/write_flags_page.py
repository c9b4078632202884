"""Prints docs/flags.md from the table of Megatron's flags: python tools/write_flags_page.py"""

from pathlib import Path

from megatron_sfr.config.flags.flag_table import page

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flags.md"

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
