"""The client: RASD's calls on a model behind HTTP."""
