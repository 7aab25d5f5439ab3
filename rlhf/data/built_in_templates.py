"""Chat templates that a recipe may name: for base models, and for families whose own ones cannot be trained on.

The templates of Phi-3, Qwen3 and DeepSeek-R1-Distill show a turn in another way once the conversation goes on, or
leave out what the model wrote. Those here keep the families' tokens, and show every turn as it was written.
"""

PLAIN_TEMPLATE = """\
{%- set names = {'system': 'System', 'user': 'User', 'assistant': 'Assistant'} -%}
{%- for message in messages -%}
{{ names.get(message['role'], message['role']) + ':\\n' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}
{{ '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif -%}
"""
"""Template for base models, whose tokenizer brings none: headings on their own lines, EOS after answers."""

CHATML_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

PHI3_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] in ['system', 'user', 'assistant'] -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif -%}
"""
"""Phi-3's form, without the <|endoftext|> that its own template puts behind the last turn only."""

_SPLIT_THOUGHTS = """\
{%- set content = message['content'] -%}
{%- set thoughts = message['reasoning_content'] if message['reasoning_content'] else '' -%}
{%- if not thoughts and '</think>' in content -%}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>', 1)[1] -%}
{%- endif -%}
"""

_TOOLS = """\
{%- if tools -%}
{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{{ '<|im_start|>system\\n' + system + '# Tools\\n\\nYou may call one or more functions to assist with the user query.'
 + '\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor -%}
{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within '
 + '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n'
 + '</tool_call><|im_end|>\\n' }}
{%- if system %}{% set messages = messages[1:] %}{% endif -%}
{%- endif -%}
"""
"""The system message of Qwen2.5 and Qwen3 where there are tools; behind it, the system message counts as shown."""

QWEN3_TEMPLATE = (
    _TOOLS
    + """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
"""
    + _SPLIT_THOUGHTS
    + """\
{{ '<|im_start|>assistant\\n<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- for call in message['tool_calls'] or [] -%}
{{ '\\n' if content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + call['function']['name'] + '", "arguments": ' }}
{{- call['function']['arguments'] | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- elif message['role'] == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif -%}
{{ '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif -%}
{%- else -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif -%}
{%- endif -%}
"""
)
"""Qwen3's form, with the thoughts of every turn; its own template shows those of the last turn only."""

R1_DISTILL_TEMPLATE = (
    """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{ message['content'] }}
{%- elif message['role'] == 'user' -%}
{{ '<｜User｜>' + message['content'] }}
{%- elif message['role'] == 'assistant' -%}
"""
    + _SPLIT_THOUGHTS
    + """\
{{ '<｜Assistant｜><think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif -%}
"""
)
"""DeepSeek-R1-Distill's form, with the thoughts of every turn; its own template cuts them out of all answers."""

BUILT_IN_TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "chatml": CHATML_TEMPLATE,
    "phi3": PHI3_TEMPLATE,
    "qwen3": QWEN3_TEMPLATE,
    "r1-distill": R1_DISTILL_TEMPLATE,
}
