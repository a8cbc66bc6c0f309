"""Chat models and image models behind OpenAI-compatible endpoints, and our own pipelines under the same interfaces."""
