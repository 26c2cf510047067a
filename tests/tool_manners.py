"""Chat templates of our own in the manners of families of models: how each writes tool calls, results and reasoning."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

EACH = "{% for c in m.tool_calls %}{% set N = c.function.name %}{% set A = c.function.arguments %}"
"""What `CALLS` say for short."""
JSON = '{"name": {{ N | tojson }}, "arguments": {{ A | tojson }}}'
PYTHON = (
    "{{ N }}({% for k, v in A | items %}{{ k }}={% if v is string %}{{ v | tojson }}{% elif v is true %}True{% elif v is false %}False"
    "{% elif v is none %}None{% else %}{{ v | tojson }}{% endif %}{% if not loop.last %}, {% endif %}{% endfor %})"
)
TEXT = "{{ v if v is string else v | tojson }}"
QUOTED = '{% if v is string %}<|"|>{{ v }}<|"|>{% else %}{{ v | tojson }}{% endif %}'
COMMA = "{% if not loop.last %},{% endif %}"
SKIP = "{% if not loop.last %}, {% endif %}"


def xml(before: str, middle: str, after: str, value: str = TEXT) -> str:
    return f"{{% for k, v in A | items %}}{before}{{{{ k }}}}{middle}{value}{after}{{% endfor %}}"


DEEPSEEK = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
DSML = '" string="{% if v is string %}true{% else %}false{% endif %}">'

CALLS = {
    "hermes": ("", "<tool_call>\n" + JSON + "\n</tool_call>", "\n", ""),
    "qwen3-coder": (
        "",
        "<tool_call>\n<function={{ N }}>\n" + xml("<parameter=", ">\n", "\n</parameter>\n") + "</function>\n</tool_call>",
        "\n",
        "",
    ),
    "xml on one line": ("", "<tool_call><function={{ N }}>" + xml("<parameter=", ">", "</parameter>") + "</function></tool_call>", "", ""),
    "xml of python": (
        "",
        "<tool_call><function={{ N }}>" + xml("<parameter=", ">", "</parameter>", "{{ v }}") + "</function></tool_call>",
        "",
        "",
    ),
    "mistral list": ("[TOOL_CALLS][", '{"name": {{ N | tojson }}, "arguments": {{ A | tojson }}, "id": "{{ c.id }}"}', SKIP, "]"),
    "mistral function": ("[TOOL_CALLS] [", "{{ c.function | tojson }}", SKIP, "]"),
    "mistral args": ("", "[TOOL_CALLS]{{ N }}[ARGS]{{ A | tojson }}", "", ""),
    "mistral ids": ("", "[TOOL_CALLS]{{ N }}[CALL_ID]{{ c.id }}[ARGS]{{ A | tojson }}", "", ""),
    "llama4": ("[", PYTHON, SKIP, "]"),
    "llama4 between tokens": ("<|python_start|>[", PYTHON, SKIP, "]<|python_end|>"),
    "python without quotes": ("[", "{{ N }}({% for k, v in A | items %}{{ k }}={{ v }}" + SKIP + "{% endfor %})", SKIP, "]"),
    "llama3": ("", '{"name": {{ N | tojson }}, "parameters": {{ A | tojson }}}', "; ", ""),
    "python tag": ("<|python_tag|>", '{"name": "{{ N }}", "parameters": {{ A | tojson }}}', "; ", ""),
    "deepseek v3": (
        DEEPSEEK[0],
        "<｜tool▁call▁begin｜>{{ c.type }}<｜tool▁sep｜>{{ N }}\n```json\n{{ A | tojson }}\n```<｜tool▁call▁end｜>",
        "\n",
        DEEPSEEK[1],
    ),
    "deepseek v3.1": (
        DEEPSEEK[0],
        "<｜tool▁call▁begin｜>{{ N }}<｜tool▁sep｜>{{ A if A is string else A | tojson }}<｜tool▁call▁end｜>",
        "",
        DEEPSEEK[1],
    ),
    "deepseek v3.2": (
        "\n\n<｜DSML｜function_calls>\n",
        '<｜DSML｜invoke name="{{ N }}">\n' + xml('<｜DSML｜parameter name="', DSML, "</｜DSML｜parameter>\n") + "</｜DSML｜invoke>",
        "\n",
        "\n</｜DSML｜function_calls>",
    ),
    "glm-4.5": (
        "",
        "<tool_call>{{ N }}\n" + xml("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n") + "</tool_call>",
        "\n",
        "",
    ),
    "glm-4.7": ("", "<tool_call>{{ N }}" + xml("<arg_key>", "</arg_key><arg_value>", "</arg_value>") + "</tool_call>", "", ""),
    "glm-4": ("", "{{ N }}\n{{ A | tojson }}", "", ""),
    "granite": ("<|tool_call|>[", JSON, SKIP, "]"),
    "phi-4-mini": ("<|tool_call|>[", '{"type": "function", "function": {{ c.function | tojson }}}', SKIP, "]<|/tool_call|>"),
    "functools": ("functools[", JSON, SKIP, "]"),
    "cohere": (
        "<|START_ACTION|>[\n",
        '    {"tool_call_id": "{{ c.id }}", "tool_name": "{{ N }}", "parameters": {{ A | tojson }}}',
        "{% if not loop.last %},\n{% endif %}",
        "\n]<|END_ACTION|>",
    ),
    "command-r": ("Action: ```json\n[\n", '{"tool_name": "{{ N }}", "parameters": {{ A | tojson }}}', SKIP, "\n]```"),
    "minimax m1": ("<tool_calls>\n", JSON, "\n", "\n</tool_calls>"),
    "minimax m2": (
        "<minimax:tool_call>\n",
        '<invoke name="{{ N }}">\n' + xml('<parameter name="', '">', "</parameter>\n") + "</invoke>",
        "\n",
        "\n</minimax:tool_call>",
    ),
    "tool_code": ("```tool_code\n", PYTHON, "\n", "\n```"),
    "function gemma": (
        "",
        "<start_function_call>call:{{ N }}{ {%- for k, v in A | items %}{{ k }}:{% if v is string %}<escape>{{ v }}<escape>"
        "{% else %}{{ v | tojson }}{% endif %}" + COMMA + "{% endfor -%} }<end_function_call>",
        "",
        "",
    ),
    "gemma 4": (
        "",
        "<|tool_call>call:{{ N }}{ {%- for k, v in A | items %}{{ k }}:"
        + QUOTED
        + "{% if not loop.last %},{% endif %}{% endfor -%} }<tool_call|>",
        "",
        "",
    ),
    "internlm": ("", '<|action_start|><|plugin|>\n{"name": "{{ N }}", "parameters": {{ A | tojson }}}<|action_end|>', "\n", ""),
    "lfm2": ("<|tool_call_start|>[", PYTHON, SKIP, "]<|tool_call_end|>"),
    "olmo 3": ("<function_calls>", PYTHON, "\n", "</function_calls>"),
    "functionary": ("", "<function={{ N }}>{{ A | tojson }}</function>", "\n", ""),
    "nemotron": ("<TOOLCALL>[", JSON, SKIP, "]</TOOLCALL>"),
    "apertus": ("<|tools_prefix|>[", '{"{{ N }}": {{ A | tojson }}}', SKIP, "]<|tools_suffix|>"),
    "xlam": ("[", JSON, SKIP, "]"),
    "seed-oss": (
        "",
        "<seed:tool_call>\n<function={{ N }}>\n" + xml("<parameter=", ">", "</parameter>\n") + "</function>\n</seed:tool_call>",
        "\n",
        "",
    ),
    "step 3": (
        "<｜tool_calls_begin｜>",
        '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="{{ N }}">'
        + xml('<steptml:parameter name="', '">', "</steptml:parameter>")
        + "</steptml:invoke><｜tool_call_end｜>",
        "\n",
        "<｜tool_calls_end｜>",
    ),
    "react": ("", "Action: {{ N }}\nAction Input: {{ A | tojson }}", "\n", ""),
    "openai": (
        "<calls>",
        '{"id": "{{ c.id }}", "type": "function", "function": {"name": "{{ N }}", "arguments": {{ A | tojson | tojson }}}}',
        "",
        "</calls>",
    ),
    "other words": ("<use>", '{"tool": "{{ N }}", "with": {{ A | tojson }}}', "</use><use>", "</use>"),
    "typed pairs": ("", '<call tool="{{ N }}">' + xml("<", ">", "</>", "{{ v | tojson }}") + "</call>", "\n", ""),
}

HEAD = "{% if tools %}<|s|>system\n{{ tools | tojson }}<|e|>\n{% endif %}"
LOOP = "{% for m in messages %}<|s|>{{ m.role }}\n{{ m.content or '' }}"
TAIL = "<|e|>\n{% endfor %}{% if add_generation_prompt %}<|s|>assistant\n{% endif %}"


def template(begin: str, call: str, between: str, end: str) -> str:
    """A conversation in which each call is written in the given manner."""
    written = f"{EACH}{call}{{% if not loop.last %}}{between}{{% endif %}}{{% endfor %}}"
    if between == SKIP:
        written = f"{EACH}{call}{between}{{% endfor %}}"
    calls = f"{{% if m.tool_calls %}}{begin}{written}{end}{{% endif %}}"
    return HEAD + LOOP + calls + TAIL


ENCODED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<｜Assistant｜>{% if m.content is none %}"
    "<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
    "<｜tool▁call▁begin｜>{{ c.type + '"
    "<｜tool▁sep｜>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```' }}<｜tool▁call▁end｜>"
    "{% if not loop.last %}\n{% endif %}{% endfor %}<｜tool▁calls▁end｜>{% else %}{{ m.content }}{% endif %}<|e|>"
    "{% elif m.role == 'tool' %}<｜tool▁output▁begin｜>{{ m.content }}<｜tool▁output▁end｜>"
    "{% else %}<｜User｜>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
"""DeepSeek R1's: arguments as JSON text, and calls in replies whose content is none alone."""
KIMI = (
    HEAD + "{% for m in messages %}<|s|>{{ m.role }}<|im_middle|>"
    "{{ '## Return of ' + m.tool_call_id + '\n' if m.role == 'tool' }}{{ m.content }}"
    "{% if m.tool_calls %}<|tool_calls_section_begin|>{% for c in m.tool_calls %}<|tool_call_begin|>{{ c.id }}<|tool_call_argument_begin|>"
    "{{ c.function.arguments | tojson }}<|tool_call_end|>{% endfor %}<|tool_calls_section_end|>{% endif %}<|e|>{% endfor %}"
    "{% if add_generation_prompt %}<|s|>assistant<|im_middle|>{% endif %}"
)
"""Kimi K2's: the tool's name stands in the call's id."""
HARMONY = """{% set last = namespace(name=none) %}{% for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}
{%- if m.content and m.thinking %}{{ raise_exception('not both content and thinking') }}{% endif %}
{%- if m.content or m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.content or m.thinking }}<|end|>{% endif %}
{%- set c = m.tool_calls[0].function %}{% set last.name = c.name -%}
<|start|>assistant to=functions.{{ c.name }}<|channel|>commentary json<|message|>{{ c.arguments | tojson }}<|call|>
{%- elif m.role == 'assistant' %}
{%- if loop.last and not add_generation_prompt %}
{%- if m.thinking is defined %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif -%}
<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>
{%- else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}
{%- elif m.role == 'tool' %}
{%- if last.name is none %}{{ raise_exception('a result without a call') }}{% endif -%}
<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>
{%- else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}"""
"""gpt-oss's: channels, one call in a reply, and thinking beside it instead of text."""
MAGISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}"
    "[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% elif m.role == 'assistant' %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for b in m.content %}{% if b.type == 'thinking' %}"
    "[THINK]{{ b.thinking }}[/THINK]{% else %}{{ b.text }}{% endif %}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{% if c.id is undefined or "
    "c.id | length != 9 %}{{ raise_exception('ids of nine letters') }}{% endif %}"
    "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}<|e|>"
    "{% else %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% endif %}{% endfor %}"
)
"""Mistral's reasoning models': thinking in a block of the content, no opening of a reply."""
ONE = (
    HEAD + "{% for m in messages %}<|s|>{{ m.role }}\n{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at once') }}"
    '{% endif %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
    "{% else %}{{ m.content }}{% endif %}" + TAIL
)
"""Llama 3's: a single call, and nothing beside it."""
COHERE = (
    "{% for m in messages %}<|s|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
    "<|START_THINKING|>{{ m.reasoning_content }}<|END_THINKING|>{% endif %}{% if m.tool_calls %}<|START_ACTION|>["
    '{% for c in m.tool_calls %}{"tool_call_id": "{{ loop.index0 }}", "tool_name": "{{ c.function.name }}", "parameters": '
    "{{ c.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]<|END_ACTION|>"
    "{% else %}<|START_RESPONSE|>{{ m.content }}<|END_RESPONSE|>{% endif %}{% else %}{{ m.content }}{% endif %}" + TAIL
)
"""Command A's: answers between marks, too."""

TEMPLATES = {name: template(*parts) for name, parts in CALLS.items()} | {
    "deepseek r1": ENCODED,
    "kimi k2": KIMI,
    "gpt-oss": HARMONY,
    "magistral": MAGISTRAL,
    "llama3 one call": ONE,
    "cohere with answers": COHERE,
}
SINGLE = {"gpt-oss", "llama3 one call", "glm-4"}
"""Those that write one call in a reply."""
CONTROLS = (
    "<|s|>", "<|e|>", "<|constrain|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[INST]", "[/INST]",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<|channel|>",
    "<|message|>", "<|start|>", "<|end|>",
    "<|call|>", "<|return|>", "<|python_tag|>", "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    "<|START_ACTION|>", "<|END_ACTION|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|tool_call|>",
)  # fmt: skip


def tokenizer(template: str, controls: bool = True) -> PreTrainedTokenizerFast:
    """One token per byte, and control tokens: all of the families', or those of turns alone."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(text, special=True) for text in CONTROLS[: None if controls else 2]])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|e|>", chat_template=template, clean_up_tokenization_spaces=False)
