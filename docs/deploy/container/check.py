"""Health check of a container: the server is ready, and its model answers with one token."""

import json
import os
import sys
import urllib.request

URL = f"http://127.0.0.1:{os.environ.get('MLLAMA_PORT', '8000')}"


def main() -> None:
    """End with exit code 0 if the model answers."""
    urllib.request.urlopen(f"{URL}/health", timeout=5).close()
    asked = {"messages": [{"role": "user", "content": "What can you do?"}], "max_tokens": 1}
    headers = {"content-type": "application/json", "authorization": f"Bearer {os.environ.get('MLLAMA_GRAPH_API_KEY')}"}
    request = urllib.request.Request(f"{URL}/v1/chat/completions", json.dumps(asked).encode(), headers)
    with urllib.request.urlopen(request, timeout=15) as answer:
        print(json.load(answer)["choices"][0]["message"]["content"])


try:
    main()
except OSError as error:
    sys.exit(f"not ready: {error}")
