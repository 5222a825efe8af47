"""Models and cascades on disk and on the Hugging Face Hub: save, load, push, model cards, time limits."""
