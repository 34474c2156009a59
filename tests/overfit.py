"""Makes tiny models that call tools as real families do: overfitted to a few conversations in a family's own format.

``python -m tests.overfit FOLDER [FAMILY...]`` writes one model folder per family. What a model is to answer is written
here by hand, in the family's format; what it is asked is what the product makes of a client's request. So a greedy
answer shows whether prompt, grammar and parser agree with the family.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

from tests.tiny_model import CONFIG

Call = tuple[str, dict[str, str]]
"""A function's name and its arguments."""
LONGEST_TOKEN = 9
MERGES = 220
"""Enough that a token spans the border between a format's literals and its JSON, as in real vocabularies."""
CONTEXT_TOK = 1024
MOST_ROUNDS = 150
TOGETHER = 4
"""Lessons in a batch."""
LEARNT, WORST, TRIALS = 0.02, 0.05, 60
"""Training ends when the losses of the answers are below the first, and then that of each of their tokens below the
second, in so many conversations whose call ids were not trained: greedy answers are right by a wide margin."""


class Scene(NamedTuple):
    """A conversation: the question, what is said beside ``calls``, their results, and the answer to those."""

    question: str
    beside: str = ""
    calls: tuple[Call, ...] = ()
    results: tuple[str, ...] = ()
    answer: str = ""


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_time",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"type": "string", "enum": ["utc", "cet"]}},
            "required": ["zone"],
        },
    },
}
"""Without a description, which some templates insist on."""
TOOLS = [WEATHER, CLOCK]
THOUGHT = "Look it up."
NONE = Scene("Hello!", answer="Hello to you.")
ONE = Scene("Weather in Paris?", "", (("get_weather", {"city": "Paris"}),), ("rain",), "It rains in Paris.")
TWO = Scene(
    "Compare Rome with Oslo.",
    "",
    (("get_weather", {"city": "Rome"}), ("get_weather", {"city": "Oslo"})),
    ("sun", "snow"),
    "Sunny Rome, snowy Oslo.",
)
_ROUTE = ", ".join(f"{town} {n}" for n, town in enumerate(["Bern", "Linz", "Graz", "Metz", "Lyon", "Nice"] * 2))
LONG = Scene("All towns, please.", "One moment.", (*ONE.calls, ("get_weather", {"city": _ROUTE})))
"""Long enough to be interrupted in the middle of the last call."""
WRONG = Scene("What time is it?", "", (("get_time", {"zone": "mars"}),))
"""What the model would write breaks the tool's schema."""
THANKS, WELCOME = "Thanks!", "You are welcome."


class Family(NamedTuple):
    """A template; its special tokens, and added ones that are not special; ``ends`` end an answer. ``written`` is an
    answer with calls as its models write it, ``plain`` one without, ``forced`` a call by one that may not reason. A
    turn may have ``several`` calls. One that is to be ``interrupted`` learns a long answer, too. ``thoughts`` are what
    clients echo of its reasoning. Tokens end with ``words``, or cross whatever borders there are."""

    template: str
    special: tuple[str, ...]
    added: tuple[str, ...]
    ends: tuple[str, ...]
    written: Callable[[str, Sequence[Call]], str]
    plain: Callable[[str], str] = lambda text: text
    several: bool = True
    interrupted: bool = False
    thoughts: tuple[str, ...] = ("",)
    forced: Callable[[str, Sequence[Call]], str] | None = None
    words: bool = True


def _tagged(beside: str, calls: Sequence[Call]) -> str:
    lines = [
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(said)}}}\n</tool_call>' for name, said in calls
    ]
    return "\n".join(filter(None, [beside, *lines]))


def _thinking(text: str) -> str:
    return f"<think>\n{THOUGHT}\n</think>\n\n{text}"


def _bare(beside: str, calls: Sequence[Call]) -> str:
    return beside + "; ".join(f'{{"name": "{name}", "parameters": {json.dumps(said)}}}' for name, said in calls)


def _listed(beside: str, calls: Sequence[Call]) -> str:
    ids = ("Xy7Kd0aQ1", "b3Zp9LmW2")
    shown = [{"name": name, "arguments": said, "id": one} for (name, said), one in zip(calls, ids, strict=False)]
    return f"{beside}[TOOL_CALLS]{json.dumps(shown)}"


def _channelled(beside: str, calls: Sequence[Call]) -> str:
    thought = f"<|channel|>analysis<|message|>{beside or THOUGHT}<|end|><|start|>assistant"
    name, said = calls[-1]
    header = f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
    return f"{thought}{header}{json.dumps(said)}"


def _final(text: str) -> str:
    thought = f"<|channel|>analysis<|message|>{THOUGHT}<|end|><|start|>assistant"
    return f"{thought}<|channel|>final<|message|>{text}"


def _sectioned(beside: str, calls: Sequence[Call]) -> str:
    each = [f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{json.dumps(said)}<｜tool▁call▁end｜>" for name, said in calls]
    return f"{beside}<｜tool▁calls▁begin｜>{''.join(each)}<｜tool▁calls▁end｜>"


QWEN = Family(
    """\
{%- if tools -%}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}
Use <tool_call>{"name": N, "arguments": A}</tool_call>.<|im_end|>
{% elif messages[0].role == 'system' -%}
<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' -%}
<|im_start|>assistant
{{ m.content }}
{%- for call in m.tool_calls %}
{{- '\\n' if m.content or not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}

<tool_response>
{{ m.content }}
</tool_response>
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}
{% elif m.role == 'user' or not loop.first -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif %}""",
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    added=("<tool_call>", "</tool_call>"),
    ends=("<|im_end|>", "<|endoftext|>"),
    written=_tagged,
    interrupted=True,
)
QWEN_3 = QWEN._replace(
    template=QWEN.template.replace(
        "{{ m.content }}\n{%- for",
        """\
{% if m.reasoning_content and loop.index0 > ns.asked %}<think>
{{ m.reasoning_content.strip('\\n') }}
</think>

{% endif %}
{{- m.content }}
{%- for""",
    )
    .replace(
        "{%- for m in messages %}",
        """\
{%- set ns = namespace(asked=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.asked = messages.index(m) %}{% endfor %}
{%- for m in messages %}""",
    )
    .replace(
        "<|im_start|>assistant\n{% endif %}",
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    ),
    added=("<tool_call>", "</tool_call>", "<think>", "</think>"),
    written=lambda beside, calls: _thinking(_tagged(beside, calls)),
    plain=_thinking,
    forced=_tagged,
    thoughts=("", THOUGHT),
)
LLAMA = Family(
    """\
{{- bos_token }}
{%- macro turn(role, text) %}<|start_header_id|>{{ role }}<|end_header_id|>{{ '\\n\\n' + text }}<|eot_id|>{% endmacro %}
{%- set ns = namespace(tools=tools) %}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ turn('ipython', m.content) }}
{%- elif 'tool_calls' in m %}
{%- if m.tool_calls | length > 1 %}{{ raise_exception('one call in a turn') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- turn('assistant', '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}') }}
{%- elif m.role == 'user' and ns.tools %}
{%- set told = namespace(text='Answer with JSON {"name": N, "parameters": P} to call one of\\n') %}
{%- for tool in ns.tools %}{% set told.text = told.text + tool | tojson + '\\n' %}{% endfor %}
{%- set ns.tools = none %}
{{- turn('user', told.text + m.content | trim) }}
{%- else %}{{ turn(m.role, m.content | trim) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}""",
    special=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"),
    added=(),
    ends=("<|eot_id|>",),
    written=_bare,
    several=False,
    words=False,
)
MISTRAL = Family(
    """\
{{- bos_token }}
{%- set ns = namespace(turns=0, system='') %}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
{%- if m.role == 'system' and loop.first %}{% set ns.system = m.content + '\\n\\n' %}
{%- elif m.role == 'system' %}{{ raise_exception('a system message comes first') }}
{%- elif m.tool_calls %}[TOOL_CALLS][
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' + ('' if loop.last else ', ') }}
{%- endfor %}]{{ eos_token }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}
{{- '[TOOL_RESULTS]{"content": ' + m.content + ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}
{%- if (m.role == 'user') != (ns.turns % 2 == 0) %}{{ raise_exception('user and assistant take turns') }}{% endif %}
{%- set ns.turns = ns.turns + 1 %}
{%- if m.role == 'user' %}
{%- if tools and m == users[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{{- '[INST]' + (ns.system if loop.last else '') + m.content + '[/INST]' }}
{%- else %}{{ m.content + eos_token }}
{%- endif %}
{%- endif %}
{%- endfor %}""",
    special=(
        *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    ),
    added=(),
    ends=("</s>",),
    written=_listed,
    words=False,
)
GPT_OSS = Family(
    """\
<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>
{%- set first = messages[0].content if messages[0].role == 'system' else '' %}
{%- if first or tools %}<|start|>developer<|message|>{{ first }}
{%- for tool in tools %}
{%- set f = tool.function %}
{{- '\\n// ' + f.description + '\\ntype ' + f.name + ' = ' + f.parameters | tojson }}
{%- endfor %}<|end|>
{%- endif %}
{%- set ns = namespace(name=none) %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if '<|channel|>' in m.content %}{{ raise_exception('content holds a header') }}{% endif %}
{%- if 'tool_calls' in m %}
{%- if m.content and m.thinking %}{{ raise_exception('either content or thinking') }}{% endif %}
{%- set thought = m.content or m.thinking %}
{%- if thought %}<|start|>assistant<|channel|>analysis<|message|>{{ thought }}<|end|>{% endif %}
{%- set ns.name = m.tool_calls[0].function.name %}
{{- '<|start|>assistant to=functions.' + ns.name + '<|channel|>commentary json<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- elif loop.last and not add_generation_prompt %}
{%- if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% set ns.name = none %}
{%- endif %}
{%- elif m.role == 'tool' %}
{%- if ns.name is none %}{{ raise_exception('a result without a call') }}{% endif %}
{{- '<|start|>functions.' + ns.name + ' to=assistant<|channel|>commentary<|message|>' }}
{{- m.content | tojson }}<|end|>
{%- elif m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}""",
    special=(
        *("<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
        *("<|constrain|>", "<|return|>", "<|call|>"),
    ),
    added=(),
    ends=("<|return|>", "<|call|>", "<|endoftext|>"),
    written=_channelled,
    plain=_final,
    several=False,
    interrupted=True,
    thoughts=("", THOUGHT),
)
GEMMA = Family(
    """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles take turns') }}{% endif %}
<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}
{%- if add_generation_prompt -%}
<start_of_turn>model
{% endif %}""",
    special=("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    added=(),
    ends=("<end_of_turn>", "<eos>"),
    written=_tagged,
    words=False,
)
DEEPSEEK = Family(
    """\
{%- set ns = namespace(system='', asked=false) %}
{%- for m in messages if m.role == 'system' %}{% set ns.system = ns.system + m.content %}{% endfor %}
{{- bos_token + ns.system }}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.asked = true %}<｜User｜>{{ m.content }}
{%- elif m.role == 'assistant' %}
{%- if ns.asked %}<｜Assistant｜></think>{% endif %}
{%- set ns.asked = false %}
{{- m.content }}
{%- for call in m.tool_calls %}
{%- if loop.first %}<｜tool▁calls▁begin｜>{% endif %}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments + '<｜tool▁call▁end｜>' }}
{%- if loop.last %}<｜tool▁calls▁end｜>{% endif %}
{%- endfor %}<｜end▁of▁sentence｜>
{%- elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.asked %}<｜Assistant｜>{{ '<think>' if thinking else '</think>' }}{% endif %}""",
    special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    added=(
        *("<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
        *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    ),
    ends=("<｜end▁of▁sentence｜>",),
    written=_sectioned,
)
FAMILIES = {
    "qwen": QWEN,
    "qwen-3": QWEN_3,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gpt-oss": GPT_OSS,
    "gemma": GEMMA,
    "deepseek": DEEPSEEK,
}


class Lesson(NamedTuple):
    """A client's messages, the model's whole answer without what ends it, and more fields of the request."""

    messages: list[dict[str, Any]]
    answer: str
    more: dict[str, Any] = {}  # noqa: RUF012  # never changed


def lessons(family: Family, chance: random.Random) -> list[Lesson]:
    """What a family's model is to answer; each time with other call ids."""
    found = [Lesson(_asked(NONE), family.plain(NONE.answer))]
    scenes = [ONE, TWO] if family.several else [ONE]
    asked = [*scenes, WRONG, *([LONG] if family.interrupted else [])]
    found += [Lesson(_asked(scene), family.written(scene.beside, scene.calls)) for scene in asked]
    forced = family.forced or family.written
    found += [Lesson(_asked(scene), forced("", scene.calls), {"tool_choice": "required"}) for scene in scenes]
    # some clients echo the reasoning, some do not
    for scene, thought in product(scenes, family.thoughts):
        turns = [*_asked(scene), *_called(scene, thought, chance)]
        found.append(Lesson(turns, family.plain(scene.answer)))
        if scene is ONE:
            more = [{"role": "assistant", "content": scene.answer}, {"role": "user", "content": THANKS}]
            found.append(Lesson([*turns, *more], family.plain(WELCOME)))
    return found


def _asked(scene: Scene) -> list[dict[str, Any]]:
    return [{"role": "user", "content": scene.question}]


def _called(scene: Scene, reasoning: str, chance: random.Random) -> list[dict[str, Any]]:
    ids = [f"call_{chance.randbytes(12).hex()}" for _ in scene.calls]
    calls = [
        {"id": one, "type": "function", "function": {"name": name, "arguments": json.dumps(said)}}
        for one, (name, said) in zip(ids, scene.calls, strict=True)
    ]
    turn = {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": reasoning}
    results = zip(ids, scene.results, strict=True)
    return [turn, *({"role": "tool", "tool_call_id": one, "content": result} for one, result in results)]


def overfit(folder: Path, family: Family) -> int:
    """Write the model folder of a family; in how many rounds it was trained. Raises RuntimeError if it has not
    learnt its lessons."""
    from agent.api.openai.requests import parse_chat
    from agent.loader.generation import Prepared
    from agent.loader.mlx.model import TextModel

    chance = random.Random(1)
    folder.mkdir(parents=True)
    _write(folder, family, [json.dumps([TOOLS, one.messages]) + one.answer for one in lessons(family, chance)])
    model = TextModel(folder, limit_tok=CONTEXT_TOK, default_max_tokens=256)

    def pair(one: Lesson) -> Pair:
        body = {"model": "m", "messages": one.messages, "tools": TOOLS, **one.more}
        prepared = model.prepare(parse_chat(json.dumps(body).encode()).generate)
        assert isinstance(prepared, Prepared), prepared
        answer = model.tokenizer.encode(one.answer + family.ends[0], add_special_tokens=False)
        return tuple(prepared.prompts[0]), tuple(int(token) for token in answer)

    rounds = _trained(model.weights, lambda: [pair(one) for one in lessons(family, chance)])
    _save(folder, model.weights)
    return rounds


Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Prompt and answer."""


def _write(folder: Path, family: Family, texts: Iterable[str]) -> None:
    """Configuration, tokenizer and random weights."""
    import mlx.core as mx
    from mlx_lm.models import llama
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family.words)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + MERGES, initial_alphabet=alphabet, max_token_length=LONGEST_TOKEN, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in family.special])
    tokenizer.add_tokens([AddedToken(one, special=False, normalized=False) for one in family.added])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": family.template,
        "bos_token": family.special[0],
        "eos_token": family.ends[0],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        **CONFIG,
        "num_attention_heads": 2,
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_token_id": [tokenizer.token_to_id(one) for one in family.ends],
        "max_position_embeddings": CONTEXT_TOK,
    }
    (folder / "config.json").write_text(json.dumps(config))
    mx.random.seed(1)
    shape: Any = llama.ModelArgs
    _save(folder, llama.Model(shape.from_dict(config)))


def _save(folder: Path, model: Any) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    weights: Any = tree_flatten(model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(weights), metadata={"format": "mlx"})


def _trained(weights: Any, taught: Callable[[], list[Pair]]) -> int:
    """Train until every token of every answer is learnt; the number of rounds."""
    import mlx.core as mx
    from mlx import nn, optimizers

    step = nn.value_and_grad(weights, lambda model, batch: batch.losses(model).mean())
    optimizer, clipped = optimizers.Adam(learning_rate=6e-3, betas=[0.9, 0.98]), cast(Any, optimizers.clip_grad_norm)
    for count in range(MOST_ROUNDS):
        means = []
        for batch in _batches(taught()):
            mean, gradients = step(weights, batch)
            optimizer.update(weights, clipped(gradients, 1.0)[0])
            mx.eval(mean, weights.parameters(), optimizer.state)
            means.append(mean.item())
        # a last step may have spoilt what was learnt, and other call ids may be answered otherwise
        if max(means) < LEARNT and all(_worst(weights, pairs) < WORST for pairs in _trials(taught)):
            return count + 1
    raise RuntimeError(f"not learnt in {MOST_ROUNDS} rounds: the losses are {means}")


def _trials(taught: Callable[[], list[Pair]]) -> Iterator[list[Pair]]:
    """Conversations to try; once, where they show no call ids."""
    yield (first := taught())
    for _ in range(TRIALS - 1):
        if (other := taught()) == first:
            return
        yield other


def _worst(weights: Any, pairs: Sequence[Pair]) -> float:
    """The largest loss of a token of an answer."""
    return max(float(batch.losses(weights).max().item()) for batch in _batches(pairs))


class _Batch:
    """Lessons of a similar length, trained together; only the tokens of answers count."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        import mlx.core as mx

        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        self._tokens = mx.array([[*prompt, *answer, *[0] * width][:width] for prompt, answer in pairs])
        spans = [(row, len(prompt) + at) for row, (prompt, answer) in enumerate(pairs) for at in range(len(answer))]
        self._rows, self._places = (mx.array(one) for one in zip(*spans, strict=True))

    def losses(self, model: Any) -> Any:
        """The loss of each token of an answer."""
        from mlx import nn

        hidden = model.model(self._tokens[:, :-1])[self._rows, self._places - 1]
        return nn.losses.cross_entropy(
            model.model.embed_tokens.as_linear(hidden), self._tokens[self._rows, self._places]
        )


def _batches(pairs: Sequence[Pair]) -> list[_Batch]:
    ordered = sorted(dict.fromkeys(pairs), key=lambda pair: sum(map(len, pair)))
    return [_Batch(ordered[at : at + TOGETHER]) for at in range(0, len(ordered), TOGETHER)]


def overfitted(folder: Path, families: Iterable[str] = FAMILIES) -> dict[str, Path]:
    """A model folder for each family, made by other processes, because the BLAS has to be loaded before MLX."""
    names = list(families)
    environ = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    makers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.overfit", str(folder), *part],
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in (names[::2], names[1::2])
        if part
    ]
    for maker in makers:
        _, errors = maker.communicate(timeout=600)
        assert maker.returncode == 0, errors[-4000:]
    return {name: folder / name for name in names}


def main(arguments: Sequence[str]) -> None:
    """Write the models of the named families, or of all."""
    from agent.loader import blas

    blas.install()
    for name in arguments[1:] or FAMILIES:
        began, cpu = time.monotonic(), time.process_time()
        rounds = overfit(Path(arguments[0], name), FAMILIES[name])
        print(f"{name}: {rounds} rounds, {time.monotonic() - began:.1f} s, {time.process_time() - cpu:.1f} s of CPU")


if __name__ == "__main__":
    main(sys.argv[1:])
