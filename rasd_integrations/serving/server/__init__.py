"""``rasd serve``: an OpenAI server over one loaded model."""
