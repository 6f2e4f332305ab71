"""LiteLLM as a client. It pins other versions than the lock does, so it runs in an environment of its own:

    BROS_REF_LITELLM_PYTHON=/path/to/python pytest tests/server/test_litellm.py
"""

import json
import os
import subprocess

import pytest
from server.support import MODEL
from server.test_openai_client import expected

from bros_ref.model.tokenizer import ByteTokenizer

PYTHON = os.environ.get("BROS_REF_LITELLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="BROS_REF_LITELLM_PYTHON names no Python with LiteLLM")
CLIENT = """
import json, sys
import litellm
options = {"model": f"openai/{sys.argv[2]}", "api_base": sys.argv[1], "api_key": "none", "temperature": 0,
           "max_tokens": 24, "messages": [{"role": "user", "content": "hello"}]}
whole = litellm.completion(**options)
flex = litellm.completion(service_tier="flex", **options)
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **options)]
try:
    refused = litellm.completion(**options | {"temperature": -1})
except litellm.BadRequestError as error:
    refused = str(error)
print(json.dumps({"whole": whole.choices[0].message.content, "reason": whole.choices[0].finish_reason,
                  "tokens": whole.usage.completion_tokens, "flex": flex.choices[0].message.content,
                  "tier": flex.service_tier, "streamed": "".join(pieces), "refused": refused}))
"""


def test_chat_stream_class_and_error(server):
    ran = subprocess.run([PYTHON, "-c", CLIENT, f"{server.url}/v1", MODEL], capture_output=True, text=True, timeout=300,
                         env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    got = json.loads(ran.stdout.splitlines()[-1])
    text = expected(ByteTokenizer().chat("hello"), 24)
    assert got["whole"] == got["flex"] == got["streamed"] == text
    assert (got["reason"], got["tokens"], got["tier"]) == ("length", 24, "flex")
    assert "temperature" in got["refused"]
