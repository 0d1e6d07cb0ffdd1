"""The HTTP server: OpenAI's API over the continuous batch. Needs the extra `serve`."""
