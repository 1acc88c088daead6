"""Rewrites the section "expected" of each case in this folder with what transformers renders. Needs transformers.

A case: "=== template", "=== context" (JSON), "=== expected"; a context with the key "_raises" expects an error with that text.
"""

import json
import pathlib

from transformers.utils.chat_template_utils import _compile_jinja_template

for path in sorted(pathlib.Path(__file__).parent.glob("*.txt")):
    text = path.read_text()
    template, rest = text.removeprefix("=== template\n").split("\n=== context\n", 1)
    context = rest.split("\n=== expected\n", 1)[0]
    values = json.loads(context)
    if "_raises" in values:
        expected = ""
    else:
        expected = _compile_jinja_template(template).render(**values)
    path.write_text(f"=== template\n{template}\n=== context\n{context}\n=== expected\n{expected}\n")
