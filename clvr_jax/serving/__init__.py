"""The server: the closed loop behind an API that clients of OpenAI's API can call. docs/how-to/serving.md describes it.

`app` joins the parts: `scheduler` runs the loops of many requests on one device thread, `requests` checks what clients
send, `images`, `loops` and `chat` are the endpoints, and `store` keeps finished loops on disk.
"""
