"""Hostile texts: recipes, chat templates and tracker files."""

import random

from tools.faults.damage import BYTES, Damage, replace_by_json

YAML_VALUES = [
    *("null", "~", "true", "no", "0", "-1", "1.5", "1e3", "1e999", ".nan", ".inf", "0x10", "010", "1_000", "9" * 30),
    *("12:30:00", "2026-13-45", "2026-01-01", "x", "''", '"\\ud800"', "[]", "[1]", "[[1]]", "[x, y]", "{}", "{a: 1}"),
    *("!!python/object:os.system x", "!!binary x", "!!set {a}", "!!int x", "!!float x", "!!timestamp x", "<<: 1"),
    *("&a [*a]", "*missing", "@x", "%x", "`x`", "|", "-", "? :", '"\t"', "x" * 9000),
]
YAML_KEYS = [
    *("lr", "train-iters", "train_iters", "unknown", "seq_length", "sfr_weight", "data_path", "load", "save_interval"),
    *("tensor_model_parallel_size", "sfr_targets", "objective", "micro_batch_size", "vocab_size", "bf16", "sfr_draws"),
    *("no_such.key", "1", "true", "null", "[a]", "train_data_path", "sfr_horizons", "exit_interval", "seed"),
    *("ckpt_format", "tokenizer_type", "rampup_batch_size", "recompute_granularity", "num_layers", "x" * 9000),
]


def change_recipe(data: bytes, rng: random.Random) -> bytes:
    """A recipe with a value of another type, a key that is unknown or set twice, or nesting."""
    lines = data.decode().splitlines()
    at, change = rng.randrange(len(lines)), rng.randrange(6)
    if change == 0:
        lines.append(lines[at].split(":")[0] + ": " + rng.choice(YAML_VALUES))
    elif change == 1:
        lines.append(f"{rng.choice(YAML_KEYS)}: {rng.choice(YAML_VALUES)}")
    elif change == 2:
        lines[at] = "\t" * (rng.random() < 0.3) + " " * rng.randrange(3) + lines[at]
    elif change == 3:
        del lines[at]
    else:
        lines[at] = lines[at].split(":")[0] + ": " + rng.choice(YAML_VALUES)
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"


def nested_recipe(data: bytes, rng: random.Random) -> bytes:
    depth = rng.choice([50, 3000])
    doubling = b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40))
    return data + rng.choice([b"lr: " + b"[" * depth + b"]" * depth, b"a0: &a0 [x]\n" + doubling, b"---\nlr: 1\n"])


RECIPES: list[Damage] = [change_recipe, change_recipe, change_recipe, nested_recipe, *BYTES, replace_by_json]
LOOPS = "{% for i in range(999999) %}{% for j in range(999999) %}"
TEMPLATES = [
    "{{ 1 // 0 }}",
    "{{ 1 % 0 }}",
    "{{ none + 1 }}",
    "{{ messages[99] }}",
    "{{ messages[99].content }}",
    "{{ messages[0].content.content.x }}",
    "{{ messages[0]['content'][0:10**9] * 10**12 }}",
    "{{ 2 ** 10 ** 9 }}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ '%1000000000s' % 'x' }}",
    "{{ '{:>9999999999}'.format('x') }}",
    "{{ 'x'.center(9999999999) }}",
    "{{ 'x' | center(9999999999) }}",
    "{{ range(10 ** 12) | list }}",
    "{{ range(10 ** 9) | sum }}",
    "{{ 'a' ~ 'b' | batch(10 ** 9) | list }}",
    "{{ lipsum(n=10 ** 7) }}",
    f"{LOOPS}{{% endfor %}}{{% endfor %}}",
    f"{LOOPS}x{{% endfor %}}{{% endfor %}}",
    "{% set l = namespace(x=['a']) %}{% for i in range(99) %}{% set l.x = l.x + l.x %}{% endfor %}{{ l.x }}",
    "{% set l = namespace(x='a') %}{% for i in range(99) %}{% set l.x = l.x ~ l.x %}{% endfor %}{{ l.x }}",
    "{% set l = namespace(x=2) %}{% for i in range(99) %}{% set l.x = l.x * l.x %}{% endfor %}{{ l.x }}",
    "{% set l = [1] %}{% for i in l %}{{ l.append(i) or '' }}{% endfor %}",
    "{% set l = [1] %}{% for i in l recursive %}{{ loop(l) }}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{{ raise_exception('no ' * 4000) }}",
    "{{ raise_exception() }}",
    "{{ messages | map('length') | sum }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{% do 1 %}",
    "{% for",
    "{{",
    "",
    "constant",
    "\ud800",
    "{{ '\\ud800' }}",
    "{{ strftime_now('%Y' * 10 ** 7) }}",
    "{{ strftime_now(3) }}",
    "{{ messages | sort }}",
    "{{ messages | groupby('x') | list }}",
    "{{ messages | random }}",
    "{{ messages[0].content | wordwrap(0) }}",
    "{{ messages[0].content | truncate(-1) }}",
    "{{ messages[0].content | indent(10 ** 10) }}",
    "{{ messages[0].content | replace('', 'x' * 10 ** 6) | replace('', 'y' * 10 ** 6) }}",
    "{{ caller() }}",
    "{% call messages() %}{% endcall %}",
    "{{ messages.pop() }}",
    "{{ messages.clear() }}{{ messages[0].content }}",
    "{{ messages.append(messages) }}{{ messages }}",
    "{{ messages[0].update({'content': 3}) }}{{ messages[0].content }}",
]


def another_template(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(TEMPLATES).encode("utf-8", "surrogatepass")


def spoilt_template(data: bytes, rng: random.Random) -> bytes:
    """A piece of the real template removed, repeated or replaced by a hostile one."""
    text = data.decode()
    start = rng.randrange(len(text))
    end = min(len(text), start + rng.randrange(1, 40))
    piece = rng.choice(["", text[start:end] * 3, rng.choice(TEMPLATES)])
    return (text[:start] + piece + text[end:]).encode("utf-8", "surrogatepass")


CHAT_TEMPLATES: list[Damage] = [another_template, another_template, spoilt_template, *BYTES]
TRACKERS: list[Damage] = [
    *BYTES,
    lambda data, rng: rng.choice(
        [b"7", b"-1", b"1e3", b"release", b"iter_0000002", b" 2 \n", b"0", b"9" * 500, b"..", b"2\n2"]
    ),
]
