"""The embedded world: generated text, a byte-level tokenizer, a small base policy and a judge that knows all."""
