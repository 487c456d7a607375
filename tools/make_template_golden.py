#!/usr/bin/env python3
"""Writes tests/golden/templates.jsonl: templates and messages of our own making, rendered by the jinja2 package.

Needs jinja2 (any 3.1). The environment is the one transformers uses for chat templates: sandboxed, trim_blocks,
lstrip_blocks, loop controls, its tojson, raise_exception, and a {% generation %} tag. Run from the repository root:

    python3 tools/make_template_golden.py > tests/golden/templates.jsonl
"""

import itertools
import json
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox


class Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}: renders its body in a scope of its own."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    @staticmethod
    def _render(caller):
        return caller()


class TemplateSays(Exception):
    pass


def raise_exception(message):
    raise TemplateSays(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


ENV = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
)
ENV.filters["tojson"] = tojson
ENV.globals["raise_exception"] = raise_exception

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather; \"now\" or later <b>&amp;</b>",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1.5}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop", "description": "", "parameters": {}}},
]

CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": " Plan a trip.\n\n- cheap\n"}],
    [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "<think>\nadd them\n</think>\n\n4"},
        {"role": "user", "content": "naïve 日本 'q' \"dq\" \\ \t end"},
    ],
    [
        {"role": "system", "content": "You call tools."},
        {"role": "user", "content": "Weather in Köln?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call00001", "type": "function",
                 "function": {"name": "get_weather",
                              "arguments": {"city": "Köln", "days": 2, "fine": True, "x": None}}},
                {"id": "call00002", "type": "function", "function": {"name": "stop", "arguments": {}}},
            ],
        },
        {"role": "tool", "name": "get_weather", "tool_call_id": "call00001", "content": "{\"temp\": 3.5}"},
        {"role": "tool", "name": "stop", "tool_call_id": "call00002", "content": "ok"},
        {"role": "assistant", "content": "3.5 degrees."},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "user", "content": [{"type": "text", "text": "part one"}, {"type": "text", "text": " and two "}]},
        {"role": "assistant", "content": "x"},
    ],
    [{"role": "assistant", "content": "starts wrong"}, {"role": "assistant", "content": "twice"}],
]

# Whole chat templates in the manner of the families we serve.
FAMILIES = {
    "chatml": """{%- for message in messages -%}
    {%- if loop.first and message.role != 'system' -%}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' -}}
    {%- endif -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message.content is string -%}{{ message.content }}
    {%- elif message.content is iterable and message.content is not none -%}
        {%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""",
    "headers": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: tools\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start|>ipython<|end|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}
""",
    "tools_xml": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set before = content.split('</think>')[0].rstrip('\\n') %}
                {%- set reasoning_content = before.split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n'
              + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "inst": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results"
        or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric strings with length 9!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}{{- " " + message["content"]|trim + eos_token}}{% endgeneration %}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
""",
    "macro": """{%- macro render_content(content, trim=true) -%}
    {%- if content is string -%}
        {{- content | trim if trim else content -}}
    {%- elif content is sequence -%}
        {%- for part in content -%}{{- part['text'] -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- for message in messages -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {{ render_content(message['content']) }}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
""",
}

# One piece of the language a line; x, d, l and s stand for values set in PRELUDE.
PRELUDE = (
    "{% set s = 'Grün ist the Wörld' %}{% set l = [3, 1, 2, 1] %}"
    "{% set d = {'b': 1, 'a': [1, 2.5, none, true], 'items': 'mine'} %}{% set x = 7 %}\n"
)
with open("tests/golden/template_expressions.txt", encoding="utf-8") as lines:
    EXPRESSIONS = lines.read().splitlines()

STATEMENTS = [
    "{% for i in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ loop.index0 }}{{ loop.r"
    "evindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }} {{ loop.previtem }}<{{"
    " loop.nextitem }}>\n{% endfor %}",
    "{% for i in [] %}never{% else %}empty{% endfor %}|{% for i in [1, 2, 3, 4] if i is e"
    "ven %}{{ loop.index }}:{{ i }}/{{ loop.length }} {% else %}none{% endfor %}",
    "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{% for (a, b),"
    " c in [[[1, 2], 3]] %}{{ a + b + c }}{% endfor %}",
    "{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% bre"
    "ak %}{% endif %}{{ i }}{% endfor %}",
    "{% set x = 1 %}{% for i in [1, 2] %}{{ x }}{% set x = x + i %}{{ x }} {% endfor %}{{"
    " x }}",
    "{% set ns = namespace(n=0, l=[]) %}{% for i in [1, 2, 3] %}{% set ns.n = ns.n + i %}"
    "{% set ns.l = ns.l + [i] %}{% endfor %}{{ ns.n }} {{ ns.l }}{{ ns.zz }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c = 1, 2 %}{{ c }}",
    "{% set t %}  block {{ 1 + 1 }}\n{% endset %}[{{ t }}]{% set u | upper | trim %} loud "
    "{% endset %}[{{ u }}]",
    "{% macro m(a, b='B', c=none) %}{{ a }}-{{ b }}-{{ c }};{% endmacro %}{{ m(1) }}{{ m("
    "1, 2) }}{{ m(1, c=3) }}{{ m(b=2, a=5) }}{{ m() }}",
    "{% macro fact(n) %}{{ n if n < 2 else n * (fact(n - 1) | int) }}{% endmacro %}{{ fac"
    "t(5) }}",
    "{% set y = 'outer' %}{% macro m() %}{{ y }}{% set y = 'inner' %}{{ y }}{% endmacro %"
    "}{{ m() }}{{ y }}{% set y = 'later' %}{{ m() }}",
    "{% macro m(a) %}x{% endmacro %}{{ m(1, 2) }}",
    "{% macro m(a) %}x{% endmacro %}{{ m(z=2) }}",
    "{% filter upper %}low {{ 'er' }}{% endfilter %}{% filter replace('a', 'b') | upper %"
    "}banana{% endfilter %}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}",
    "{% if false %}a{% elif 0 %}b{% elif 'x' %}c{% else %}d{% endif %}{% if x is not defi"
    "ned %}{% set x = 3 %}{% endif %}{{ x }}",
    "{% raw %}{{ not }} {% touched %}{% endraw %}|{%- raw -%}  a  {%- endraw -%}|",
    "a{# comment #}b{#- tight -#} c\n  {# own line #}\nd",
    "x\n  {% if true %}\n  y\n  {% endif %}\nz\n",
    "x\n  {%- if true -%}\n  y\n  {%- endif -%}\nz\n",
    "x\n  {%+ if true +%}\n  y\n  {%+ endif +%}\nz\n\n",
    "  {% if true %} a {% endif %}  b  {{ 1 }}\n{{ 2 }}\n  {{- 3 -}}\n  {{ 4 }}",
    "a\r\nb\rc{{ 'd\\r\\n' }}\r\n",
    "line\n\t {% set q = 1 %} \n end {%- set r = 2 %}\n\n{{ q }}{{ r }}\n",
    "{% for i in [1, 2] %}\n  {% for j in ['a', 'b'] %}\n    {{ loop.index }}{{ loop.depth "
    "}}{{ i }}{{ j }}\n  {% endfor %}\n  {{ loop.index }}\n{% endfor %}\n",
    "{% for i in 'añb' %}[{{ i }}]{% endfor %}{% for k in {'x': 1, 'y': 2} %}{{ k }}{% en"
    "dfor %}{% for i in undefinedthing %}{% endfor %}",
    "{% for i in [1, 2, 3] %}{{ loop.cycle('odd', 'even') }} {{ loop.changed(i // 2) }};{"
    "% endfor %}",
    "{% generation %}in {% set g = 1 %}{{ g }}{% endgeneration %}{{ g }}",
    "{% for i in 5 %}{% endfor %}",
    "{% set x.y = 1 %}",
    "{% set x = {} %}{% set x.y = 1 %}",
    "{% for a, b in [[1]] %}{% endfor %}",
    "{{ messages[0].role }}{{ messages | length }}{{ messages[-1]['content'] }}{{ bos_tok"
    "en }}{{ eos_token }}{{ add_generation_prompt }}{{ tools }}{{ documents }}",
    "{% for m in messages %}{{ m }}\n{% endfor %}",
    "{{ messages | tojson(indent=1) }}",
    "{% if x %}",
    "{{ 1 + }}",
    "{{ 'open }}",
    "{% endif %}",
    "{{ (1 }}",
    "{% nosuchtag %}",
    "{{ x | nosuchfilter }}",
    "{{ x is nosuchtest }}",
    "{# open",
    "{% raw %} open",
    "{{ [1, 2 }}",
    "{{ a b }}",
    "{% for in x %}{% endfor %}",
    "{{ ) }}",
    "{% set = 1 %}",
    "{% macro %}{% endmacro %}",
    "{{ x[ }}",
    "{{ '\\xZZ' }}",
    "{% if %}{% endif %}",
    "{{ $ }}",
    "{% break %}",
    "plain { text } with % signs # and }} ends %} #}",
]


def as_text(message):
    """Content as what a template can add to a string: what we render where the template fails on what was given."""
    content = message.get("content") or ""
    return message | {"content": content if isinstance(content, str) else "\n".join(part["text"] for part in content)}


def render(template, chat, tools, add):
    row = {"template": template, "messages": chat, "tools": tools, "add_generation_prompt": add}
    row |= {"bos": "<s>", "eos": "</s>"}

    def prompt(messages):
        return ENV.from_string(template).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add,
            bos_token="<s>",
            eos_token="</s>",
        )

    try:
        try:
            row["prompt"] = prompt(chat)
        except Exception:
            texts = [as_text(message) for message in chat]
            if texts == chat:
                raise
            row["prompt"] = prompt(texts)
    except TemplateSays as error:
        row["error"] = str(error)
        row["raised"] = True
    except Exception as error:  # whatever jinja2 or the Python beneath it says: we only compare that it fails
        row["error"] = type(error).__name__
    print(json.dumps(row, ensure_ascii=False))


def main():
    for template in FAMILIES.values():
        for chat, tools, add in itertools.product(CHATS, (None, TOOLS), (True, False)):
            render(template, chat, tools, add)
    for expression in EXPRESSIONS:
        render(PRELUDE + "{{ " + expression + " }}", CHATS[0], None, True)
    for template in STATEMENTS:
        render(template, CHATS[0], None, True)
        render(template, CHATS[3], TOOLS, False)


if __name__ == "__main__":
    sys.exit(main())
