"""Models on disk and on the Hugging Face Hub: save, push, model cards, what a config.json may say."""
