"""The trajectory of a sample as one self-contained HTML page with playback controls."""

import json

from megatron_sfr.html import document, note
from megatron_sfr.kl_flow.sampling.trajectory import Film

STYLE = """
#text { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #e1e4ea; padding-left: .8rem;
  margin: 1rem 0; min-height: 8rem; font-size: 1.05rem }
#text span { border-radius: 2px } .given { color: #2457a6 }
.bar { display: flex; gap: .8rem; align-items: center } .bar input { flex: 1 }
#where { font-variant-numeric: tabular-nums; min-width: 13rem }
"""
CONTROLS = """<div class="bar"><button id="play" type="button">Play</button>
<input id="step" type="range" min="0" value="0" aria-label="step"><span id="where"></span></div>
<div id="text"></div>"""
SCRIPT = """
const film = JSON.parse(document.getElementById("film").textContent);
const [play, slider, text, where] = ["play", "step", "text", "where"].map(id => document.getElementById(id));
slider.max = film.frames.length - 1;
let timer = null;
function show() {
  const frame = film.frames[slider.value];
  const tokens = [...film.tokens.slice(0, film.start), ...frame.tokens, ...film.tokens.slice(film.stop)];
  while (tokens.length > 1 && tokens.at(-1) === film.end && tokens.at(-2) === film.end) tokens.pop();
  text.replaceChildren(...tokens.map((token, place) => {
    const span = document.createElement("span");
    span.textContent = film.texts[token];
    if (place < film.start || place >= film.stop) {
      span.className = "given";
    } else {
      const percent = frame.percent[place - film.start];
      span.style.opacity = .25 + .75 * percent / 100;
      span.style.background = `hsla(${1.2 * percent}, 70%, 60%, .35)`;
      span.title = `${percent} %`;
    }
    return span;
  }));
  where.textContent = `step ${frame.step}, t = ${frame.t.toFixed(3)}`;
}
function stop() { clearInterval(timer); timer = null; play.textContent = "Play"; }
slider.addEventListener("input", () => { stop(); show(); });
play.addEventListener("click", () => {
  if (timer !== null) return stop();
  if (slider.value === slider.max) slider.value = 0;
  play.textContent = "Pause";
  timer = setInterval(() => {
    if (slider.value === slider.max) return stop();
    slider.value = Number(slider.value) + 1;
    show();
  }, 90);
});
show();
"""


def page(film: Film) -> str:
    """A page with a slider over the steps and a play button; tokens from red (uncertain) to green (certain)."""
    content = {
        "tokens": film.tokens,
        "start": film.start,
        "stop": film.stop,
        "end": film.end,
        "texts": film.texts,
        "frames": [{"step": f.step, "t": round(f.t, 4), "tokens": f.tokens, "percent": f.percent} for f in film.frames],
    }
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # text must not close the script element
    words = "The most likely token at each position, from red (uncertain) to green (certain). Given text is blue."
    scripts = f'<script type="application/json" id="film">{data}</script>\n<script>{SCRIPT}</script>'
    return document(film.title, [note(words), CONTROLS, scripts], STYLE)
