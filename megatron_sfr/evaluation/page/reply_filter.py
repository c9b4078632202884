"""Fields that filter the tables of replies on a page; without scripts they are hidden, and everything can be read."""

from collections.abc import Mapping, Sequence
from html import escape

from megatron_sfr.storage.user_files import cut

_SCRIPT = """<script>
const controls = document.getElementById("filters"), field = controls.querySelector("input");
const selects = [...controls.querySelectorAll("select")];
const chosen = row => selects.every(s => !s.selectedIndex || row.cells[s.dataset.column].textContent === s.value);
function filter() {
  const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
  const active = words.length > 0 || selects.some(s => s.selectedIndex);
  for (const prompt of document.querySelectorAll("details.replies")) {
    let any = false;
    for (const row of [...prompt.querySelectorAll("tr")].slice(1)) {
      const text = (prompt.firstChild.textContent + " " + row.textContent).toLowerCase();
      row.hidden = !chosen(row) || !words.every(word => text.includes(word));
      any ||= !row.hidden;
    }
    prompt.hidden = !any;
    if (active) prompt.open = any;
  }
}
controls.hidden = false;
for (const control of [field, ...selects]) control.addEventListener("input", filter);
</script>"""


def filters(choices: Mapping[str, tuple[int, Sequence[str]]]) -> str:
    """A field for words, and a list for each choice: its name, the column of the tables, and the column's values.

    They filter the lines of all tables in `details` of the class `replies`.
    """
    search = '<input type="search" placeholder="prompts and replies with these words" aria-label="words to show">'
    lists = [_list(name, *choice) for name, choice in choices.items()]
    return f'<p id="filters" hidden>{" ".join([search, *lists])}</p>\n{_SCRIPT}'


def _list(name: str, column: int, values: Sequence[str]) -> str:
    options = [f'<option value="{escape(value)}">{escape(cut(value, 60)) or "none"}</option>' for value in values]
    return (
        f'<select data-column="{column}" aria-label="{escape(name)}"><option>every {escape(name)}</option>'
        f"{''.join(options)}</select>"
    )
