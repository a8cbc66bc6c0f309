"""The HTTP endpoints: what a request may hold, how it becomes a loop or a chat, and how it is answered or streamed."""
