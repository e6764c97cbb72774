"""The Command-4 chat template, for servers and tools that render with Jinja.

OpenAI-shaped messages in (``tool_calls[].function.arguments`` as objects), the bytes of melody's ``cmd4-v2`` (no
grounding, no documents) out. This package itself renders with ``render``.
"""

CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}{%- elif content -%}
{%- for part in content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set reasoning = reasoning if reasoning is defined else true -%}
{%- set calls = namespace(ids=[]) -%}
{{- bos_token -}}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TEXT|>
{%- if platform_instruction %}{{ platform_instruction + "\\n\\n" }}{% endif -%}
{{- "# Available Tools\\n```json\\n[\\n" -}}
{%- for tool in tools or [] -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{{- '    {"name": ' + function.name|tojson + ', "description": ' + (function.description or "")|tojson -}}
{{- ', "parameters": ' + function.parameters|tojson + ', "responses": null}' -}}
{{- "\\n" if loop.last else ",\\n" -}}
{%- else -%}{{ "\\n" }}{%- endfor -%}
{{- "]\\n```<|END_TEXT|><|END_OF_TURN_TOKEN|>" -}}
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>
{{- message.reasoning_content or message.reasoning or "" -}}
<|END_THINKING|>
{%- if message.tool_calls -%}
{{- "<|START_ACTION|>[\\n" -}}
{%- for call in message.tool_calls -%}
{{- '    {"tool_call_id": "' + calls.ids|length|string + '", "tool_name": ' + call.function.name|tojson -}}
{{- ', "parameters": ' + call.function.arguments|tojson + "}" + ("\\n" if loop.last else ",\\n") -}}
{%- set calls.ids = calls.ids + [call.id] -%}
{%- endfor -%}
]<|END_ACTION|>
{%- else -%}
<|START_TEXT|>{{ text_of(message.content) }}<|END_TEXT|>
{%- endif -%}
<|END_OF_TURN_TOKEN|>
{%- elif message.role == "tool" -%}
{%- if loop.first or loop.previtem.role != "tool" -%}
{{- "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[\\n" -}}
{%- endif -%}
{%- set result = {"content": text_of(message.content)} -%}
{%- set number = calls.ids.index(message.tool_call_id)|string -%}
{{- '    {\\n        "tool_call_id": "' + number + '",\\n        "results": {\\n' -}}
{{- '            "0": ' + result|tojson + '\\n        },\\n        "is_error": null\\n    }' -}}
{%- if not loop.last and loop.nextitem.role == "tool" -%}{{ ",\\n" }}{%- else -%}
{{- "\\n]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>" -}}
{%- endif -%}
{%- else -%}
{%- set role = "<|USER_TOKEN|>" if message.role == "user" else "<|SYSTEM_TOKEN|>" -%}
{{- "<|START_OF_TURN_TOKEN|>" + role + "<|START_TEXT|>" + text_of(message.content) -}}
<|END_TEXT|><|END_OF_TURN_TOKEN|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_THINKING|>{% if not reasoning %}<|END_THINKING|>{% endif %}
{%- endif -%}
"""
