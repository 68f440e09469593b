"""A model behind HTTP, in OpenAI's format: what goes over the wire, the client and the server."""
